"""What worker processes are doing: their state and, where they answer, their Python stacks."""

import faulthandler
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress

__all__ = ["Stacks", "answer"]

SIGNAL = signal.SIGUSR2
STATES = {
    "R": "running",
    "S": "sleeping",
    "D": "waiting for the disk or a network file system",
    "T": "stopped",
}
PATIENCE_S = 1.0  # seconds for workers to answer
_kept: list[object] = []


class Stacks:
    """A file in memory that workers of this process write their stacks into when they are asked."""

    def __init__(self) -> None:
        self._fd = os.memfd_create("stacks")
        self.path = f"/proc/{os.getpid()}/fd/{self._fd}"
        """What a worker gives to ``answer``."""

    def __del__(self) -> None:
        os.close(self._fd)

    def of(self, workers: Sequence[int]) -> str:
        """State and stacks of processes, in lines for people. A worker that does not answer is none that
        called ``answer``, or hangs in the kernel. Takes a second at most."""
        lines = [
            f"data worker {number} (process {pid}) is {_state(pid)}" for number, pid in enumerate(workers)
        ]
        start = os.lseek(self._fd, 0, os.SEEK_END)
        asked = [pid for pid in workers if _answers(pid)]
        for pid in asked:
            with suppress(ProcessLookupError):
                os.kill(pid, SIGNAL)
        end, size = time.monotonic() + PATIENCE_S, -1
        while asked and time.monotonic() < end and size != os.fstat(self._fd).st_size:
            size = os.fstat(self._fd).st_size
            time.sleep(PATIENCE_S / 4)
        text = os.pread(self._fd, 1 << 20, start).decode(errors="replace")
        os.ftruncate(self._fd, 0)
        return "\n".join([*lines, *(["", text] if text else [])])


def answer(path: str) -> None:
    """Have this process write its stacks to a ``Stacks``'s file whenever it is asked."""
    with suppress(OSError):  # none of ours, or /proc is closed: then nobody asks
        file = open(path, "ab", buffering=0)  # noqa: SIM115 # as long as the process
        _kept.append(file)
        faulthandler.register(SIGNAL, file=file, all_threads=True)


def _answers(pid: int) -> bool:
    """Whether a process handles the signal, which would end it otherwise."""
    fields = _status(pid)
    return bool(int(fields.get("SigCgt", "0"), 16) >> (SIGNAL - 1) & 1)


def _state(pid: int) -> str:
    letter = _status(pid).get("State", "X")[:1]
    return STATES.get(letter, "gone")


def _status(pid: int) -> dict[str, str]:
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            rows = (line.partition(":") for line in file)
            return {name: value.strip() for name, _, value in rows}
    except OSError:
        return {}
