"""A folder of downloaded files that all processes of a machine share, up to a number of bytes.

One process brings a file while the others wait for it. A file appears under its name only when it is whole.
The locks are flocks, which the system takes back from a process that dies.
"""

import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..configs.errors import UserError

__all__ = ["TOUCH_S", "FileCache"]

log = logging.getLogger(__name__)

TOUCH_S = 20.0  # a file in use says so this often
HOT_S = 60.0  # a file used this recently is evicted last
WANTED_S = 3600.0  # how long a file that was brought ahead waits for its first use
TEMP = re.compile(r"\.(?P<name>.+)\.(?P<size>\d+)\.[0-9a-f]{12}\.tmp")
NEVER = 0  # access time of a file that nobody has used; file systems set later ones only

_held: set[int] = set()  # descriptors of locks


def _after_fork() -> None:
    # a child's copy of a descriptor would keep its parent's lock for as long as the child lives
    for handle in _held:
        os.close(handle)
    _held.clear()


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class _Kept:
    """A file of the cache: bytes on disk, when it was last used (seconds), whether it ever was."""

    name: str
    bytes: int
    time: float
    used: bool


class FileCache:
    """Files by name in ``folder``, at most ``max_bytes`` of them where that is possible."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self._brought: set[str] = set()
        self._warned = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"the cache's folder {folder} cannot be made: {error.strerror}; set data.cache"
            ) from error

    def open(self, name: str, size: int, bring: Callable[[Path], None], *, exact: bool = True) -> int:
        """A descriptor, for reading, of the file called ``name``. It has ``size`` bytes, or about so many
        where that is not ``exact``.

        If it is not there ``bring`` writes it to a path, and raises if it cannot. Others wait meanwhile. An
        open file can be read to the end whatever happens to its name.
        """
        expected = size if exact else None
        if (handle := self._open(name, expected)) is not None:
            return handle
        with self._locked(name):
            if (handle := self._open(name, expected)) is None:  # nobody else brought it
                if name in self._brought:
                    self._warn()
                self._brought.add(name)
                handle = self._bring(name, size, bring, ahead=False)
        assert handle is not None
        return handle

    def bring_ahead(self, name: str, size: int, bring: Callable[[Path], None]) -> bool:
        """Have a file before it is needed, without evicting what is in use or waits for its first use.

        False if there is no room for it now; true if it is here, or another process brings it already.
        """
        if self._keep(name):
            return True
        with self._locked(name, wait=False) as locked:
            if not locked or self._keep(name):
                return True
            handle = self._bring(name, size, bring, ahead=True)
            if handle is not None:
                os.close(handle)
            return handle is not None

    def has(self, name: str) -> bool:
        """Whether the file is here at this moment."""
        return (self.folder / name).exists()

    def _keep(self, name: str) -> bool:
        """Whether a file is here. It then counts as used now, if it ever was, since it is to be used soon."""
        try:
            used = (self.folder / name).stat().st_atime_ns
            os.utime(self.folder / name, ns=(used, time.time_ns()))
        except FileNotFoundError:
            return False
        return True

    def touch(self, handle: int) -> None:
        """Say that an open file is in use."""
        now = time.time_ns()
        os.utime(handle, ns=(now, now))

    def remove(self, name: str) -> None:
        """Forget a file; who has it open keeps it."""
        (self.folder / name).unlink(missing_ok=True)

    def _open(self, name: str, size: int | None) -> int | None:
        try:
            handle = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if size is not None and os.fstat(handle).st_size != size:  # the disk lost some of it
            os.close(handle)
            self.remove(name)
            return None
        self.touch(handle)
        return handle

    def _bring(self, name: str, size: int, bring: Callable[[Path], None], *, ahead: bool) -> int | None:
        """Download a file whose lock is held. Its descriptor, opened before others can evict it."""
        # so that those who make room at the same moment see that its bytes are spoken for
        temporary = self.folder / f".{name}.{size}.{secrets.token_hex(6)}.tmp"
        with self._locked(""):
            if not self._make_room(name, size, ahead=ahead):
                return None
            temporary.touch()
        handle = -1
        try:
            bring(temporary)
            handle = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
            os.fsync(handle)
            now = time.time_ns()
            os.utime(handle, ns=(NEVER if ahead else now, now))
            temporary.rename(self.folder / name)
            with self._locked(""):
                self._make_room(name, 0, ahead=ahead)  # for what others brought meanwhile
            return handle
        except BaseException:
            if handle >= 0:
                os.close(handle)
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, name: str, size: int, *, ahead: bool) -> bool:
        """Evict what was not used for longest until ``size`` more bytes fit; false if ``ahead`` and too much
        is in use. Who needs a file now gets it even where all room is in use."""
        kept, pending = self._list(name)
        excess = pending + sum(file.bytes for file in kept) + size - self.max_bytes
        now = time.time()
        kept.sort(key=lambda file: file.time)
        cold = [file for file in kept if now - file.time > (HOT_S if file.used else WANTED_S)]
        waiting = [file for file in kept if not file.used and file not in cold]
        hot = [file for file in kept if file.used and file not in cold]
        if ahead and excess > sum(file.bytes for file in cold):
            return False
        # of those that wait for their first use, the last to come is needed last
        for file in cold if ahead else cold + waiting[::-1] + hot:
            if excess <= 0:
                break
            # who holds the lock is about to open it
            with self._locked(file.name, wait=False) as locked:
                if locked:
                    self.remove(file.name)
                    excess -= file.bytes
                    if file.used and now - file.time < HOT_S:
                        self._warn()
        return excess <= 0 or not ahead

    def _list(self, own: str) -> tuple[list[_Kept], int]:
        """All whole files, and the bytes of downloads under way. Those of dead processes are removed."""
        kept: list[_Kept] = []
        pending = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                if entry.name.endswith(".lock"):
                    continue
                try:
                    stat = entry.stat()
                except FileNotFoundError:
                    continue
                found = TEMP.fullmatch(entry.name)
                if found is None:
                    used = stat.st_atime_ns != NEVER
                    kept.append(_Kept(entry.name, stat.st_blocks * 512, stat.st_mtime, used))
                    continue
                with self._locked(found["name"], wait=False) as locked:
                    if locked or found["name"] == own:  # its downloader would hold the lock
                        Path(entry.path).unlink(missing_ok=True)
                    else:
                        pending += max(int(found["size"]), stat.st_blocks * 512)
        return kept, pending

    def _warn(self) -> None:
        if not self._warned:
            self._warned = True
            log.warning(
                "data.cache_gb: %.3g is less than what is read at a time: files in use are evicted from %s, "
                "stay on the disk while they are open and are then fetched again; raise it, or set 0",
                self.max_bytes / 1e9,
                self.folder,
            )

    @contextmanager
    def _locked(self, name: str, *, wait: bool = True) -> Generator[bool]:
        """Hold the lock of a file's name, or with "" that of the cache; yields whether it is held, which it
        may not be where ``wait`` is false. The locks' files go when they are released."""
        path = self.folder / f"{name}.lock"
        while True:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            _held.add(handle)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                _release(handle)
                yield False
                return
            except BaseException:
                _release(handle)
                raise
            if _is_at(handle, path):  # else it was removed while this waited
                break
            _release(handle)
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)
            fcntl.flock(handle, fcntl.LOCK_UN)  # at once, even if a child that was just forked has a copy
            _release(handle)


def _is_at(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


def _release(handle: int) -> None:
    _held.discard(handle)
    os.close(handle)
