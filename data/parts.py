"""A part of a build: some rows of a source made into pieces of shards, by whichever process takes it.

A part is finished when its ``.json`` is there. It names the rows, the settings and the image files that it
was made of, so that a later build of the same takes it over and one of something else makes it anew.
"""

import json
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest, xxh3_128, xxh3_128_hexdigest

from ..configs.files import atomic_write_text
from .image_header import HeaderError, read_header
from .index import idx_path
from .recode import Recode, recode
from .scanning import USUAL, Limits
from .sources import BadRow, Row, Span, read_inside
from .verify import decode_problem
from .writer import OpenShard, RefusedSample, check_key, encode_sample

__all__ = ["Made", "Part", "PartRow", "Piece", "Settings", "make_part"]

END_BYTES = 1 << 30  # a piece that has grown to this is closed


@dataclass(frozen=True)
class Settings:
    """What all parts of a build have in common. ``staging``: where the pieces go."""

    staging: Path
    val_fraction: float = 0.0
    decode: bool = True
    limits: Limits = USUAL
    recode: Recode = Recode()  # noqa: RUF009  frozen

    @property
    def folders(self) -> tuple[str, ...]:
        """The folders of shards that are made."""
        return ("train", "val") if self.val_fraction else (".",)

    def to_json(self) -> dict[str, Any]:
        """What the samples depend on."""
        return {
            "val_fraction": self.val_fraction,
            "decode": self.decode,
            **vars(self.limits),
            **vars(self.recode),
        }


@dataclass(frozen=True)
class PartRow:
    """A row, where it comes from (number of the source, its number there), and its key."""

    source: int
    number: int
    key: str
    row: Row | BadRow


@dataclass(frozen=True)
class Part:
    """Rows that are made into pieces together. ``taken``: folder and key of samples that another part has."""

    number: int
    rows: list[PartRow]
    taken: frozenset[tuple[str, str]] = frozenset()


@dataclass(frozen=True)
class Piece:
    """Samples of one part for one folder: a tar and its index in the staging folder. ``payload``: where its
    last member ends."""

    folder: str
    name: str
    samples: int
    payload: int


@dataclass
class Made:
    """What became of a part's rows."""

    number: int
    rows: int
    bad: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Rows left out: number of the source, row, reason, detail."""
    pieces: list[Piece] = field(default_factory=list[Piece])
    kept: bool = False
    """It was finished by an earlier run."""
    anew: bool = False
    """An earlier run had finished it for other rows or settings."""


def make_part(settings: Settings, part: Part) -> Made:
    """Make a part, or find that it is made."""
    record = settings.staging / f"{part.number:08d}.json"
    identity = {"rows": _identity(settings, part), "files": _files(part)}
    found = _stored(record, settings.staging)
    if found is not None and found[0] == identity:
        return replace(found[1], kept=True)
    for old in settings.staging.glob(f"{part.number:08d}.*"):
        old.unlink()
    made = Made(part.number, len(part.rows), anew=found is not None)
    with ExitStack() as stack:
        pieces = {name: _Pieces(stack, settings.staging, part.number, name) for name in settings.folders}
        for row in part.rows:
            try:
                _add(settings, part, row, pieces)
            except (BadRow, RefusedSample) as bad:
                detail = bad.detail if isinstance(bad, BadRow) else str(bad)
                made.bad.append(
                    {"source": row.source, "row": row.number, "reason": bad.reason, "detail": detail}
                )
        for each in pieces.values():
            made.pieces += each.finish()
    content = {"rows": made.rows, "bad": made.bad, "pieces": [vars(piece) for piece in made.pieces]}
    atomic_write_text(record, json.dumps({"identity": identity, **content}))
    return made


def _stored(record: Path, staging: Path) -> tuple[Any, Made] | None:
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
        pieces = [Piece(**piece) for piece in data["pieces"]]
        made = Made(int(record.stem), data["rows"], data["bad"], pieces)
        whole = all(
            (staging / piece.name).stat().st_size >= piece.payload
            and idx_path(staging / piece.name).is_file()
            for piece in pieces
        )
        return (data["identity"], made) if whole else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _identity(settings: Settings, part: Part) -> str:
    """A hash of all that the samples are made of, but for image files."""
    digest = xxh3_128(json.dumps([settings.to_json(), sorted(part.taken)]).encode())
    for row in part.rows:
        content: list[Any] = [row.source, row.number, row.key]
        if isinstance(row.row, BadRow):
            content += [row.row.reason, row.row.detail]
        else:
            image = row.row.image
            if isinstance(image, bytes):
                content.append(xxh3_128_hexdigest(image))
            else:
                content.append(str(image) if isinstance(image, str) else [image.size, image.xxh3])
            content += [row.row.caption, row.row.meta]
        digest.update(json.dumps(content).encode())
    return digest.hexdigest()


def _files(part: Part) -> str:
    """A hash of the sizes and times of the image files."""
    digest = xxh3_128()
    for row in part.rows:
        if isinstance(row.row, Row) and isinstance(row.row.image, str):
            try:
                state = os.stat(row.row.root / row.row.image)
                digest.update(f"{state.st_size} {state.st_mtime_ns} ".encode())
            except (OSError, ValueError):
                digest.update(b"none ")
    return digest.hexdigest()


class _Pieces:
    """The pieces of a part for one folder."""

    def __init__(self, stack: ExitStack, staging: Path, number: int, folder: str) -> None:
        self._stack, self._staging, self._number, self.folder = stack, staging, number, folder
        self._open: OpenShard | None = None
        self._done: list[Piece] = []
        self.keys: set[str] = set()

    def add(self, key: str, image: bytes, row: Row) -> None:
        check_key(key)
        if key in self.keys:
            raise RefusedSample(key, "duplicate", f"key '{key}' is there twice; keys must be unique")
        members, record = encode_sample(key, image, read_header(image).format, row.caption, row.meta)
        if self._open is None:
            name = f"{self._number:08d}.{self.folder.strip('.') or 'all'}.{len(self._done)}.piece"
            self._open = OpenShard(self._staging / name)
            self._stack.callback(self._open.file.close)
        self._open.add(key, members, record)
        self.keys.add(key)
        if self._open.size >= END_BYTES:
            self._close()

    def _close(self) -> None:
        if self._open is not None:
            payload, samples = self._open.size, len(self._open.keys)
            self._open.finish()
            self._done.append(Piece(self.folder, self._open.path.name, samples, payload))
            self._open = None

    def finish(self) -> Iterator[Piece]:
        self._close()
        yield from self._done


def _add(settings: Settings, part: Part, row: PartRow, pieces: dict[str, _Pieces]) -> None:
    """Write one sample. Raises BadRow or RefusedSample."""
    if isinstance(row.row, BadRow):
        raise row.row
    source = _read(row.row, settings.limits.max_image_bytes)
    image = _image(source, settings)
    # by the source's bytes: the same ones at any size and quality
    held_back = xxh3_64_intdigest(source) < settings.val_fraction * 2**64
    folder = settings.folders[-1] if held_back else settings.folders[0]
    if (folder, row.key) in part.taken:
        raise BadRow("duplicate", f"key '{row.key}' is there twice; keys must be unique")
    pieces[folder].add(row.key, image, row.row)


def _image(data: bytes, settings: Settings) -> bytes:
    """The image as it is stored, looked at. Raises BadRow."""
    limits = settings.limits
    if len(data) > limits.max_image_bytes:
        raise BadRow("size", f"the image has {len(data)} bytes")
    try:
        header = read_header(data)
    except HeaderError as error:
        raise BadRow("decode", f"cannot read the image: {error}") from error
    if header.width * header.height > limits.max_pixels:
        raise BadRow("size", f"the image has {header.width} x {header.height} pixels")
    try:
        stored = recode(data, header, settings.recode, max_pixels=limits.max_pixels)
    except ValueError as error:  # DecodeError is one
        raise BadRow("decode", str(error)) from error
    # what was written anew has been decoded for it
    problem = decode_problem(data, limits.max_pixels) if settings.decode and stored is data else None
    if problem is not None:
        raise BadRow(*problem)
    return stored


def _read(row: Row, max_bytes: int) -> bytes:
    if isinstance(row.image, bytes):
        return row.image
    if isinstance(row.image, str):
        return read_inside(row.root, row.image, max_bytes)
    span: Span = row.image
    with span.file.open("rb") as file:
        file.seek(span.offset)
        data = file.read(span.size)
    if xxh3_64_hexdigest(data) != f"{span.xxh3:016x}":
        raise BadRow("hash", f"{span.file} changed while it was read")
    return data
