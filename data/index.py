"""The files beside the tars: ``00000.idx``, where each sample lies, and ``manifest.jsonl``, the shards.

``NAME.idx`` is little-endian: a 64-byte header (``HEADER``), one fixed-width record per sample (``RECORD``),
and the samples' keys as UTF-8, one after the other. Samples that cannot be used keep their record, without
the flag ``OK`` and with a reason.
"""

import hashlib
import json
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from .image_header import FORMATS, MAX_IMAGE_BYTES

__all__ = [
    "CAPTION_IN_JSON",
    "HEADER",
    "MANIFEST",
    "MAX_TEXT_BYTES",
    "OK",
    "REASONS",
    "RECORD",
    "ROTATED",
    "SIZES",
    "Index",
    "Record",
    "ShardRow",
    "fingerprint",
    "idx_path",
    "index_bytes",
    "key_hash",
    "load_json",
    "make_row",
    "map_index",
    "parse_manifest",
    "read_manifest",
    "text_hash",
    "view_index",
    "write_manifest",
]

MAGIC, VERSION = b"DIPTYIDX", 1
MANIFEST = "manifest.jsonl"
SIZES = "sizes.json"
MAX_TEXT_BYTES = 16 * 1024 * 1024
"""Captions and JSON with more bytes are refused before reading."""

HEADER = np.dtype(
    [
        ("magic", "S8"),
        ("version", "<u4"),
        ("record_bytes", "<u4"),
        ("shard_bytes", "<u8"),
        ("shard_xxh3", "<u8"),
        ("n", "<u8"),
        ("n_ok", "<u8"),
        ("key_bytes", "<u8"),
        ("reserved", "<u8"),
    ]
)
RECORD = np.dtype(
    [
        ("image_offset", "<u8"),
        ("caption_offset", "<u8"),
        ("json_offset", "<u8"),
        ("image_xxh3", "<u8"),  # of the image's bytes
        ("text_xxh3", "<u8"),  # of the caption's bytes followed by the JSON's
        ("key_hash", "<u8"),
        ("image_size", "<u4"),  # bytes; 0: the sample has no such member
        ("caption_size", "<u4"),
        ("json_size", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("key_offset", "<u4"),  # from the first key
        ("text_len", "<u2"),  # characters, at most 65535
        ("key_size", "<u2"),
        ("flags", "<u2"),
        ("format", "u1"),  # image_header.FORMATS
        ("reason", "u1"),  # REASONS
    ]
)
_RECORD = struct.Struct("<6Q6I3H2B")  # the same, for one record at a time: ten times as fast as numpy


class Record(NamedTuple):
    """One record as plain numbers; the fields are RECORD's."""

    image_offset: int
    caption_offset: int
    json_offset: int
    image_xxh3: int
    text_xxh3: int
    key_hash: int
    image_size: int
    caption_size: int
    json_size: int
    width: int
    height: int
    key_offset: int
    text_len: int
    key_size: int
    flags: int
    format: int
    reason: int


OK, CAPTION_IN_JSON, ROTATED = 1, 2, 4
"""Flags: the sample can be used; its caption is a key of its JSON; EXIF asks to turn the picture."""
REASONS = ("", "missing", "caption", "json", "decode", "size", "truncated", "duplicate")
"""Why a sample cannot be used, by the number that the index stores."""


def key_hash(key: str) -> int:
    """xxh3_64 of a key's UTF-8."""
    return xxh3_64_intdigest(key.encode("utf-8", "surrogateescape"))


def text_hash(caption: bytes, meta: bytes) -> int:
    """The hash that a record keeps of its caption's and its JSON's bytes."""
    return xxh3_64_intdigest(caption + meta)


def load_json(data: bytes) -> dict[str, Any]:
    """A sample's JSON; ValueError if it is no object."""
    try:
        value = json.loads(data.decode("utf-8"))  # json would guess the encoding, at length
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict):
        raise ValueError("it is no object")
    return cast("dict[str, Any]", value)


def idx_path(shard: Path) -> Path:
    """``00000.idx`` for ``00000.tar``."""
    return shard.with_suffix(".idx")


def index_bytes(shard_bytes: int, shard_xxh3: int, records: NDArray[np.void], keys: Sequence[str]) -> bytes:
    """The content of an ``.idx``. ``records`` has dtype RECORD; ``keys`` fill in its key fields."""
    encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
    sizes = np.array([len(key) for key in encoded], dtype=np.int64)
    records = records.copy()
    records["key_size"] = sizes
    records["key_offset"] = np.cumsum(sizes) - sizes
    records["key_hash"] = [xxh3_64_intdigest(key) for key in encoded]
    header = np.zeros((), dtype=HEADER)
    header["magic"], header["version"], header["record_bytes"] = MAGIC, VERSION, RECORD.itemsize
    header["shard_bytes"], header["shard_xxh3"] = shard_bytes, shard_xxh3
    header["n"], header["n_ok"] = len(records), int(np.count_nonzero(records["flags"] & OK))
    header["key_bytes"] = int(sizes.sum())
    return header.tobytes() + records.tobytes() + b"".join(encoded)


@dataclass(frozen=True)
class Index:
    """A shard's index, memory-mapped."""

    raw: NDArray[np.uint8]
    header: np.void
    records: NDArray[np.void]
    key_block: NDArray[np.uint8]

    def belongs_to(self, row: "ShardRow") -> bool:
        """Whether it is, byte for byte, the index that a manifest's row names, and has as many samples."""
        usable = int(np.count_nonzero(self.records["flags"] & OK))
        counts = (usable, len(self.records) - usable) == (row.num_ok, row.num_bad)
        return counts and xxh3_64_hexdigest(self.raw.data) == row.idx_xxh3

    def is_sound(self) -> bool:
        """Whether all that the usable records point to lies inside the shard and is of a size to be read; an
        index from elsewhere may claim anything."""
        usable = self.records[(self.records["flags"] & OK) > 0]
        end = np.uint64(self.header["shard_bytes"])
        sound = (usable["image_size"] > 0) & (usable["format"] > 0) & (usable["format"] < len(FORMATS))
        for part, most in (("image", MAX_IMAGE_BYTES), ("caption", MAX_TEXT_BYTES), ("json", MAX_TEXT_BYTES)):
            offset, size = usable[f"{part}_offset"], usable[f"{part}_size"]
            sound &= (size <= most) & (offset <= end) & (size <= end - np.minimum(offset, end))
        return bool(sound.all())

    def record(self, number: int) -> Record:
        """Record ``number`` as plain numbers; it must be one that there is."""
        return Record._make(_RECORD.unpack_from(self.raw.data, HEADER.itemsize + number * RECORD.itemsize))

    def key(self, record: int) -> str:
        """The key of record number ``record``."""
        row = self.record(record)
        return self.key_at(row.key_offset, row.key_size)

    def key_at(self, offset: int, size: int) -> str:
        """The key in these bytes of the key block."""
        return self.key_block[offset : offset + size].tobytes().decode("utf-8", "surrogateescape")

    def keys(self) -> list[str]:
        """The keys of all records, the unusable ones too."""
        block = self.key_block.tobytes()
        starts, sizes = self.records["key_offset"].tolist(), self.records["key_size"].tolist()
        return [
            block[a : a + n].decode("utf-8", "surrogateescape") for a, n in zip(starts, sizes, strict=True)
        ]


def map_index(path: Path) -> Index:
    """Map an ``.idx``; UserError if it is missing or not whole."""
    mend = f"index the folder again with `diptych data index {path.parent} --overwrite`"
    try:
        raw = np.asarray(np.memmap(path, dtype=np.uint8, mode="r"))  # the plain view is faster
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing; {mend}") from error
    except ValueError as error:  # empty file
        raise UserError(f"{path} is empty; {mend}") from error
    return view_index(raw, str(path), mend)


def view_index(raw: NDArray[np.uint8], name: str, mend: str) -> Index:
    """The index that these bytes are. UserError with ``name`` and ``mend`` if they are none, or not whole."""
    if len(raw) < HEADER.itemsize:
        raise UserError(f"{name} is no index of shards; {mend}")
    header = raw[: HEADER.itemsize].view(HEADER)[0]
    if header["magic"] != MAGIC:
        raise UserError(f"{name} is no index of shards; {mend}")
    if header["version"] != VERSION or header["record_bytes"] != RECORD.itemsize:
        raise UserError(f"{name} has version {header['version']}, this program reads {VERSION}; {mend}")
    end = HEADER.itemsize + int(header["n"]) * RECORD.itemsize
    if len(raw) != end + int(header["key_bytes"]):
        raise UserError(f"{name} is cut short; {mend}")
    return Index(raw, header, raw[HEADER.itemsize : end].view(RECORD), raw[end:])


@dataclass(frozen=True)
class ShardRow:
    """One line of ``manifest.jsonl``. Hashes are xxh3_64 in 16 hexadecimal digits. ``foreign``: the tar was
    indexed in place; ``caption_key``: the key of the JSON that holds its captions, None for ``.txt``."""

    shard: str
    bytes: int
    num_ok: int
    num_bad: int
    xxh3: str
    idx_xxh3: str
    foreign: bool = False
    caption_key: str | None = None

    def to_json(self) -> str:
        """The row as canonical JSON."""
        given = {
            name: value for name, value in vars(self).items() if value is not False and value is not None
        }
        return json.dumps(given, ensure_ascii=False, separators=(", ", ": "))


def make_row(name: str, idx: bytes, *, foreign: bool = False, caption_key: str | None = None) -> ShardRow:
    """The manifest's row for a shard, from the bytes of its index."""
    header = np.frombuffer(idx, dtype=HEADER, count=1)[0]
    n, n_ok = int(header["n"]), int(header["n_ok"])
    digest = f"{int(header['shard_xxh3']):016x}"
    size = int(header["shard_bytes"])
    return ShardRow(name, size, n_ok, n - n_ok, digest, xxh3_64_hexdigest(idx), foreign, caption_key)


def fingerprint(rows: Sequence[ShardRow]) -> str:
    """SHA-256 of the canonical manifest: equal for equal shards and indexes, in whatever folder."""
    lines = [replace(row, foreign=False).to_json() for row in rows]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def write_manifest(folder: Path, rows: Sequence[ShardRow]) -> None:
    """Write ``sizes.json`` (open_clip reads it) and then ``manifest.jsonl``."""
    atomic_write_text(folder / SIZES, json.dumps({row.shard: row.num_ok for row in rows}, indent=0) + "\n")
    atomic_write_text(folder / MANIFEST, "".join(row.to_json() + "\n" for row in rows))


def read_manifest(folder: Path) -> list[ShardRow]:
    """The rows of a folder's manifest; UserError where there is none or a line is not as it should be."""
    path = folder / MANIFEST
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a folder of shards")
    if not path.is_file():
        if any(folder.glob("*.tar")):
            raise UserError(f"{folder} has tars but no {MANIFEST}; write it: `diptych data index {folder}`")
        raise UserError(
            f"{folder} has no {MANIFEST}; make shards with `diptych data build TABLE --out {folder}`"
        )
    mend = f"write it again with `diptych data index {folder} --overwrite`"
    return parse_manifest(path.read_text(encoding="utf-8", errors="replace"), str(path), mend)


def parse_manifest(text: str, name: str, mend: str) -> list[ShardRow]:
    """The rows of a manifest. UserError with ``name`` and ``mend`` where a line is not as it should be."""
    rows: list[ShardRow] = []
    for number, line in enumerate(text.removesuffix("\n").split("\n") if text else (), 1):
        try:
            rows.append(_row(json.loads(line)))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{name}: line {number} is no row of a manifest ({error}); {mend}") from error
    if not rows:
        raise UserError(f"{name} is empty; {mend}")
    if len({row.shard for row in rows}) != len(rows):
        raise UserError(f"{name} lists a shard twice; {mend}")
    return rows


def _row(data: Any) -> ShardRow:
    row = ShardRow(**data)
    digests = all(re.fullmatch("[0-9a-f]{16}", digest) for digest in (row.xxh3, row.idx_xxh3))
    counts = all(type(n) is int and 0 <= n < 1 << 48 for n in (row.bytes, row.num_ok, row.num_bad))
    key = type(row.caption_key) in (str, type(None))
    if not (digests and counts and key and type(row.foreign) is bool):
        raise ValueError("a field has the wrong type")
    # a name is one path component: a manifest cannot lead out of its folder
    if not re.fullmatch(r"[^/\\\0]+\.tar", row.shard):
        raise ValueError(f"'{row.shard}' is no shard name")
    return row
