"""Reading shards: plain tars with an index beside each and a manifest over all.

Any webdataset client reads the tars. The index makes every sample reachable at once and says, by a hash,
whether its bytes are still those that were written.
"""

import os
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ..configs.errors import UserError
from ..configs.files import cache_dir, resolve_data_path
from .cache import FileCache
from .image_header import FORMATS
from .index import (
    CAPTION_IN_JSON,
    MANIFEST,
    Index,
    Record,
    ShardRow,
    fingerprint,
    key_hash,
    load_json,
    parse_manifest,
    read_manifest,
    text_hash,
)
from .remote import RemoteFolder, as_url
from .stores import CachedStore, LocalStore, OpenedShard, RangeStore, ShardStore, check_files_of
from .writer import RefusedSample, ShardWriter

__all__ = ["DamagedSample", "RawSample", "RefusedSample", "ShardSet", "ShardWriter", "open_shards"]

OPEN_SHARDS = 128  # tars and indexes, two files each, that a process keeps open
INDEX_BYTES = 512 << 20  # indexes in memory, of shards that are read by range requests
OPENED_TOGETHER = 8  # shards that one call fetches at the same time


class DamagedSample(Exception):
    """A sample whose bytes are not what they should be.

    ``reason`` is one word: "hash" (the image changed), "caption" or "json" (the text changed), "missing" (the
    tar ends before it), "size" (too large), and from later stages "decode".
    """

    def __init__(self, shard: str, key: str, reason: str) -> None:
        super().__init__(shard, key, reason)  # all of them, so that it can be pickled
        self.shard, self.key, self.reason = shard, key, reason

    def __str__(self) -> str:
        return f"{self.shard}: sample '{self.key}' is damaged ({self.reason})"


class RawSample(NamedTuple):
    """One sample as stored: ``image`` in the format ``extension`` ("jpg", "png" or "webp"), not decoded."""

    key: str
    image: bytes
    extension: str
    caption: str
    meta: dict[str, Any]
    sample_id: int
    shard: str


class ShardSet:
    """A folder of shards, read at random. Made by ``open_shards``.

    A ``sample_id`` is the ordinal of a usable sample over the manifest, from 0. Can be pickled and forked:
    each process opens its own files when it needs them. Safe for threads.
    """

    def __init__(self, store: ShardStore, rows: list[ShardRow]) -> None:
        self._store = store
        self.folder: Path | RemoteFolder = store.folder
        """Where it lies; ``folder / name`` is the place of a file, for messages."""
        self.is_remote: bool = not isinstance(store, LocalStore)
        self.rows = rows
        """The manifest."""
        self.fingerprint: str = fingerprint(rows)
        """SHA-256 of the canonical manifest, in hexadecimal."""
        self.shard_names: list[str] = [row.shard for row in rows]
        self.shard_sizes: NDArray[np.int64] = np.array([row.num_ok for row in rows], dtype=np.int64)
        """Usable samples per shard, int64 [shards]."""
        self._ends: list[int] = np.cumsum(self.shard_sizes).tolist()
        self._by_hash: tuple[NDArray[np.uint64], NDArray[np.int64]] | None = None
        self._reset()

    def _reset(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._opened: OrderedDict[int, OpenedShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_lock": None, "_opened": None, "_by_hash": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return f"ShardSet({str(self.folder)!r}: {len(self)} samples in {len(self.rows)} shards)"

    def _open(self, shard: int) -> OpenedShard:
        if self._pid != os.getpid():  # a forked child
            self._reset()
        with self._lock:
            opened = self._opened.pop(shard, None)
            if opened is not None:
                self._opened[shard] = opened
                return opened
        opened = self._store.open(self.rows[shard])
        with self._lock:
            left = self._make_room(opened.memory)
            left.append(self._opened.pop(shard, None))
            self._opened[shard] = opened
        del left  # files are closed when nobody holds the lock
        return opened

    def _make_room(self, memory: int) -> list[OpenedShard | None]:
        """Let go of one shard if there are as many as may be open, of those that were evicted from the cache,
        and of the least recent ones if their indexes fill the memory."""
        left: list[int] = []
        memory += sum(one.memory for one in self._opened.values())
        for number, (shard, one) in enumerate(self._opened.items()):
            too_many = len(self._opened) - number >= OPEN_SHARDS
            if too_many or one.is_left() or (one.memory and memory > INDEX_BYTES):
                memory -= one.memory
                left.append(shard)
        return [self._opened.pop(shard) for shard in left]

    def prefetch(self, shards: Iterable[int]) -> None:
        """A hint that these shards will be read, in this order; returns at once.

        Threads bring them into the cache, in place of those hinted at before, as far as there is room in it
        that is not in use. Nothing happens for local folders and range reads.
        """
        self._store.prefetch([self.rows[shard] for shard in shards])

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Shard number and record number of a sample; IndexError outside ``0 <= sample_id < len(self)``."""
        shard = self._shard_of(sample_id)
        row = self.rows[shard]
        record = int(sample_id) - (self._ends[shard] - row.num_ok)
        ok = self._open(shard).ok if row.num_bad else None
        return shard, record if ok is None else int(ok[record])

    def _shard_of(self, sample_id: int) -> int:
        if not 0 <= sample_id < self._ends[-1]:
            raise IndexError(f"sample {sample_id} of {len(self)} in {self.folder}")
        return bisect_right(self._ends, sample_id)

    def records(self, shard: int) -> NDArray[np.void]:
        """The index of a shard, dtype ``index.RECORD``, unusable samples included: offsets, sizes, ``width``,
        ``height``, ``text_len``, ``flags``, ..."""
        return self._open(shard).index.records

    def index(self, shard: int) -> Index:
        """The index of a shard with its keys."""
        return self._open(shard).index

    def read(self, sample_id: int) -> RawSample:
        """One sample, its bytes checked against the index.

        Raises DamagedSample if they differ or end early, OSError if the file system fails, UserError if a
        remote file cannot be had after several tries or is not the manifest's, IndexError for an id that does
        not exist.
        """
        shard, opened, record = self._record(sample_id)
        spans = _spans(record)
        return self._sample(sample_id, shard, opened, record, [opened.pread(n, at) for at, n in spans])

    def read_many(self, sample_ids: Sequence[int]) -> list[RawSample | DamagedSample]:
        """Samples, or what is wrong with each. Their shards are fetched, and range requests made, several at
        a time; of a local folder they are read one after the other. Raises as ``read`` does otherwise."""
        if not self.is_remote:
            return [self._attempt(sample_id) for sample_id in sample_ids]
        self._fetch({self._shard_of(sample_id) for sample_id in sample_ids})
        if not isinstance(self._store, RangeStore):
            return [self._attempt(sample_id) for sample_id in sample_ids]
        found = [self._record(sample_id) for sample_id in sample_ids]
        spans = [_spans(record) for _, _, record in found]
        wanted = [
            (self.rows[shard], offset, size)
            for (shard, _, _), parts in zip(found, spans, strict=True)
            for offset, size in parts
        ]
        blocks = iter(self._store.read(wanted))
        out: list[RawSample | DamagedSample] = []
        for sample_id, (shard, opened, record), parts in zip(sample_ids, found, spans, strict=True):
            got = [next(blocks) for _ in parts]
            try:
                out.append(self._sample(sample_id, shard, opened, record, got))
            except DamagedSample as error:
                out.append(error)
        return out

    def _attempt(self, sample_id: int) -> RawSample | DamagedSample:
        try:
            return self.read(sample_id)
        except DamagedSample as error:
            return error

    def _fetch(self, shards: set[int]) -> None:
        """Have these shards at hand, several downloads at a time."""
        opened = {shard: self._opened.get(shard) for shard in sorted(shards)}
        missing = [shard for shard, one in opened.items() if one is None or not one.is_ready]
        if len(missing) < 2 or self._pid != os.getpid():
            return
        pool = ThreadPoolExecutor(min(OPENED_TOGETHER, len(missing)))
        try:
            for _ in pool.map(lambda shard: self._open(shard).ready(), missing):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # when one cannot be had the others need not be tried

    def _record(self, sample_id: int) -> tuple[int, OpenedShard, Record]:
        """Shard number, shard and index record of a sample."""
        shard = self._shard_of(sample_id)
        row, opened = self.rows[shard], self._open(shard)
        number = int(sample_id) - (self._ends[shard] - row.num_ok)
        return shard, opened, opened.index.record(number if opened.ok is None else int(opened.ok[number]))

    def _sample(
        self, sample_id: int, shard: int, opened: OpenedShard, record: Record, blocks: list[bytes]
    ) -> RawSample:
        """The sample whose bytes at ``_spans(record)`` are ``blocks``, if they are what was indexed."""
        name = self.shard_names[shard]
        key = opened.index.key_at(record.key_offset, record.key_size)
        image, caption, meta_bytes = blocks if len(blocks) == 3 else _members(record, blocks[0])
        size = record.image_size + record.caption_size + record.json_size
        if len(image) + len(caption) + len(meta_bytes) != size:
            raise DamagedSample(name, key, "missing")
        if xxh3_64_intdigest(image) != record.image_xxh3:
            raise DamagedSample(name, key, "hash")
        if text_hash(caption, meta_bytes) != record.text_xxh3:
            raise DamagedSample(name, key, "caption")
        try:
            meta = load_json(meta_bytes) if meta_bytes else {}
        except ValueError as error:
            raise DamagedSample(name, key, "json") from error
        try:
            in_json = record.flags & CAPTION_IN_JSON
            text = meta.get(self.rows[shard].caption_key or "") if in_json else caption.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedSample(name, key, "caption") from error
        if not isinstance(text, str):
            raise DamagedSample(name, key, "caption")
        return RawSample(key, image, FORMATS[record.format], text, meta, int(sample_id), name)

    def key_of(self, sample_id: int) -> str:
        """The key of a sample, without reading it."""
        shard, record = self.locate(sample_id)
        return self._open(shard).index.key(record)

    def indexes(self) -> Iterator[Index]:
        """The indexes of all shards, in order; of a remote set some are fetched at the same time."""
        return (opened.index for opened in self._each())

    def _each(self) -> Iterator[OpenedShard]:
        if not self.is_remote:
            yield from map(self._open, range(len(self.rows)))
            return
        with ThreadPoolExecutor(OPENED_TOGETHER) as pool:
            for start in range(0, len(self.rows), OPEN_SHARDS // 2):  # none is closed before it is given
                yield from pool.map(self._open, range(len(self.rows))[start : start + OPEN_SHARDS // 2])

    def keys(self) -> list[str]:
        """The keys of all usable samples, in order of their ids."""
        out: list[str] = []
        for opened in self._each():
            keys = opened.index.keys()
            out += keys if opened.ok is None else [keys[i] for i in opened.ok]
        return out

    def find(self, key: str) -> int:
        """The id of the sample with this key; KeyError if there is none, or several, as in foreign tars."""
        if self._by_hash is None:
            parts: list[NDArray[np.uint64]] = []
            for opened in self._each():
                hashes = opened.index.records["key_hash"]
                parts.append(np.array(hashes if opened.ok is None else hashes[opened.ok]))
            every = np.concatenate(parts)
            order = np.argsort(every, kind="stable")
            self._by_hash = (every[order], order)
        hashes, order = self._by_hash
        wanted = np.uint64(key_hash(key))
        low, high = np.searchsorted(hashes, wanted), np.searchsorted(hashes, wanted, side="right")
        found = [int(i) for i in order[low:high] if self.key_of(int(i)) == key]
        if len(found) > 1:
            raise KeyError(f"{key} (there are {len(found)} samples of that key in {self.folder})")
        if not found:
            raise KeyError(key)
        return found[0]


def _spans(record: Record) -> list[tuple[int, int]]:
    """Offset and size of what is read for a record: one block where image, caption and JSON lie together, as
    they do, else each."""
    start, end = _block(record)
    if end - start <= record.image_size + record.caption_size + record.json_size + 8192:
        return [(start, end - start)]
    return [
        (record.image_offset, record.image_size),
        (record.caption_offset, record.caption_size),
        (record.json_offset, record.json_size),
    ]


def _block(record: Record) -> tuple[int, int]:
    """From the first to the last byte of a record's members."""
    start, end = record.image_offset, record.image_offset + record.image_size
    if record.caption_size:
        start = min(start, record.caption_offset)
        end = max(end, record.caption_offset + record.caption_size)
    if record.json_size:
        start = min(start, record.json_offset)
        end = max(end, record.json_offset + record.json_size)
    return start, end


def _members(record: Record, block: bytes) -> tuple[bytes, bytes, bytes]:
    """Image, caption and JSON bytes of a record, shorter where the file ends before them."""
    start, _ = _block(record)
    image, caption, meta = (
        record.image_offset - start,
        record.caption_offset - start,
        record.json_offset - start,
    )
    return (
        block[image : image + record.image_size],
        block[caption : caption + record.caption_size] if record.caption_size else b"",
        block[meta : meta + record.json_size] if record.json_size else b"",
    )


def open_shards(
    folder: str | Path,
    *,
    cache_gb: float = 50.0,
    cache: str | Path | None = None,
    check_files: bool = True,
) -> ShardSet:
    """Open a folder of shards: a path, ``corpus:NAME/SPLIT`` of a fetched corpus, or a URL (``s3://``,
    ``gs://``, ``hf://``, ``https://``).

    Whole shards of a URL are kept on this machine's disk, in ``cache`` (by default ``shards`` in
    ``cache_dir()``), at most ``cache_gb`` (10^9 bytes) of them for all processes together; with 0 samples are
    fetched one by one and nothing is kept. ``check_files``: look whether all local files are there.

    Raises UserError, with the mend, if there is no such folder, no ``manifest.jsonl``, a shard or index is
    missing or has another size than the manifest says, or no sample can be used. Of a URL only the manifest
    is looked at.
    """
    if cache_gb < 0:
        raise UserError(f"data.cache_gb: {cache_gb} must be 0 or more")
    store: ShardStore
    if (url := as_url(folder)) is not None:
        remote = RemoteFolder(url)
        if cache_gb == 0:
            store = RangeStore(remote)
        else:
            where = cache_dir() / "shards" if cache is None else Path(cache).expanduser()
            store = CachedStore(remote, FileCache(where, int(cache_gb * 1e9)))
        rows = _remote_manifest(remote)
    else:
        path = resolve_data_path(folder)
        store, rows = LocalStore(path), read_manifest(path)
        if check_files:
            check_files_of(path, rows)
    if not sum(row.num_ok for row in rows):
        raise UserError(f"{store.folder} holds no usable sample; see `diptych data verify {store.folder}`")
    return ShardSet(store, rows)


def _remote_manifest(folder: RemoteFolder) -> list[ShardRow]:
    file = folder / MANIFEST
    mend = "index the set with `diptych data index` and upload its manifest and indexes"
    return parse_manifest(file.read().decode("utf-8", "replace"), str(file), mend)
