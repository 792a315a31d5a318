"""Memory: how much a process has, and what to change when it does not suffice."""

import os
import re
import resource
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..configs.errors import UserError
from .agree import launched
from .config import PretrainConfig, TrainConfig

__all__ = ["host_memory", "memory_told", "mends"]

GIB = float(1 << 30)
_PAGE = os.sysconf("SC_PAGE_SIZE")
_CPU = ("DefaultCPUAllocator", "not enough memory", "Cannot allocate memory", "std::bad_alloc")
_ASKED = re.compile(r"allocate (\d+(?:\.\d+)?) ?([KMGT]iB|bytes)")
_UNITS = {"bytes": 1.0, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30, "TiB": 2.0**40}


def host_memory() -> float:
    """GiB that this process has in the machine's memory, what it shares with others included."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * _PAGE / GIB


@contextmanager
def memory_told(config: PretrainConfig) -> Generator[None]:
    """Inside, an allocation that fails is a UserError with the numbers and what to change."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        on_gpu = isinstance(error, torch.cuda.OutOfMemoryError)
        if not (on_gpu or isinstance(error, MemoryError) or any(word in text for word in _CPU)):
            raise
        processes = launched()
        rank = f" of rank {os.environ['RANK']}" if processes > 1 else ""
        if "DataLoader worker" in text:
            what, settings = f"a data worker{rank} ran", _fewer_batches(config, processes)
        else:
            what = f"the {'GPU' if on_gpu else 'host'}{rank} ran"
            settings = mends(config.train, processes)
        mend = f"set {' and '.join(settings[:2])}"
        numbers = _gpu() if on_gpu else _host()
        told = UserError(f"{what} out of memory ({_asked(text)}{numbers}); {mend}")
        told.alone = True
        raise told from error


def mends(config: TrainConfig, world_size: int) -> list[str]:
    """Settings that need less memory, two at least: first those that give the same gradient, what costs least
    before, then those of another run."""
    share = -(-config.global_batch_size // world_size)
    micro = min(config.micro_batch_size or share, share)
    half = [f"train.micro_batch_size={micro // 2}"] if micro > 1 else []
    again = [] if config.grad_checkpointing else ["train.grad_checkpointing=true"]
    spread = ["train.parallel=fsdp"] if config.parallel == "ddp" and world_size > 1 else []
    return [*half, *again, *spread, *_in_a_new_run(config, world_size)]


def _fewer_batches(config: PretrainConfig, world_size: int) -> list[str]:
    """The same for data workers, which keep batches."""
    data = config.data
    fewer = [f"data.prefetch={data.prefetch // 2}"] if data.prefetch > 1 else []
    return [*fewer, f"data.workers={data.workers // 2}", *_in_a_new_run(config.train, world_size)]


def _in_a_new_run(config: TrainConfig, world_size: int) -> list[str]:
    half = config.global_batch_size // 2
    fewer = [f"train.global_batch_size={half} in a new run"] if half >= max(2, world_size) else []
    return [*fewer, "a smaller model in a new run"]


def _asked(text: str) -> str:
    found = _ASKED.search(text)
    return f"asked for {_gib(float(found[1]) * _UNITS[found[2]])}, " if found else ""


def _gpu() -> str:
    free, total = torch.cuda.mem_get_info()
    peak = torch.cuda.max_memory_allocated()
    return f"free {_gib(free)} of {_gib(total)}, at most {_gib(peak)} in use before"


def _host() -> str:
    rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    free, total = (int(rows[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limits = [soft for soft in (_cgroup(), resource.getrlimit(resource.RLIMIT_AS)[0]) if soft > 0]
    limit = f", limited to {_gib(min(limits))}" if limits and min(limits) < total else ""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return f"free {_gib(free)} of {_gib(total)}{limit}, at most {_gib(peak)} in use before"


def _cgroup() -> int:
    """The limit of this process's container in bytes, -1 for none."""
    try:
        return int(Path("/sys/fs/cgroup/memory.max").read_text("ascii"))
    except (OSError, ValueError):
        return -1


def _gib(size: float) -> str:
    return f"{size / GIB:.3g} GiB"
