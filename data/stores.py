"""Where the files of a shard set come from: a folder, a cache of a remote folder, or range requests."""

import hashlib
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from .cache import HOT_S, TOUCH_S, FileCache
from .index import HEADER, OK, RECORD, Index, ShardRow, idx_path, map_index, view_index
from .remote import RemoteFile, RemoteFolder, read_ranges

__all__ = [
    "CachedStore",
    "LocalStore",
    "OpenedShard",
    "RangeStore",
    "ShardStore",
    "cached_name",
    "check_files_of",
]

PREFETCH_THREADS = 3  # of one set in one process
MAX_KEY_BYTES = 1024  # keys of a shard have no more on average; a server may send anything


def check_files_of(folder: Path, rows: Iterable[ShardRow]) -> None:
    """Whether a local folder has the tars and indexes of its manifest; UserError with the mend if not."""
    for row in rows:
        _check_files(folder, row)


def _check_files(folder: Path, row: ShardRow) -> None:
    tar = folder / row.shard
    try:
        size = tar.stat().st_size
    except FileNotFoundError as error:
        raise UserError(
            f"{folder}/manifest.jsonl names {row.shard}, which is missing; copy it again"
        ) from error
    if size != row.bytes:
        raise UserError(
            f"{tar} has {size} bytes, the manifest says {row.bytes}; copy it again "
            f"or index the folder again with `diptych data index {folder} --overwrite`"
        )
    if not idx_path(tar).is_file():
        raise UserError(f"{idx_path(tar)} is missing; write it: `diptych data index {folder} --overwrite`")


class OpenedShard:
    """A shard's index and, in ``fd``, its tar. The descriptor lives as long as anyone holds this."""

    memory = 0
    """Bytes of the index that lie in memory of its own, not in a mapped file."""

    def __init__(self, index: Index, row: ShardRow, name: str, mend: str) -> None:
        if not index.belongs_to(row):
            raise UserError(f"{name} is not the index of {row.shard}; {mend}")
        if not index.is_sound():
            raise UserError(f"{name} points outside of {row.shard}; {mend}")
        self.index = index
        # record numbers of the usable samples, None where all are
        self.ok = np.flatnonzero(index.records["flags"] & OK) if row.num_bad else None
        self.fd = -1

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)

    @property
    def is_ready(self) -> bool:
        """Whether the tar is at hand."""
        return True

    def ready(self) -> None:
        """Have it at hand."""

    def is_left(self) -> bool:
        """Whether it has been evicted and was not read lately: closing it frees its bytes."""
        return False

    def pread(self, size: int, offset: int) -> bytes:
        """``size`` bytes at ``offset``; fewer only where the file ends."""
        data = os.pread(self.fd, size, offset)
        while len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class ShardStore(Protocol):
    """Opens shards. Can be pickled and forked."""

    folder: Path | RemoteFolder

    def open(self, row: ShardRow) -> OpenedShard:
        """The shard of a manifest's row. Raises UserError, or OSError for what may pass."""
        ...

    def prefetch(self, rows: Iterable[ShardRow]) -> None:
        """Bring these ahead, in this order, in place of those hinted at before. Returns at once."""
        ...


class LocalStore:
    """A folder of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder: Path | RemoteFolder = folder
        self._path = folder

    def open(self, row: ShardRow) -> OpenedShard:
        """See ``ShardStore``."""
        tar = self._path / row.shard
        opened = OpenedShard(map_index(idx_path(tar)), row, str(idx_path(tar)), "index the folder again")
        opened.fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)
        return opened

    def prefetch(self, rows: Iterable[ShardRow]) -> None:
        """Nothing is to be brought."""


class CachedStore:
    """A remote folder of which whole files are kept in a cache. Index and tar are fetched when they are
    needed, the tar not for the index's sake."""

    def __init__(self, folder: RemoteFolder, cache: FileCache) -> None:
        self.folder: Path | RemoteFolder = folder
        self._remote, self.cache = folder, cache
        self._ahead = _Prefetcher(self._bring_ahead)

    def open(self, row: ShardRow) -> OpenedShard:
        """See ``ShardStore``."""
        file, name, reserve, bring = self._index(row)
        mend = f"index the set again with `diptych data index` and upload it: {self.folder}"
        for again in (False, True):
            handle = self.cache.open(name, reserve, bring, exact=False)
            try:
                index = view_index(_map(handle), str(file), mend)
                if again or index.belongs_to(row):
                    break
            except (UserError, ValueError):
                if again:
                    raise
            finally:
                os.close(handle)  # the mapping stays
            self.cache.remove(name)  # it was whole when it came, the disk has changed it
        else:
            raise AssertionError("unreachable")
        return _CachedShard(index, row, str(file), mend, self.cache, lambda: self._tar(row))

    def prefetch(self, rows: Iterable[ShardRow]) -> None:
        """See ``ShardStore``. What finds no room in the cache waits for it."""
        self._ahead.replace(rows)

    def _tar(self, row: ShardRow) -> int:
        return self.cache.open(*self._whole(row))

    def _whole(self, row: ShardRow) -> tuple[str, int, Callable[[Path], None]]:
        file = self._remote / row.shard

        def bring(path: Path) -> None:
            file.download(path, xxh3=row.xxh3, most=row.bytes, exact=True)

        return cached_name(file, row.xxh3), row.bytes, bring

    def _index(self, row: ShardRow) -> tuple[RemoteFile, str, int, Callable[[Path], None]]:
        file = self._remote / idx_path(Path(row.shard)).name
        samples = row.num_ok + row.num_bad

        def bring(path: Path) -> None:
            most = HEADER.itemsize + samples * (RECORD.itemsize + MAX_KEY_BYTES)
            file.download(path, xxh3=row.idx_xxh3, most=most, exact=False)

        reserve = HEADER.itemsize + samples * RECORD.itemsize  # its size, but for the keys
        return file, cached_name(file, row.idx_xxh3), reserve, bring

    def _bring_ahead(self, row: ShardRow) -> bool:
        _, name, reserve, bring = self._index(row)
        return self.cache.bring_ahead(name, reserve, bring) and self.cache.bring_ahead(*self._whole(row))


class RangeStore:
    """A remote folder of which only the samples' bytes are fetched. Indexes are held in memory."""

    def __init__(self, folder: RemoteFolder) -> None:
        self.folder: Path | RemoteFolder = folder
        self._remote = folder

    def open(self, row: ShardRow) -> OpenedShard:
        """See ``ShardStore``."""
        file = self._remote / idx_path(Path(row.shard)).name
        mend = f"index the set again with `diptych data index` and upload it: {self.folder}"
        index = view_index(np.frombuffer(file.read(), dtype=np.uint8), str(file), mend)
        return _RangeShard(index, row, str(file), mend, self._remote / row.shard)

    def prefetch(self, rows: Iterable[ShardRow]) -> None:
        """Nothing is kept."""

    def read(self, spans: Sequence[tuple[ShardRow, int, int]]) -> list[bytes]:
        """``size`` bytes at ``offset`` of the tar of each (row, offset, size), concurrently."""
        return read_ranges([(self._remote / row.shard, offset, size) for row, offset, size in spans])


class _CachedShard(OpenedShard):
    """Its tar is fetched when the first byte of it is read."""

    def __init__(
        self, index: Index, row: ShardRow, name: str, mend: str, cache: FileCache, tar: Callable[[], int]
    ) -> None:
        super().__init__(index, row, name, mend)
        self._cache, self._tar = cache, tar
        self._lock = threading.Lock()
        self._touched = 0.0

    @property
    def is_ready(self) -> bool:
        return self.fd >= 0

    def ready(self) -> None:
        with self._lock:
            if self.fd < 0:
                self._touched = time.monotonic()
                self.fd = self._tar()

    def is_left(self) -> bool:
        idle = time.monotonic() - self._touched > HOT_S
        return self.fd >= 0 and idle and os.fstat(self.fd).st_nlink == 0

    def pread(self, size: int, offset: int) -> bytes:
        if self.fd < 0:
            self.ready()
        elif (now := time.monotonic()) - self._touched > TOUCH_S:
            self._touched = now
            self._cache.touch(self.fd)
        return super().pread(size, offset)


class _RangeShard(OpenedShard):
    def __init__(self, index: Index, row: ShardRow, name: str, mend: str, tar: RemoteFile) -> None:
        super().__init__(index, row, name, mend)
        self._tar = tar
        self.memory = index.raw.nbytes

    def pread(self, size: int, offset: int) -> bytes:
        return read_ranges([(self._tar, offset, size)])[0]


class _Prefetcher:
    """Threads that bring shards, one after the other each, and end when none is left."""

    def __init__(self, bring: Callable[[ShardRow], bool]) -> None:
        self._bring = bring
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._rows: list[ShardRow] = []
        self._running = 0

    def __getstate__(self) -> dict[str, object]:
        return {"_bring": self._bring}

    def __setstate__(self, state: dict[str, object]) -> None:
        vars(self).update(state)
        self._reset()

    def replace(self, rows: Iterable[ShardRow]) -> None:
        """Bring these from now on, and no others."""
        if self._pid != os.getpid():  # threads do not survive a fork
            self._reset()
        with self._lock:
            self._rows = list(rows)
            for _ in range(min(PREFETCH_THREADS, len(self._rows)) - self._running):
                self._running += 1
                threading.Thread(target=self._run, name="prefetch", daemon=True).start()

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._rows:
                    self._running -= 1
                    return
                rows = self._rows
                row = rows.pop(0)
            try:
                while not self._bring(row) and self._rows is rows:  # no room yet, and still wanted
                    time.sleep(1.0)
            except (UserError, OSError):
                pass  # who reads the shard meets it again, and says it


def _map(handle: int) -> NDArray[np.uint8]:
    return np.frombuffer(mmap.mmap(handle, 0, access=mmap.ACCESS_READ), dtype=np.uint8)


def cached_name(file: RemoteFile, version: str) -> str:
    """The name by which a file is cached: its own, after the hash of its whole URL and of what tells its
    versions apart, its hash for instance. So neither files of equal names nor old and new content are taken
    for each other."""
    digest = hashlib.sha256(f"{file.url}\n{version}".encode()).hexdigest()[:32]
    return f"{digest}-{file.name[-100:]}"
