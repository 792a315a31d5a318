"""The end of a process in which torch has run."""

import atexit
import os
import sys
from contextlib import suppress
from typing import NoReturn

__all__ = ["leave"]


def leave(code: int) -> NoReturn:
    """End this process with an exit code: what is registered for its end is done and output is written, but
    the interpreter is not taken down.

    Torch's threads, and Python's that are inside torch, may outlive it, and then abort the process
    ("terminate called without an active exception"): a launcher would take a good end for a failure.
    """
    atexit._run_exitfuncs()  # pyright: ignore[reportPrivateUsage] # no public way
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
