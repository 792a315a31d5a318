"""Tars block by block: headers written the same way every time, and a reader that says where one breaks.

``tarfile`` and the readers built on it end silently at a damaged header and at a cut between two members.
This reader tells these ends from a good one, and it hashes what it passes.
"""

import re
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from xxhash import xxh3_64

__all__ = ["BLOCK", "END", "MAX_NAME_BYTES", "Member", "TarReader", "member_header", "padding"]

BLOCK = 512
END = bytes(2 * BLOCK)
"""The two zero blocks that close a tar."""
MAX_NAME_BYTES = 100
"""Longest member name that a USTAR header holds in one field."""
CHUNK = 1 << 20
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
MAX_EXTENDED_HEADER = 1 << 20  # a name that takes more is an attack


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a regular file of ``size`` bytes: mode 0644, owner 0, time 0.

    Raises ValueError if ``name`` is longer than ``MAX_NAME_BYTES`` in UTF-8 or ``size`` is 8 GiB or more.
    """
    if len(name.encode("utf-8")) > MAX_NAME_BYTES:
        raise ValueError(f"member name '{name}' is longer than {MAX_NAME_BYTES} bytes")
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def padding(size: int, block: int = BLOCK) -> bytes:
    """The zeros that fill ``size`` bytes up to whole blocks."""
    return bytes(-size % block)


@dataclass(frozen=True)
class Member:
    """A regular file in a tar. ``data``: its bytes, None if they were not wanted."""

    name: str
    offset: int
    size: int
    data: bytes | None


class _Break(Exception):
    """Where a tar breaks: how, in one word, and the sentence's rest."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(text)
        self.kind = kind


class TarReader:
    """One pass over a tar, in USTAR, GNU or PAX format::

        reader = TarReader(file, wanted=lambda name, size: name.endswith(".png"))
        for member in reader: ...
        reader.problem    # None, or why and where the tar breaks

    ``wanted`` says which members' bytes are read into memory. When the loop is over the whole file has been
    read, what stands behind a break too: ``size`` and ``xxh3`` are those of the file. Links, folders and
    devices are passed over. After a break there are no more members.
    """

    def __init__(self, file: BinaryIO, wanted: Callable[[str, int], bool]) -> None:
        self._file, self._wanted = file, wanted
        self._hash = xxh3_64()
        self.size = 0
        self.problem: str | None = None
        self.kind = ""
        """How the tar breaks: "truncated" (it ends too early), "damaged" (a header is none) or "trailing"
        (all members are whole, more bytes follow); empty where it does not."""

    @property
    def xxh3(self) -> int:
        """xxh3_64 of what was read."""
        return self._hash.intdigest()

    def __iter__(self) -> Iterator[Member]:
        try:
            yield from self._members()
        except _Break as found:
            self.kind, self.problem = found.kind, str(found)
        while self._read(CHUNK):
            pass

    def _read(self, size: int) -> bytes:
        data = self._file.read(size)
        self._hash.update(data)
        self.size += len(data)
        return data

    def _exactly(self, size: int, what: str) -> bytes:
        data = self._read(size)
        if len(data) < size:
            raise _Break("truncated", f"ends at byte {self.size} in {what}")
        return data

    def _skip(self, size: int, what: str) -> None:
        while size:
            size -= len(self._exactly(min(size, CHUNK), what))

    def _members(self) -> Iterator[Member]:
        name: str | None = None  # from an extended header, for the next member
        size: int | None = None
        while True:
            block = self._read(BLOCK)
            if not block:
                raise _Break("truncated", f"ends at byte {self.size} without an end mark")
            if len(block) < BLOCK:
                raise _Break("truncated", f"ends at byte {self.size} in a header")
            if not any(block):
                return self._after_end()
            if self.size == BLOCK and block.startswith(COMPRESSED):
                raise _Break("damaged", "is compressed; unpack it")
            own_name, own_size, kind = self._parse(block)
            if kind in b"LKxg":
                extended = self._extended(own_size)
                if kind in b"LK":
                    name = _text(extended) if kind == b"L" else name
                else:
                    given = _pax(extended)
                    # a global header speaks of all members, but nobody gives all of them one name or size
                    if kind == b"x":
                        name = given.get("path", name)
                        if re.fullmatch("[0-9]{1,18}", given.get("size", "")):
                            size = int(given["size"])
                        if any(key.startswith("GNU.sparse.") for key in given):
                            raise self._sparse(name or "")
                continue
            member = self._member(name or own_name, own_size if size is None else size, kind)
            name = size = None
            if member is not None:
                yield member

    def _member(self, name: str, size: int, kind: bytes) -> Member | None:
        """Read or pass over a member; None if it is no regular file."""
        what = f"member '{name}'"
        if kind == b"S":
            raise self._sparse(name)
        if kind in b"123456" or name.endswith("/"):  # links, devices, folders: no bytes follow
            return None
        offset, data = self.size, None
        if kind in b"07\0" and self._wanted(name, size):
            data = self._exactly(size, what)
        else:
            self._skip(size, what)
        self._exactly(-size % BLOCK, what)
        return Member(name, offset, size, data) if kind in b"07\0" else None

    def _sparse(self, name: str) -> _Break:
        return _Break(
            "damaged", f"has a sparse member '{name}' before byte {self.size}, which is not read here"
        )

    def _parse(self, block: bytes) -> tuple[str, int, bytes]:
        """Name, size and type of a header block, its checksum proven."""
        at = self.size - BLOCK
        try:
            stored = _number(block[148:156])
            size = _number(block[124:136])
        except ValueError as error:
            raise _Break("damaged", f"has no header at byte {at}") from error
        if stored != sum(block) - sum(block[148:156]) + 8 * 32:
            raise _Break("damaged", f"has a damaged header at byte {at}")
        if size < 0:
            raise _Break("damaged", f"has a negative size at byte {at}")
        name = _text(block[:100])
        if block[257:263] == b"ustar\0" and block[345] and block[156:157] not in (b"L", b"K", b"x", b"g"):
            name = f"{_text(block[345:500])}/{name}"
        return name, size, block[156:157]

    def _extended(self, size: int) -> bytes:
        if size > MAX_EXTENDED_HEADER:
            raise _Break("damaged", f"has an extended header of {size} bytes at byte {self.size}")
        data = self._exactly(size, "an extended header")
        self._exactly(-size % BLOCK, "an extended header")
        return data

    def _after_end(self) -> None:
        """Behind the end mark only zeros may stand; anything else would be lost to every reader."""
        while block := self._read(CHUNK):
            if block.count(0) != len(block):
                raise _Break("trailing", f"has data behind its end mark, before byte {self.size}")


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _number(field: bytes) -> int:
    """Octal digits, or GNU's binary numbers for large sizes."""
    if field[0] in (0o200, 0o377):
        value = int.from_bytes(field[1:], "big")
        return value if field[0] == 0o200 else value - 256 ** (len(field) - 1)
    digits = field.split(b"\0", 1)[0].strip()
    if digits and not set(digits) <= set(b"01234567"):
        raise ValueError(field)
    return int(digits or b"0", 8)


def _pax(data: bytes) -> dict[str, str]:
    """``"length key=value\\n"`` records; what does not follow the form ends them."""
    out: dict[str, str] = {}
    while data:
        digits, _, _ = data.partition(b" ")
        if not digits.isdigit() or not 0 < (length := int(digits[:9])) <= len(data):
            raise _Break("damaged", "has a damaged extended header")
        key, _, value = data[len(digits) + 1 : length - 1].partition(b"=")
        out[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        data = data[length:]
    return out
