"""What a tar holds, sample by sample, read once: the ground that indexing and verifying share."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from xxhash import xxh3_64_intdigest

from .image_header import EXTENSIONS, FORMATS, MAX_IMAGE_BYTES, MAX_PIXELS, HeaderError, read_header
from .index import (
    CAPTION_IN_JSON,
    MAX_TEXT_BYTES,
    OK,
    REASONS,
    RECORD,
    ROTATED,
    load_json,
    text_hash,
)
from .tars import Member, TarReader

__all__ = ["Finding", "ShardScan", "scan_shard"]

TEXTS = ("txt", "json")
MAX_KEY = 4096  # characters; the index counts a key's bytes in 16 bits


@dataclass(frozen=True)
class Finding:
    """Something wrong. ``key`` is empty where it is the whole shard; ``reason`` is one word, ``detail`` the
    rest of the sentence."""

    shard: str
    key: str
    reason: str
    detail: str

    def __str__(self) -> str:
        return f"{self.shard}: {f'sample {self.key!r}: ' if self.key else ''}{self.reason}: {self.detail}"


@dataclass
class ShardScan:
    """The samples of one tar in their order, and what is wrong with them."""

    size: int
    xxh3: int
    records: NDArray[np.void]
    keys: list[str]
    findings: list[Finding] = field(default_factory=list[Finding])
    json_keys: dict[str, int] = field(default_factory=dict[str, int])
    """How many samples have text under each key of their JSON; of samples without a caption only."""


def split_name(name: str) -> tuple[str, str] | None:
    """Key and extension of a member, as webdataset splits them: the key ends at the first dot of the last
    path component, the extension is in lower case. None for members that are no part of a sample."""
    found = re.fullmatch(r"((?:.*/|)[^.]+)[.]([^/]*)", name)
    # `__name__` are members about the tar itself
    if found is None or re.match(r"__[^/]*__($|/)", name):
        return None
    return found[1], found[2].lower()


Check = Callable[[bytes], tuple[str, str] | None]
"""Looks at an image: None, or a reason and its detail."""


def scan_shard(
    path: Path,
    *,
    caption_key: str | None = None,
    max_pixels: int = MAX_PIXELS,
    max_image_bytes: int = MAX_IMAGE_BYTES,
    check_image: Check | None = None,
) -> ShardScan:
    """Read a tar once and describe its samples: neighbours with one key, as webdataset groups them.

    ``caption_key``: captions are under this key of the JSON, else in ``.txt``. Images with more pixels than
    ``max_pixels`` or more bytes than ``max_image_bytes`` cannot be used. ``check_image``: a further look at
    each image, decoding for instance. A sample that cannot be used gets a finding and a record
    without the flag OK.
    """
    scanner = _Scanner(path.name, caption_key, max_pixels, check_image)
    with path.open("rb") as file:
        reader = TarReader(file, partial(_wanted, max_image_bytes))
        for key, members in _groups(reader):
            # the last sample before a break may lack members that are lost
            scanner.add(key, members, broken=reader.kind in ("truncated", "damaged"))
    if reader.problem is not None:
        scanner.findings.insert(0, Finding(path.name, "", reader.kind, f"the tar {reader.problem}"))
    records = np.stack(scanner.records) if scanner.records else np.zeros(0, dtype=RECORD)
    return ShardScan(reader.size, reader.xxh3, records, scanner.keys, scanner.findings, scanner.json_keys)


def _wanted(max_image_bytes: int, name: str, size: int) -> bool:
    parts = split_name(name)
    if parts is None:
        return False
    if parts[1] in EXTENSIONS:
        return size <= max_image_bytes
    return parts[1] in TEXTS and size <= MAX_TEXT_BYTES


def _groups(reader: TarReader) -> Iterator[tuple[str, list[Member]]]:
    """Members by key; a group is given once the next key begins or the tar has ended."""
    current: str | None = None
    group: list[Member] = []
    for member in reader:
        parts = split_name(member.name)
        if parts is None:
            continue
        if parts[0] != current and current is not None:
            yield current, group
            group = []
        current = parts[0]
        group.append(member)
    if current is not None:
        yield current, group


class _Scanner:
    """Makes records of one shard's samples."""

    def __init__(
        self, shard: str, caption_key: str | None, max_pixels: int, check_image: Check | None
    ) -> None:
        self.shard, self.caption_key = shard, caption_key
        self.max_pixels, self.check_image = max_pixels, check_image
        self.records, self.keys = list[np.ndarray](), list[str]()
        self.findings, self.json_keys = list[Finding](), dict[str, int]()
        self._seen: set[str] = set()

    def add(self, key: str, members: list[Member], *, broken: bool) -> None:
        """Record one sample; ``broken``: the tar breaks behind it."""
        record = np.zeros((), dtype=RECORD)
        problem: tuple[str, str] | None
        try:
            problem = self._fill(record, members)
        except (ValueError, RecursionError) as error:
            problem = ("json", str(error))
        if len(key) > MAX_KEY:
            problem = ("size", f"its name has {len(key)} characters")
            key = key[:MAX_KEY]
        if broken:
            problem = ("truncated", "the tar breaks behind its last member that is whole")
        elif key in self._seen:
            problem = ("duplicate", "the shard has a sample of this key before")
        self._seen.add(key)
        if problem is None:
            record["flags"] |= OK
        else:
            record["reason"] = REASONS.index(problem[0])
            self.findings.append(Finding(self.shard, key, *problem))
        self.records.append(record)
        self.keys.append(key)

    def _fill(self, record: np.ndarray, members: list[Member]) -> tuple[str, str] | None:
        """Fill in the record as far as it goes; the first problem, or None."""
        by_extension: dict[str, Member] = {}
        for member in members:
            parts = split_name(member.name)
            assert parts is not None
            if parts[1] in by_extension:
                return "duplicate", f"it has two members '.{parts[1]}'"
            by_extension[parts[1]] = member
        image = next((by_extension[e] for e in EXTENSIONS if e in by_extension), None)
        text, meta = by_extension.get("txt"), by_extension.get("json")
        if self.caption_key is not None:
            text = None
        for name, member in (("image", image), ("caption", text), ("json", meta)):
            if member is not None:
                if member.data is None:
                    return "size", f"its {name} has {member.size} bytes"
                record[f"{name}_offset"], record[f"{name}_size"] = member.offset, member.size
        if image is None or image.data is None:
            return "missing", "it has no image"
        record["image_xxh3"] = xxh3_64_intdigest(image.data)
        record["text_xxh3"] = text_hash((text and text.data) or b"", (meta and meta.data) or b"")
        return self._image(record, image.data) or self._caption(record, text, meta)

    def _image(self, record: np.ndarray, data: bytes) -> tuple[str, str] | None:
        try:
            header = read_header(data)
        except HeaderError as error:
            return "decode", str(error)
        record["width"], record["height"] = header.width, header.height
        record["format"] = FORMATS.index(header.format)
        record["flags"] |= ROTATED if header.rotated else 0
        if header.width * header.height > self.max_pixels:
            return "size", f"{header.width} x {header.height} pixels"
        return self.check_image(data) if self.check_image is not None else None

    def _caption(
        self, record: np.ndarray, text: Member | None, meta: Member | None
    ) -> tuple[str, str] | None:
        try:
            values = load_json(meta.data) if meta is not None and meta.data is not None else {}
        except ValueError as error:
            return "json", f"its JSON cannot be read: {error}"
        if self.caption_key is not None:
            record["flags"] |= CAPTION_IN_JSON
            caption = values.get(self.caption_key)
            where = f"key '{self.caption_key}' of its JSON"
        elif text is not None and text.data is not None:
            try:
                caption = text.data.decode("utf-8")
            except UnicodeDecodeError:
                return "caption", "its caption is not UTF-8"
            where = "caption"
        else:
            caption, where = None, "'.txt'"
        if not isinstance(caption, str):
            self._note_json(values)
            return "caption", f"it has no text in {where}" if self.caption_key else "it has no '.txt'"
        if not caption.strip():
            return "caption", f"its {where} is blank"
        record["text_len"] = min(len(caption), 65535)
        return None

    def _note_json(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, str) and len(self.json_keys) < 100:
                self.json_keys[name] = self.json_keys.get(name, 0) + 1
