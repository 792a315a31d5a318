"""Output that nobody may read any more: no reason for work that takes hours to end."""

import errno
import os
import sys
from collections.abc import Callable

__all__ = ["still_read"]

GONE = (errno.EPIPE, errno.EIO, errno.EBADF)
"""What writing to a pipe that nobody reads, or to a terminal that is no more, ends with."""


def still_read(stream: str, write: Callable[[], object]) -> bool:
    """Call ``write``, which writes to ``stream`` (``stdout`` or ``stderr``), and say whether that is still
    read. Once it is not, ``sys`` has a stream there that leads nowhere; what a full disk refuses is left
    out."""
    try:
        write()
    except OSError as error:
        if error.errno in GONE:
            setattr(sys, stream, open(os.devnull, "w"))  # noqa: SIM115 # until the process ends
            return False
    except SystemExit:  # rich's own answer to a pipe that nobody reads, which it has led nowhere by then
        return False
    return True
