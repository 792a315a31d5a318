"""Where the processes of a run meet, anew at every start, and leave word for one another.

torchrun keeps one key-value store for all restarts, and processes look each other up in it by keys that are
the same every time: gloo's and NCCL's. After a restart a process could so find the address of one that is
dead, and wait for it (pytorch/pytorch issue 135712). Here process 0 makes a name up for the meeting that
nobody has used before, and all keys go below it.
"""

import secrets
import time
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..configs.errors import UserError

__all__ = ["LOST", "meet", "notice", "noticed"]

LOOK_S = 0.02  # seconds between looks of process 0 at who is there


def meet(timeout_s: float) -> Store:
    """A store that the processes announced by the launcher (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``,
    ``MASTER_PORT``) have for themselves. Raises UserError if some do not come within ``timeout_s`` seconds.
    """
    try:
        handler = rendezvous("env://", timeout=timedelta(seconds=timeout_s))
        store, rank, world_size = next(handler)
        name = _gather(store, world_size, timeout_s) if rank == 0 else _come(store, rank, timeout_s)
    except RuntimeError as error:
        raise _alone(
            f"the process that the others meet at could not be reached within {timeout_s:g} s; see whether "
            f"it runs and lets connections through ({_first_line(error)})"
        ) from error
    return PrefixStore(f"diptych/{name}", store)


def _come(store: Store, rank: int, timeout_s: float) -> str:
    """Say that this process is here and wait for the name of the meeting. What it says is new, so that an
    answer to a dead process of its rank is not taken for one to itself."""
    here = secrets.token_hex(8)
    store.set(f"diptych/here/{rank}", here)
    store.wait([f"diptych/answer/{here}"], timedelta(seconds=timeout_s))
    name = store.get(f"diptych/answer/{here}").decode()
    store.set(f"diptych/ready/{name}/{rank}", here)
    return name


def _gather(store: Store, world_size: int, timeout_s: float) -> str:
    """Tell the name to all processes until each has taken it, dead ones that left word aside."""
    name, answered = secrets.token_hex(8), dict.fromkeys(range(1, world_size), b"")
    missing, end = list(answered), time.monotonic() + timeout_s
    while missing:
        if time.monotonic() > end:
            others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise _alone(
                f"rank {missing[0]}{others} of {world_size} processes did not come within {timeout_s:g} s; "
                "see its host's log, or start fewer processes"
            )
        for rank in missing:
            here = _get(store, f"diptych/here/{rank}")
            if here != answered[rank]:
                store.set(f"diptych/answer/{here.decode()}", name)
                answered[rank] = here
        ready = {rank: _get(store, f"diptych/ready/{name}/{rank}") for rank in missing}
        missing = [rank for rank in missing if not answered[rank] or ready[rank] != answered[rank]]
        time.sleep(LOOK_S if missing else 0)
    return name


def _get(store: Store, key: str) -> bytes:
    return store.get(key) if store.check([key]) else b""


def _alone(message: str) -> UserError:
    error = UserError(message)
    error.alone = True
    return error


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__


LOST = "the launcher's end"


def notice(key: str, text: str) -> None:
    """Leave ``text`` where every process finds it by ``noticed``; no process waits, so any thread may. Does
    nothing without a process group, or if its store has ended with the launcher."""
    with suppress(RuntimeError, ValueError):  # the latter when there is a group no longer
        if _in_group():
            _store().set(key, text)


def noticed(key: str) -> str:
    """The text that a process left, "" if there is none, ``LOST`` if the store ended with the launcher."""
    try:
        if not _in_group() or not _store().check([key]):
            return ""
        return _store().get(key).decode()
    except RuntimeError:
        return LOST
    except ValueError:  # there is no group any more
        return ""


def _store() -> Store:
    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage] # no public way


def _in_group() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1
