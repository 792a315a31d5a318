"""Tars without an index, read from front to back: lists of them, where they come from, samples in them.

Members are grouped per tar: the half sample at the end of a cut tar is never completed from the next.
"""

import io
import itertools
import logging
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..configs.errors import UserError
from .cache import FileCache
from .image_header import EXTENSIONS, MAX_IMAGE_BYTES
from .index import MAX_TEXT_BYTES, load_json
from .remote import RemoteFile, as_url, read_ranges, shown
from .scan import split_name
from .shards import DamagedSample, RawSample
from .stores import cached_name
from .tars import Member, TarReader

__all__ = ["Opener", "Tar", "deal", "expand", "groups", "read_tar", "shuffled"]

log = logging.getLogger(__name__)

BUFFER = 2048  # samples of a worker among which the next is drawn
BUFFER_BYTES = 256 << 20  # of their images
MOST_TARS = 1_000_000
MOST_BYTES = 1 << 40  # of a tar whose size the server does not say
BLOCK = 8 << 20  # bytes of a request where nothing is kept on disk


def expand(text: str, key: str = "data.train") -> list[str]:
    """``x-{08..11}.tar`` is four names, ``{a,b}.tar`` two; several lists may be joined by ``::``.

    Raises UserError, which begins with ``key``, if there are more than a million.
    """
    names = [name for part in text.split("::") for name in itertools.islice(_expand(part), MOST_TARS + 1)]
    if len(names) > MOST_TARS:
        raise UserError(f"{key}: '{text}' names more than {MOST_TARS:,} tars")
    return names


def _expand(text: str) -> Iterator[str]:
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", text)
    if found is None:
        yield text
        return
    first, last, options = found.groups()
    width = len(first or "") if first and first.startswith("0") else 0
    inner = options.split(",") if first is None else range(int(first), int(last) + 1)
    for value in inner:
        for rest in _expand(text[found.end() :]):
            yield f"{text[: found.start()]}{value if first is None else f'{value:0{width}d}'}{rest}"


@dataclass(frozen=True)
class Tar:
    """A tar by its number in the list and its path or URL."""

    number: int
    place: str

    def __str__(self) -> str:
        return shown(self.place) if "://" in self.place else self.place

    @property
    def name(self) -> str:
        """The last part of its path."""
        return str(self).rpartition("/")[2]


class Opener:
    """Opens tars for reading from front to back; those of URLs come through the cache, if there is one."""

    def __init__(self, cache: FileCache | None) -> None:
        self._cache = cache

    def open(self, tar: Tar) -> BinaryIO:
        """Raises UserError if it cannot be had."""
        url = as_url(tar.place)
        if url is None:
            try:
                return Path(tar.place).expanduser().open("rb")
            except OSError as error:
                raise UserError(f"{tar} cannot be read: {error.strerror}; check data.train") from error
        file = RemoteFile(url)
        if self._cache is not None:
            return os.fdopen(self._cache.open(*self._request(file), exact=False), "rb")
        size, _ = file.describe()
        if size is None:
            raise UserError(f"{file}: the server does not say its size; set data.cache_gb above 0")
        return io.BufferedReader(_RangeFile(file, size), 1 << 20)

    def ahead(self, tar: Tar) -> None:
        """Have a tar brought into the cache, in the background."""
        url = as_url(tar.place)
        if url is not None and self._cache is not None:
            threading.Thread(target=self._bring, args=(RemoteFile(url), self._cache), daemon=True).start()

    def _bring(self, file: RemoteFile, cache: FileCache) -> None:
        try:
            name, size, bring = self._request(file)
            cache.bring_ahead(name, size, bring)
        except (UserError, OSError):
            pass  # who reads it meets it again, and says it

    def _request(self, file: RemoteFile) -> tuple[str, int, Any]:
        size, version = file.describe()

        def bring(path: Path) -> None:
            file.download(path, xxh3=None, most=size or MOST_BYTES, exact=size is not None)

        return cached_name(file, f"{size} {version}"), size or 0, bring


class _RangeFile(io.RawIOBase):
    """A remote file read from front to back by large range requests, each tried again where it fails."""

    def __init__(self, file: RemoteFile, size: int) -> None:
        self._file, self._left, self._at, self._block = file, size, 0, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._block and self._left:
            wanted = min(BLOCK, self._left)
            self._block = memoryview(read_ranges([(self._file, self._at, wanted)])[0])
            self._at, self._left = self._at + wanted, self._left - wanted
        count = min(len(buffer), len(self._block))
        buffer[:count], self._block = self._block[:count], self._block[count:]
        return count


def read_tar(file: BinaryIO, tar: Tar, lost: list[DamagedSample] | None) -> Iterator[RawSample]:
    """The usable samples of a tar in their order: neighbours with one key that have an image and a caption.

    ``sample_id`` is made of the tar's number and the sample's in it. What is left out is logged, and where
    the tar breaks goes to ``lost`` with the sample that may have lost members there; neither if it is None.
    """
    reader = TarReader(file, _wanted)
    seen: set[str] = set()
    left_out: list[str] = []
    key = ""
    for number, (key, members) in enumerate(groups(reader)):
        if reader.kind in ("truncated", "damaged"):
            break  # behind its last member some may be missing
        made = "a second one of its key" if key in seen else _sample(key, members, tar, number)
        seen.add(key)
        if isinstance(made, RawSample):
            yield made
        else:
            left_out.append(f"{key} ({made})")
    if lost is None:
        return
    if reader.problem is not None:
        log.warning("%s %s; the samples before are used", tar, reader.problem)
        lost.append(DamagedSample(tar.name, key, reader.kind))
    if left_out:
        named = ", ".join(left_out[:5]) + (", ..." if len(left_out) > 5 else "")
        log.warning("%s: %d samples left out: %s", tar, len(left_out), named)


def _wanted(name: str, size: int) -> bool:
    parts = split_name(name)
    if parts is None:
        return False
    most = MAX_IMAGE_BYTES if parts[1] in EXTENSIONS else MAX_TEXT_BYTES
    return size <= most and (parts[1] in EXTENSIONS or parts[1] in ("txt", "json"))


def groups(reader: TarReader) -> Iterator[tuple[str, dict[str, Member | None]]]:
    """Neighbours of one key: the member of each extension, None where there are two. The last group comes
    when the reader knows whether the tar breaks behind it."""
    current: str | None = None
    group: dict[str, Member | None] = {}
    for member in reader:
        parts = split_name(member.name)
        if parts is None:
            continue
        if parts[0] != current and current is not None:
            yield current, group
            group = {}
        current = parts[0]
        group[parts[1]] = None if parts[1] in group else member
    if current is not None:
        yield current, group


def _sample(key: str, members: dict[str, Member | None], tar: Tar, number: int) -> RawSample | str:
    """The sample, or why there is none."""
    if doubled := [name for name, member in members.items() if member is None]:
        return f"it has two members '.{doubled[0]}'"
    data = {name: member.data for name, member in members.items() if member is not None}
    extension = next((name for name in EXTENSIONS if name in data), None)
    image, caption, meta = data.get(extension or ""), data.get("txt"), data.get("json")
    if extension is None or image is None:
        return "no image" if extension is None else "its image is too large"
    if caption is None:
        return "no '.txt', or too large a one"
    try:
        text = caption.decode("utf-8")
        values = load_json(meta) if meta else {}
    except ValueError:  # UnicodeDecodeError is one
        return "text that cannot be read"
    if not text.strip():
        return "a blank caption"
    extension = "jpg" if extension == "jpeg" else extension
    return RawSample(key, image, extension, text, values, (tar.number << 32) + number, tar.name)


def deal(tars: Sequence[Tar], consumer: int, consumers: int) -> list[tuple[Tar, int, int]]:
    """A consumer's tars; of each it takes every ``parts``-th sample from ``part`` on. All consumers together
    have every sample once: tars that are too few to go round are read by several, who share their samples."""
    whole = len(tars) // consumers * consumers
    mine = [(tar, 0, 1) for tar in tars[consumer:whole:consumers]]
    if rest := tars[whole:]:
        which = consumer % len(rest)
        sharing = range(which, consumers, len(rest))
        mine.append((rest[which], consumer // len(rest), len(sharing)))
    return mine


def shuffled(samples: Iterator[RawSample], rng: np.random.Generator) -> Iterator[RawSample]:
    """All samples; each next one is drawn from the ``BUFFER`` that are ahead."""
    buffer: list[RawSample] = []
    held = 0
    for sample in samples:
        buffer.append(sample)
        held += len(sample.image)
        while len(buffer) >= BUFFER or (held > BUFFER_BYTES and len(buffer) > 1):
            chosen = _draw(buffer, rng)
            held -= len(chosen.image)
            yield chosen
    while buffer:
        yield _draw(buffer, rng)


def _draw(buffer: list[RawSample], rng: np.random.Generator) -> RawSample:
    place = int(rng.random() * len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()
