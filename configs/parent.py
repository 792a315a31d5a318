"""A process that ends when the one that started it does, however that ends. On Linux; elsewhere nothing
happens."""

import ctypes
import os
import signal
import sys

__all__ = ["LAUNCHER_ENDED", "end_with_launcher", "signal_at_end_of_parent"]

PR_SET_PDEATHSIG = 1  # sys/prctl.h
LAUNCHER_ENDED: signal.Signals = signal.SIGRTMIN if sys.platform == "linux" else signal.SIGTERM
"""A signal that nobody else sends, so that it is not taken for a request of the user's."""


def signal_at_end_of_parent(number: int, parent: int) -> None:
    """Have the system send this process signal ``number`` when the thread that started it ends; at once if
    ``parent``, the process that started it, has ended already."""
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def end_with_launcher(number: int = signal.SIGTERM) -> None:
    """Signal ``number`` to this process when torchrun or accelerate, which started it, is gone: killed, it
    would leave its processes running. Call it early, in the main thread."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        signal_at_end_of_parent(number, os.getppid())
