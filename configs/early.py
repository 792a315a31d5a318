"""Requests to stop that come while a process still loads torch: kept until its run can heed them."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

__all__ = ["came", "signals_kept"]

came: list[int] = []
"""Signals that came inside ``signals_kept`` and that nobody has heeded yet."""


@contextmanager
def signals_kept() -> Generator[None]:
    """Inside, SIGTERM and SIGHUP no longer end this process, where they would have; in the main
    thread; elsewhere nothing happens."""
    main = threading.current_thread() is threading.main_thread()
    asked = (signal.SIGTERM, signal.SIGHUP) if main else ()
    numbers = [number for number in asked if signal.getsignal(number) is signal.SIG_DFL]
    try:
        for number in numbers:
            signal.signal(number, _keep)
        yield
    finally:
        came.clear()
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _keep(number: int, frame: FrameType | None) -> None:
    came.append(number)
