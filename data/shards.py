"""Reading shards: plain tars with an index beside each and a manifest over all.

Any webdataset client reads the tars. The index makes every sample reachable at once and says, by a hash,
whether its bytes are still those that were written.
"""

import os
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from ..configs.errors import UserError
from ..configs.files import resolve_data_path
from .image_header import FORMATS
from .index import (
    CAPTION_IN_JSON,
    OK,
    RECORD,
    Index,
    ShardRow,
    fingerprint,
    idx_path,
    key_hash,
    load_json,
    map_index,
    read_manifest,
    text_hash,
)
from .writer import RefusedSample, ShardWriter

__all__ = ["DamagedSample", "RawSample", "RefusedSample", "ShardSet", "ShardWriter", "open_shards"]

OPEN_SHARDS = 128  # tars and indexes, two files each, that a process keeps open


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


@dataclass(frozen=True)
class RawSample:
    """One sample as stored: ``image`` in the format ``extension`` ("jpg", "png" or "webp"), not decoded."""

    key: str
    image: bytes
    extension: str
    caption: str
    meta: dict[str, Any]
    sample_id: int
    shard: str


class _OpenedShard:
    """A tar's file descriptor and its mapped index. The descriptor lives as long as anyone holds this."""

    def __init__(self, tar: Path, row: ShardRow) -> None:
        self.index = map_index(idx_path(tar))
        if not self.index.belongs_to(row):
            raise UserError(f"{idx_path(tar)} is not the index of {tar}; index the folder again")
        if not self.index.is_sound():
            raise UserError(f"{idx_path(tar)} points outside of {tar}; index the folder again")
        # record numbers of the usable samples, None where all are
        self.ok = np.flatnonzero(self.index.records["flags"] & OK) if row.num_bad else None
        self.fd = -1
        self.fd = os.open(tar, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)

    def pread(self, size: int, offset: int) -> bytes:
        """``size`` bytes at ``offset``; fewer only where the file ends."""
        data = os.pread(self.fd, size, offset)
        while len(data) < size:
            more = os.pread(self.fd, size - len(data), offset + len(data))
            if not more:
                break
            data += more
        return data


class ShardSet:
    """A folder of shards, read at random. Made by ``open_shards``.

    A ``sample_id`` is the ordinal of a usable sample over the manifest, from 0. Can be pickled and forked:
    each process opens its own files when it needs them. Safe for threads.
    """

    def __init__(self, folder: Path, rows: list[ShardRow]) -> None:
        self.folder = folder
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
        self._opened: OrderedDict[int, _OpenedShard] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_opened": None, "_by_hash": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._reset()

    def __len__(self) -> int:
        return self._ends[-1]

    def __repr__(self) -> str:
        return f"ShardSet({str(self.folder)!r}: {len(self)} samples in {len(self.rows)} shards)"

    def _open(self, shard: int) -> _OpenedShard:
        if self._pid != os.getpid():  # a forked child
            self._reset()
        opened = self._opened.pop(shard, None)
        if opened is None:
            opened = _OpenedShard(self.folder / self.shard_names[shard], self.rows[shard])
        self._opened[shard] = opened
        while len(self._opened) > OPEN_SHARDS:
            self._opened.popitem(last=False)
        return opened

    def locate(self, sample_id: int) -> tuple[int, int]:
        """Shard number and record number of a sample; IndexError outside ``0 <= sample_id < len(self)``."""
        if not 0 <= sample_id < self._ends[-1]:
            raise IndexError(f"sample {sample_id} of {len(self)} in {self.folder}")
        shard = bisect_right(self._ends, sample_id)
        row = self.rows[shard]
        record = int(sample_id) - (self._ends[shard] - row.num_ok)
        ok = self._open(shard).ok if row.num_bad else None
        return shard, record if ok is None else int(ok[record])

    def records(self, shard: int) -> NDArray[np.void]:
        """The index of a shard, dtype ``index.RECORD``, unusable samples included: offsets, sizes, ``width``,
        ``height``, ``text_len``, ``flags``, ..."""
        return self._open(shard).index.records

    def index(self, shard: int) -> Index:
        """The index of a shard with its keys."""
        return self._open(shard).index

    def read(self, sample_id: int) -> RawSample:
        """One sample, its bytes checked against the index.

        Raises DamagedSample if they differ or end early, OSError if the file system fails, IndexError for
        an id that does not exist.
        """
        shard, number = self.locate(sample_id)
        opened, name = self._open(shard), self.shard_names[shard]
        # plain numbers, read field by field only once: numpy's are ten times as slow here
        record = dict(zip(_FIELDS, opened.index.records[number].item(), strict=True))
        key = opened.index.key_at(record["key_offset"], record["key_size"])
        image, caption, meta_bytes = _members(opened, record)
        if len(image) + len(caption) + len(meta_bytes) != sum(record[name] for name in _SIZES):
            raise DamagedSample(name, key, "missing")
        if xxh3_64_intdigest(image) != record["image_xxh3"]:
            raise DamagedSample(name, key, "hash")
        if text_hash(caption, meta_bytes) != record["text_xxh3"]:
            raise DamagedSample(name, key, "caption")
        try:
            meta = load_json(meta_bytes) if meta_bytes else {}
        except ValueError as error:
            raise DamagedSample(name, key, "json") from error
        try:
            in_json = record["flags"] & CAPTION_IN_JSON
            text = meta.get(self.rows[shard].caption_key or "") if in_json else caption.decode("utf-8")
        except UnicodeDecodeError as error:
            raise DamagedSample(name, key, "caption") from error
        if not isinstance(text, str):
            raise DamagedSample(name, key, "caption")
        return RawSample(key, image, FORMATS[record["format"]], text, meta, int(sample_id), name)

    def key_of(self, sample_id: int) -> str:
        """The key of a sample, without reading it."""
        shard, record = self.locate(sample_id)
        return self._open(shard).index.key(record)

    def keys(self) -> list[str]:
        """The keys of all usable samples, in order of their ids."""
        out: list[str] = []
        for shard in range(len(self.rows)):
            opened = self._open(shard)
            keys = opened.index.keys()
            out += keys if opened.ok is None else [keys[i] for i in opened.ok]
        return out

    def find(self, key: str) -> int:
        """The id of the sample with this key; KeyError if there is none, or several, as in foreign tars."""
        if self._by_hash is None:
            parts: list[NDArray[np.uint64]] = []
            for shard in range(len(self.rows)):
                opened = self._open(shard)
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


_FIELDS = RECORD.names or ()
_SIZES = ("image_size", "caption_size", "json_size")


def _members(opened: _OpenedShard, record: Mapping[str, int]) -> tuple[bytes, bytes, bytes]:
    """Image, caption and JSON bytes of a record, shorter where the file ends before them; one read where they
    lie together, as they do."""
    image, caption, meta = record["image_offset"], record["caption_offset"], record["json_offset"]
    image_size, caption_size, meta_size = (record[name] for name in _SIZES)
    start = min(image, caption or image, meta or image)
    end = max(image + image_size, caption + caption_size, meta + meta_size)
    if end - start > image_size + caption_size + meta_size + 8192:  # far apart
        return (
            opened.pread(image_size, image),
            opened.pread(caption_size, caption),
            opened.pread(meta_size, meta),
        )
    block = opened.pread(end - start, start)

    def cut(at: int, size: int) -> bytes:
        return block[at - start : at - start + size] if size else b""

    return cut(image, image_size), cut(caption, caption_size), cut(meta, meta_size)


def open_shards(folder: str | Path) -> ShardSet:
    """Open a folder of shards; ``corpus:NAME/SPLIT`` is one of a fetched corpus.

    Raises UserError, with the mend, if there is no such folder, no ``manifest.jsonl``, a shard or index is
    missing or has another size than the manifest says, or no sample can be used.
    """
    folder = resolve_data_path(folder)
    rows = read_manifest(folder)
    for row in rows:
        _check_files(folder, row)
    if not sum(row.num_ok for row in rows):
        raise UserError(f"{folder} holds no usable sample; see `diptych data verify {folder}`")
    return ShardSet(folder, rows)


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
