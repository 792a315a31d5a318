"""Whether a run gets on: time limits of its collectives, and a thread that tells where it stands still.

The thread asks nothing of the loop: it sees that the step's number does not change, and reads what the main
thread is doing off its stack. It never ends anything; the time limits do.
"""

import faulthandler
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, Self

import torch
from pydantic import Field

from ..configs.files import SameFolder
from ..configs.load import StrictModel
from ..data.stream import Stream
from . import distributed, meeting

__all__ = ["Watch", "WatchConfig", "doing_now", "record_flights"]

log = logging.getLogger(__name__)
LOOK_S = 5.0  # seconds between looks at the step's number
ANSWER_S = 2.0  # seconds for other ranks to say what they do
STACKS_BYTES = 16 << 20  # a longer file of stacks is begun anew

_DOING = (  # module, function, what is done in there; the outermost counts
    ("diptych.pretrain.meeting", "", "waiting for the other processes to come"),
    ("diptych.data.stream", "__next__", "waiting for data"),
    ("diptych.pretrain.encode", "", "evaluating"),
    ("diptych.pretrain.saver", "", "saving a checkpoint"),
    ("diptych.pretrain.state", "save", "saving a checkpoint"),
    ("diptych.pretrain.state", "load", "loading a checkpoint"),
    ("diptych.pretrain.parts", "__init__", "starting"),
)
COLLECTIVE = "in a collective"
GRADIENTS = "in the backward pass, which ends in a collective"


class WatchConfig(StrictModel):
    """How long is too long."""

    timeout_s: float = Field(default=600.0, gt=0)
    """How long a process waits for the others in training before it gives up. All then end with one sentence
    each (under NCCL its own watchdog may be faster, with its own words), and a launcher that restarts them
    (torchrun --max-restarts) goes on from the newest checkpoint."""
    startup_timeout_s: float = Field(default=1800.0, gt=0)
    """The same while a run starts, compiles, and makes its first step, while rank 0 evaluates, and where
    training waits for a checkpoint to be written."""
    watchdog_s: float = Field(default=300.0, gt=0)
    """If no step ends for so long, what every process is doing goes into ``stacks/rank_00000.txt`` of the run
    folder, and one line into the log; nothing is ended. Again after twice the time, and so on."""


def record_flights(folder: Path) -> None:
    """Have NCCL keep its latest collectives and write them down at a time-out (``torchfrtrace`` reads them).

    Call it before the process group is made. What is set already stays.
    """
    for name, value in (
        ("TORCH_FR_BUFFER_SIZE", "2000"),
        ("TORCH_NCCL_DUMP_ON_TIMEOUT", "1"),
        ("TORCH_FR_DUMP_TEMP_FILE", f"{folder.absolute()}/stacks/nccl_"),
    ):
        os.environ.setdefault(name, value)
    if torch.cuda.is_available():
        with suppress(OSError):  # told where the run folder is made
            (folder / "stacks").mkdir(parents=True, exist_ok=True)


class Watch:
    """Looks after one process of a run, as a context around its work."""

    def __init__(self, config: WatchConfig, folder: Path) -> None:
        """``folder``: the run's."""
        self.config = config
        self.folder = folder / "stacks"
        self._step: Callable[[], int] = lambda: -1
        self._stream: Stream | None = None
        self._main = threading.get_ident()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watchdog", daemon=True)
        self._patient = True
        self._run = SameFolder(folder)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(LOOK_S)

    @property
    def path(self) -> Path:
        """This process's file of stacks."""
        return self.folder / f"rank_{distributed.rank():05d}.txt"

    def follow(self, step: Callable[[], int], stream: Stream) -> None:
        """The run has been built: this gives the number of its finished steps, and this is its data."""
        self._step, self._stream, self._run = step, stream, SameFolder(self.folder.parent)

    def be_patient(self) -> None:
        """What comes may take long: until the next ``step_done`` the long time limit holds. A rank that waits
        for another is in the same phase, so all call it at the same place."""
        if not self._patient:
            self._patient = True
            distributed.set_timeout(max(self.config.startup_timeout_s, self.config.timeout_s))

    def step_done(self) -> None:
        """A step has ended."""
        if self._patient:
            self._patient = False
            distributed.set_timeout(self.config.timeout_s)

    def _look(self) -> None:
        every = min(LOOK_S, self.config.watchdog_s / 4)
        seen, since, limit, number = -1, time.monotonic(), self.config.watchdog_s, 0
        while not self._ended.wait(every):
            step, now = self._step(), time.monotonic()
            if step != seen:
                seen, since, limit, number = step, now, self.config.watchdog_s, 0
            elif now - since >= limit:
                number += 1
                self._report(step, now - since, number)
                limit = 2 * (now - since)

    def _report(self, step: int, seconds: float, number: int) -> None:
        """Tell of a standstill, for the ``number``-th time after this step (-1: before there are steps)."""
        here, step = f"{step}/{number}", max(step, 0)
        frame = sys._current_frames().get(self._main)  # pyright: ignore[reportPrivateUsage] # no public way
        doing = doing_now(frame)
        what = f"{doing} ({self._shards_due()})" if doing == "waiting for data" else doing
        try:
            self._write(f"step {step}, {seconds:.0f} s: {what}")
            where = f"stacks are in {self.path}"
        except OSError as error:
            where = f"stacks could not be written ({error})"
        others = self._ask(here, what) if distributed.world_size() > 1 else {}
        who = f"rank {distributed.rank()}: " if others else ""
        culprits = [f"rank {rank} is {word}" for rank, word in others.items() if COLLECTIVE not in word]
        if others and COLLECTIVE in doing:
            if distributed.rank() > 0 and culprits:
                return  # rank 0 tells, and those that are waited for
            what += ", where it waits: " + (
                ", ".join(culprits[:8]) or "all ranks have come there, see the network between them"
            )
        log.warning("%sno step has ended for %.0f s after step %d: %s; %s", who, seconds, step, what, where)

    def _write(self, title: str) -> None:
        self._run.check()
        self.folder.mkdir(parents=True, exist_ok=True)
        anew = self.path.exists() and self.path.stat().st_size > STACKS_BYTES
        with self.path.open("w" if anew else "a", encoding="utf-8") as file:
            print(f"== {time.strftime('%Y-%m-%d %H:%M:%S')} {title}", file=file, flush=True)
            faulthandler.dump_traceback(file, all_threads=True)
            if self._stream is not None and (workers := self._stream.worker_stacks()):
                print(workers, file=file)
            print(file=file)

    def _shards_due(self) -> str:
        shards = [] if self._stream is None else self._stream.shards_due()
        more = f" and {len(shards) - 3} more" if len(shards) > 3 else ""
        return (
            "its batch comes from " + ", ".join(shards[:3]) + more if shards else "of which nobody knows more"
        )

    def _ask(self, here: str, doing: str) -> dict[int, str]:
        """What the other ranks do; they look at the same time, since all stand still if one does. ``here``:
        which standstill and which report of it, so that no earlier answer counts."""
        others = [rank for rank in range(distributed.world_size()) if rank != distributed.rank()]
        told: dict[int, str] = {}

        def ask() -> None:
            meeting.notice(_key(here, distributed.rank()), json.dumps(doing))
            self._ended.wait(ANSWER_S + min(LOOK_S, self.config.watchdog_s / 4))
            for rank in others:
                text = meeting.noticed(_key(here, rank))
                told[rank] = json.loads(text) if text.startswith('"') else "not answering: see its host"

        asking = threading.Thread(target=ask, daemon=True)  # the store may be away, too
        asking.start()
        asking.join(4 * ANSWER_S + LOOK_S)
        return {rank: told.get(rank, "not answering, and neither is the launcher") for rank in others}


def _key(here: str, rank: int) -> str:
    return f"diptych/stands/{here}/{rank}"


def doing_now(frame: FrameType | None) -> str:
    """What a thread of a run is doing, by its innermost frame: ``waiting for data``, ``evaluating``,
    ``saving a checkpoint``, ``starting`` or ``computing``, and whether that is in a collective."""
    names = [*reversed([*_names(frame)])]
    doing = next((d for n, f in names for m, g, d in _DOING if n == m and g in ("", f)), "computing")
    if any(name.startswith(("torch.distributed.", "diptych.pretrain.distributed")) for name, _ in names):
        return COLLECTIVE if doing == "computing" else f"{doing}, {COLLECTIVE}"
    backward = any(name == "torch.autograd.graph" for name, _ in names)
    return GRADIENTS if backward and distributed.world_size() > 1 else doing


def _names(frame: FrameType | None) -> Iterator[tuple[str, str]]:
    """(module, function) of a frame and those around it, the innermost first."""
    while frame is not None:
        module: Any = frame.f_globals.get("__name__", "")
        yield str(module), frame.f_code.co_name
        frame = frame.f_back
