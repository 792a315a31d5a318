"""The one exception a user is meant to see, and what mends the errors of disks."""

import errno

__all__ = ["UserError", "mend", "unwritable"]

ELSEWHERE = ", or choose another folder"
# what the user or the machine can mend, as opposed to a mistake of ours
_MENDS = {
    "make room there" + ELSEWHERE: (errno.ENOSPC, errno.EDQUOT),
    "give yourself the right to use it" + ELSEWHERE: (errno.EACCES, errno.EPERM),
    "make it writable" + ELSEWHERE: (errno.EROFS,),
    "see whether its disk or server is well": (
        errno.EIO,
        errno.ESTALE,
        errno.ETIMEDOUT,
        errno.ENOTCONN,
        errno.ENODEV,
        errno.ENXIO,
        errno.EHOSTDOWN,
    ),
    "check the path": (errno.ENOENT, errno.ENOTDIR),
    "give a file, not a folder": (errno.EISDIR,),
    "choose a shorter name": (errno.ENAMETOOLONG,),
    "make room there, or raise the limit of file sizes (ulimit -f)": (errno.EFBIG,),
    "raise the limit of open files (ulimit -n)": (errno.EMFILE, errno.ENFILE),
}


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the file, the key, the value and the mend. The command line prints
    it without a traceback and exits with code 2; of a launched run its first process does, as all raise it.
    """

    alone = False
    """Whether this process of several alone has met it, and must tell it."""


def mend(error: OSError, *, elsewhere: bool = True) -> str | None:
    """What mends an error of the system, in the words that end a sentence; None if nobody knows. Without
    ``elsewhere`` another folder is no answer."""
    text = next((text for text, numbers in _MENDS.items() if error.errno in numbers), None)
    return text if text is None or elsewhere else text.removesuffix(ELSEWHERE)


def unwritable(what: object, error: OSError, *, then: str = "") -> UserError:
    """What to raise where ``what`` cannot be written; ``then``: what to do once that is mended, where another
    folder is no answer."""
    how = mend(error, elsewhere=not then) or ("see to that" if then else f"see to that{ELSEWHERE}")
    how += f", {then}" if then else ""
    return UserError(f"{what} cannot be written ({error.strerror or error}); {how}")
