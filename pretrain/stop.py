"""A polite end: SIGTERM, SIGHUP, the launcher's end or the first SIGINT asks the loop to save and stop, a
second SIGINT ends at once, and so does a SIGTERM after one, which is what torchrun makes of a second.

Python runs a signal's handler when the main thread comes back to Python, which a rank that waits for the
others inside a collective does not. So a second thread listens, to whom the system's own handler writes
(``signal.set_wakeup_fd``): it tells the other ranks through the store of the process group, and where this
rank waits for data it looks whether another has told. A rank without a batch thus hears of a signal that
reached only a rank with one, joins the collective in which that one waits, and all save the last finished
step.
"""

import itertools
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from types import FrameType

from ..configs import early
from ..configs.parent import LAUNCHER_ENDED
from . import meeting
from .agree import launched

__all__ = ["LOOK_S", "STOPPING", "StopRequest", "Stopped", "exit_code", "stop_on_signals"]

STOPPING = tuple(dict.fromkeys((signal.SIGINT, signal.SIGTERM, signal.SIGHUP, LAUNCHER_ENDED)))
LOOK_S = 0.5
"""Seconds between looks whether another rank was told, and between tries to end a read."""
PATIENCE_S = 2.0
"""Seconds that a launched process has to leave a call that hears no signal before the listener ends it."""


class Stopped(BaseException):
    """This process was told to stop, and is where it can: raised in the main thread alone."""


class StopRequest:
    """Whether this run was told to stop, and by what: ``reason`` is a signal's name or ``meeting.LOST``, ""
    while it is not."""

    def __init__(self, key: str = "", leave: Callable[[str], object] | None = None) -> None:
        """``key``: where the ranks of a run tell one another; see ``stop_on_signals`` for ``leave``."""
        self.reason = ""
        self.starting = True
        """Whether the ranks have not yet agreed to begin a step; the loop ends it."""
        self.saved = False
        """Whether nothing is left to be saved; the loop says it."""
        self._key, self._leave = key, leave
        self._interrupts = 0
        self._open = True  # whether the handler may raise where the main thread is
        self._waiting_since: float | None = time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether to stop."""
        return bool(self.reason)

    def look(self) -> None:
        """Raise Stopped if this run was told to stop."""
        if self.asked:
            raise Stopped

    @contextmanager
    def waiting(self, *, interrupt: bool) -> Generator[None]:
        """Inside, this rank hears also of what the others were told; raises Stopped if there is something.

        With ``interrupt`` it is raised wherever the main thread is inside, else where it calls ``look``.
        """
        self._waiting_since = time.monotonic()
        try:
            self._open = interrupt
            self.look()
            yield
        finally:
            self.closed()

    def heard(self) -> bool:
        """Whether this process or another of the run was told to stop."""
        self.reason = self.reason or meeting.noticed(self._key)
        return self.asked

    def tell(self) -> None:
        """Let the other ranks hear of it."""
        meeting.notice(self._key, self.reason)

    def closed(self) -> None:
        """Signals no longer raise."""
        self._open, self._waiting_since = False, None

    def forked(self) -> None:
        """In a forked child, which has no listener: leave the parent's pipe alone, and raise nothing."""
        self.closed()
        with suppress(ValueError):  # not the main thread's child
            signal.set_wakeup_fd(-1)

    def _counted(self, before: int, number: int) -> int:
        """How many times an end was asked for at a terminal, with this signal. SIGTERM says nothing where the
        listener knocks with it, and when all is saved: a launcher ends those that are left with it."""
        again = number == signal.SIGTERM != LAUNCHER_ENDED and before > 0 and not self.saved
        return before + (number == signal.SIGINT or again)

    # -- signals ---------------------------------------------------------------------------------------

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Signal handler, in the main thread."""
        self._interrupts = self._counted(self._interrupts, number)
        if self._interrupts > 1:
            self._open = False
            raise KeyboardInterrupt
        self.reason = self.reason or _reason(number)
        if self._open:
            self._open = False
            raise Stopped

    def listen(self, pipe: int) -> None:
        """The listener's loop, until it reads a zero; numbers of signals come through ``pipe``."""
        main = threading.main_thread().ident
        assert main is not None
        asked_at = tried_at = last_interrupt = 0.0
        interrupts = 0
        several = launched() > 1  # which wait for one another in calls that hear no signal
        while True:
            came = os.read(pipe, 256) if select.select([pipe], [], [], LOOK_S)[0] else b""
            if 0 in came:
                return
            now = time.monotonic()
            numbers = [number for number in came if number in STOPPING]
            for number in numbers:
                if (more := self._counted(interrupts, number)) > interrupts:
                    interrupts, last_interrupt = more, now
            if not self.asked and numbers:
                self.reason = _reason(numbers[0])
            elif not self.asked and self._waiting_since is not None and now - self._waiting_since > LOOK_S:
                self.heard()
            if self.asked and not asked_at:
                asked_at = now
                self.tell()
            if self._open and self.asked and now - tried_at > LOOK_S:
                tried_at = now
                signal.pthread_kill(main, LAUNCHER_ENDED)  # a system call returns, and the handler is run
            if several and interrupts > 1 and now - last_interrupt > PATIENCE_S:
                os._exit(130)
            if several and self.starting and self._open and self.asked and now - asked_at > PATIENCE_S:
                if self._leave is not None:
                    self._leave(self.reason)
                os._exit(exit_code(self.reason))


def _reason(number: int) -> str:
    """Why this signal came."""
    return meeting.LOST if number == LAUNCHER_ENDED != signal.SIGTERM else signal.Signals(number).name


def exit_code(reason: str) -> int:
    """Of a process that was told to stop. A launcher on another host that is still there restarts its
    processes after any code but 0: so it does where one was lost, and not after a signal."""
    return {"SIGINT": 130, meeting.LOST: 1}.get(reason, 0)


_listening: list[StopRequest] = []
_runs = itertools.count()


def _in_child() -> None:
    """A forked worker's signals are not its parent's."""
    for stop in _listening:
        stop.forked()


os.register_at_fork(after_in_child=_in_child)


@contextmanager
def stop_on_signals(leave: Callable[[str], object] | None = None) -> Generator[StopRequest]:
    """Inside the block SIGINT, SIGTERM, SIGHUP and the launcher's end ask to stop; afterwards the old
    handlers are back.

    Until ``closed`` is called there is nothing to save: they raise Stopped, and where a launched process
    does not leave a call that waits for the others, the listener calls ``leave`` with the reason and ends
    the process. SIGHUP is left alone where it is ignored (nohup). Works in the main thread; elsewhere
    signals stay with whoever has them.
    """
    stop = StopRequest(f"diptych/stop/{next(_runs)}", leave)
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    mine, its = os.pipe()
    os.set_blocking(its, False)
    numbers = [number for number in STOPPING if signal.getsignal(number) is not signal.SIG_IGN]
    before = signal.set_wakeup_fd(its, warn_on_full_buffer=False)
    old = {number: signal.signal(number, stop.handle) for number in numbers}
    listener = threading.Thread(target=stop.listen, args=(mine,), daemon=True)
    listener.start()
    _listening.append(stop)
    if early.came:
        stop.reason = _reason(early.came.pop(0))
    try:
        yield stop
    finally:
        stop.closed()
        os.write(its, b"\0")
        listener.join(LOOK_S)
        _listening.remove(stop)
        signal.set_wakeup_fd(before)
        for number, handler in old.items():
            signal.signal(number, handler)
        if not listener.is_alive():
            os.close(mine)
            os.close(its)
