"""A polite end: the first SIGINT or SIGTERM asks the loop to save and stop, a second SIGINT ends at once."""

import signal
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

__all__ = ["StopRequest", "stop_on_signals"]


class StopRequest:
    """Whether this process was told to stop."""

    def __init__(self) -> None:
        self.asked = False

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def stop_on_signals() -> Generator[StopRequest]:
    """Inside the block SIGINT and SIGTERM only set ``asked``; afterwards the old handlers are back. Works in
    the main thread; elsewhere signals stay with whoever has them."""
    stop = StopRequest()
    old = {}
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            old[number] = signal.signal(number, stop.handle)
    except ValueError:  # not the main thread
        pass
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
