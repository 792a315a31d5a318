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
PATIENCE_S = 1.0  # seconds for a worker to answer
LAST = b"Current thread"  # the thread that answers
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
        called ``answer``, or is stopped or hangs in the kernel. Takes a second for each of those."""
        os.ftruncate(self._fd, 0)  # of late answers
        parts: list[str] = []
        for number, pid in enumerate(workers):
            parts.append(f"data worker {number} (process {pid}) is {_state(pid)}")
            if _answers(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, SIGNAL)
                    parts.append(self._read())
        return "\n".join(parts)

    def _read(self) -> str:
        """What one process writes, until nothing comes after its last line."""
        end, text = time.monotonic() + PATIENCE_S, b""
        while time.monotonic() < end:
            time.sleep(PATIENCE_S / 50)
            size = os.fstat(self._fd).st_size
            if LAST in text and len(text) == size:
                break
            text = os.pread(self._fd, size, 0)
        os.ftruncate(self._fd, 0)
        return text.decode(errors="replace")


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
