"""The one exception a user is meant to see."""


class UserError(Exception):
    """A mistake the user can mend.

    The message is one sentence that names the file, the key, the value and the mend. The command line prints
    it without a traceback and exits with code 2; of a launched run its first process does, as all raise it.
    """

    alone = False
    """Whether this process of several alone has met it, and must tell it."""
