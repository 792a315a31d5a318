"""Files that are whole or absent: atomic writes, and where caches live."""

import fcntl
import functools
import hashlib
import logging
import os
import re
import secrets
import shutil
import socket
import time
from collections.abc import Collection, Generator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .errors import UserError

log = logging.getLogger(__name__)

__all__ = [
    "Lines",
    "SameFolder",
    "atomic_write_bytes",
    "atomic_write_text",
    "cache_dir",
    "fsync_files",
    "fsync_folder",
    "is_open_at",
    "remove_temporaries",
    "resolve_data_path",
    "temporary_beside",
    "temporary_folder",
    "temporary_name",
]

TEMPORARY = re.compile(r"\..+\.([0-9a-f]{6})[0-9a-f]{6}\.tmp")
YOUNG_S = 2.0
"""A file that was changed so recently may be one that is being written."""
FORGOTTEN_S = 7 * 86400.0
"""A temporary folder of another machine that has not changed for so long is not being written."""


def cache_dir() -> Path:
    """Where downloads and corpora are kept: ``DIPTYCH_CACHE``, else ``diptych`` in the user's cache folder
    (``XDG_CACHE_HOME``, by default ``~/.cache``). It may not exist yet."""
    if own := os.environ.get("DIPTYCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diptych"


def resolve_data_path(text: str | Path) -> Path:
    """The path that a config names: ``corpus:NAME/REST`` lies in the cache's ``corpora`` folder, anything
    else is a path as it stands (``~`` is the home folder). A URL comes back as a path too, which names no
    file of this machine; ``open_shards`` understands it.

    Raises UserError for a corpus that was not fetched and for a name that leaves the folder of corpora.
    """
    name = str(text)
    if not name.startswith("corpus:"):
        return Path(name).expanduser()
    inside = Path(name.removeprefix("corpus:"))
    if inside.is_absolute() or not inside.parts or ".." in inside.parts:
        raise UserError(f"'{name}' must be corpus:NAME/REST, for instance corpus:icons-demo/train")
    corpora = cache_dir() / "corpora"
    if not (corpora / inside.parts[0]).is_dir():
        missing = f"there is no corpus {inside.parts[0]} in {corpora}"
        corpus = "clipart" if inside.parts[0] == "clipart" else "icons"
        raise UserError(f"'{name}': {missing}; fetch it with `diptych data fetch {corpus}`")
    return corpora / inside


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fsync_files(folder: Path, names: Collection[str]) -> None:
    """Make files of a folder durable, those that are there, and their names."""
    for name in names:
        with suppress(FileNotFoundError), (folder / name).open("rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)


class SameFolder:
    """A run's folder that must stay the one it is: where a mount has vanished there is another beneath it."""

    def __init__(self, run: Path) -> None:
        """Where it is not there yet, any folder will do."""
        self.run = run
        self._then = run.stat() if run.exists() else None

    def check(self) -> None:
        """Raise OSError if it is another: neither the same directory nor, as after a remount, one that holds
        a run's config."""
        if self._then is None or (self.run / "config.yaml").is_file():
            return
        if not self.run.exists() or not os.path.samestat(self._then, self.run.stat()):
            raise OSError(f"{self.run} no longer holds this run; has its disk been unmounted?")


class Lines:
    """A file of a run to which lines are added. A full disk costs none of them: what cannot be written is
    told once, waits, and is written with the next. Where somebody removes the file, a new one is begun."""

    def __init__(self, path: Path) -> None:
        """It is made by the first call of ``add``, in the folder that is there now."""
        self.path = path
        self._folder = SameFolder(path.parent)
        self._handle: int | None = None
        self._failing = False
        self._waiting = bytearray()

    def add(self, *lines: str) -> None:
        """Add lines, which end in a line feed, to what waits, and write it."""
        for line in lines:
            self._waiting += line.encode()
        try:
            self._write()
            self._failing = False
        except OSError as error:
            if not self._failing:
                log.warning("%s cannot be written (%s); what is new waits in memory", self.path, error)
            self._failing = True
            self._shut()  # a mount that comes back has other handles

    def _write(self) -> None:
        moved = self._handle is not None and not is_open_at(self._handle, self.path)
        if moved:
            self._shut()
        if self._handle is None:
            self._folder.check()
            self._handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        if moved:
            log.warning("%s is not the file it was; new lines go into what is there now", self.path)
        while self._waiting:
            del self._waiting[: os.write(self._handle, self._waiting)]

    def _shut(self) -> None:
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def close(self) -> None:
        """Write what waits, if that is possible now."""
        if self._waiting:
            self.add()
        self._shut()


def is_open_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that stands at ``path``."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


def temporary_name(path: Path) -> Path:
    """A new name beside ``path`` for what is to become it, which ``remove_temporaries`` knows."""
    return path.with_name(f".{path.name}.{_machine()}{secrets.token_hex(3)}.tmp")


@functools.cache
def _machine() -> str:
    """This boot of this machine, in six hexadecimal digits."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    text = boot.read_text() if boot.exists() else socket.gethostname()
    return hashlib.sha256(text.encode()).hexdigest()[:6]


def remove_temporaries(run: Path, below: Collection[str]) -> None:
    """Delete what killed processes left under temporary names in a run's folder, and in those of its folders
    that are called as in ``below``. Only for who holds the run's lock; a file that was written just now, as
    a report is without the lock, stays."""
    for path, folders, files in os.walk(run):
        here = Path(path)
        for name in filter(TEMPORARY.fullmatch, files):
            with suppress(OSError):
                if time.time() - (here / name).stat().st_mtime > YOUNG_S:
                    (here / name).unlink()
        for name in filter(TEMPORARY.fullmatch, list(folders)):
            shutil.rmtree(here / name, ignore_errors=True)
            folders.remove(name)
        # whatever else the user keeps there is not ours
        folders[:] = [name for name in folders if name in below] if here == run else folders


@contextmanager
def temporary_folder(path: Path) -> Generator[Path]:
    """A new folder beside ``path`` for what is to become it; at the end it is removed, if it was not renamed.

    First goes what processes of this machine that are no more left so: a folder is locked for as long as its
    process lives. On NFS other machines do not see that lock, so what they left goes after a week.
    ``path``'s own folder is made if it is absent.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    with ExitStack() as stack:
        with _locked(path.parent, wait=True):  # so that nobody removes one that has no lock yet
            for old in path.parent.iterdir():
                if named := TEMPORARY.fullmatch(old.name):
                    with _locked(old, wait=False) as left:
                        if left and (named[1] == _machine() or _forgotten(old)):
                            shutil.rmtree(old, ignore_errors=True)
            temporary.mkdir()
            stack.enter_context(_locked(temporary, wait=False))
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _forgotten(folder: Path) -> bool:
    """Whether nothing in a folder has changed for a week."""
    try:
        changed = [path.stat().st_mtime for path in (folder, *folder.iterdir())]
    except OSError:
        return False
    return time.time() - max(changed) > FORGOTTEN_S


@contextmanager
def _locked(folder: Path, *, wait: bool) -> Generator[bool]:
    """Hold the lock of a folder, which ends with the process; yields whether it is held."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # it is gone, or no folder
        yield False
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        held = True
    except OSError:  # another process has it, or there are no locks
        held = False
    try:
        yield held
    finally:
        os.close(handle)


@contextmanager
def temporary_beside(path: Path) -> Generator[Path]:
    """A temporary name in ``path``'s folder. What is written there becomes ``path`` when the block ends well,
    synced to disk; after an error it is removed and ``path`` is as it was."""
    temporary = temporary_name(path)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data``; at every moment ``path`` holds the old content or all of the new."""
    with temporary_beside(Path(path)) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 ``text`` with its line ends as they are; see ``atomic_write_bytes``."""
    atomic_write_bytes(path, text.encode("utf-8"))
