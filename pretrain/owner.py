"""One process at a time works in a run folder: it holds a lock on the file ``lock`` there.

The lock is the system's (POSIX, ``fcntl``), and so ends with its process, however that ends; data workers do
not keep it. It holds between machines on NFSv4, and on NFSv3 with a lock daemon. What only reads a run does
not ask for it.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from ..configs.errors import UserError, unwritable
from ..configs.files import SameFolder, is_open_at

__all__ = ["RunLock"]

log = logging.getLogger(__name__)
RESTART_S = 60.0
"""Seconds that a process which torchrun may have started again gives the one before, on whatever host, to
end."""
LOOK_S = 1.0
TAKEN = (errno.EACCES, errno.EAGAIN)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The right to write into a run folder. As a context it is given back at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "lock"
        self._handle: int | None = None
        self._look_at = 0.0
        self._same = SameFolder(folder)

    @property
    def held(self) -> bool:
        """Whether this process has it."""
        return self._handle is not None

    def take(self, *, patient: bool = True) -> Self:
        """Take it; the folder is made if absent. Raises UserError if another process has it, naming which, or
        if the folder cannot be written. Under a launcher that restarts processes that one is waited for, if
        ``patient``."""
        # not the count of restarts: it stays 0 where a host comes back
        restarts = patient and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
        end, told = time.monotonic() + (RESTART_S if restarts else 0), False
        while not self.held:
            handle = self._open()
            try:
                self._lock(handle)
            except OSError as error:
                os.close(handle)
                raise unwritable(f"out: {self.path}", error) from error
            except UserError:
                os.close(handle)
                if time.monotonic() >= end:
                    raise
                if not told:
                    log.warning("%s is in use; waiting up to %g s for that to end", self.folder, RESTART_S)
                told = True
                time.sleep(LOOK_S)
                continue
            if is_open_at(handle, self.path):
                self._handle = handle
            else:
                os.close(handle)  # another process has just given it back
        self._sign()
        self._same = SameFolder(self.folder)
        return self

    def _open(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise unwritable(f"out: {error.filename or self.folder}", error) from error

    def _sign(self) -> None:
        """Write down who has it."""
        assert self._handle is not None
        who = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        }
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps(who).encode() + b"\n", 0)

    def _lock(self, handle: int) -> None:
        """Raises UserError if another process has it, OSError if the file system fails."""
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise UserError(
                    f"{self.folder} is in use by {_holder(handle)}; wait until that has ended, or set out to "
                    "another folder"
                ) from error
            if error.errno not in NO_LOCKS:
                raise
            log.warning(
                "%s: the file system has no locks (%s); see to it that no other process uses this folder",
                self.folder,
                error.strerror,
            )

    def is_another(self) -> bool:
        """Whether another file stands there than the one that this process has locked."""
        try:
            return self._handle is not None and not os.path.samestat(os.fstat(self._handle), self.path.stat())
        except OSError:
            return False

    def keep(self) -> None:
        """Look, at most once a second, whether the file is still the one that is locked; where somebody has
        removed it, lock it anew. Raises UserError if another process has done so: two would go on in one
        folder. Without the lock nothing happens."""
        now = time.monotonic()
        if self._handle is None or now < self._look_at:
            return
        self._look_at = now + LOOK_S
        try:
            if self.path.exists() and not self.is_another():
                return
            self._same.check()
            handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError:  # a disk that is full or gone, of which the next save tells
            return
        os.close(self._handle)  # before it is locked anew: on one file this gives up that lock, too
        self._handle = handle
        try:
            self._lock(handle)
            self._sign()
        except UserError as error:
            os.close(handle)
            self._handle = None
            raise UserError(f"{self.path} was removed while this run trained, and {error}") from error
        except OSError as error:
            log.warning("%s cannot be locked anew (%s)", self.path, error)

    def release(self) -> None:
        """Give it back, and leave no folder that has nothing else in it."""
        if self._handle is None:
            return
        with suppress(OSError):  # the folder holds a run, or is no longer there
            if not self.is_another():
                self.path.unlink()
            self.folder.rmdir()
        os.close(self._handle)
        self._handle = None

    def __enter__(self) -> Self:
        return self.take()

    def __exit__(self, *error: object) -> None:
        self.release()


def _holder(handle: int) -> str:
    try:
        who = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(who['pid'])} on {who['host']} since {who['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
