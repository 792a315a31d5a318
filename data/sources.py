"""Where pairs come from: tables (CSV, TSV, JSONL, Parquet), folders of images with text beside, and tars.

A source gives rows one after the other, the same every time. A row that cannot be understood is a
``BadRow``, never an exception: one bad line does not end a build of millions.
"""

import csv
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

from ..configs.errors import UserError
from .image_header import EXTENSIONS, MAX_IMAGE_BYTES
from .index import load_json
from .scanning import USUAL, Limits, tar_names

__all__ = [
    "BadRow",
    "Columns",
    "Row",
    "SourceRow",
    "Span",
    "captions_of",
    "open_source",
    "plain",
    "read_inside",
]

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson", ".parquet")
IMAGE_COLUMNS = (
    "image",
    "image_path",
    "filepath",
    "file_path",
    "file_name",
    "filename",
    "path",
    "img",
    *EXTENSIONS,
)
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "txt", "description", "alt")


class BadRow(Exception):
    """A row that gives no sample: ``reason`` in one word, ``detail`` for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Columns:
    """Which columns hold what; None: the first of the usual names that the table has."""

    image: str | None = None
    caption: str | Sequence[str] | None = None
    """One or several: the first that has text is the caption, all are kept. Of tars, keys of the JSON."""
    key: str | None = None
    prefix_keys: bool = False
    """Put a tar's name before the keys of its samples."""

    @property
    def captions(self) -> tuple[str, ...]:
        """The caption columns that were asked for."""
        if self.caption is None:
            return ()
        return (self.caption,) if isinstance(self.caption, str) else tuple(self.caption)


@dataclass(frozen=True)
class Span:
    """An image that lies inside a file; ``xxh3`` is that of its bytes."""

    file: Path
    offset: int
    size: int
    xxh3: int


@dataclass(frozen=True)
class Row:
    """One pair. ``image`` is its bytes, or where they are: a path relative to ``root``, or a span."""

    image: bytes | str | Span
    caption: str
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    key: str | None = None
    root: Path = Path()


SourceRow = tuple[int, "Row | BadRow"]
"""A row's number, from 1 (a JSONL's line, a table's row below its head, a folder's image), and what it
gave."""


def read_inside(root: Path, name: str, max_bytes: int = MAX_IMAGE_BYTES) -> bytes:
    """The bytes of an image file that lies inside ``root``, wherever links lead. Raises BadRow: "path"
    (outside), "missing", "size", "url"."""
    if "://" in name[:12]:
        raise BadRow("url", f"{name} is a link; download it first, for instance with img2dataset")
    try:
        real, inside = (root / name).resolve(), root.resolve()
        if not real.is_relative_to(inside):
            raise BadRow("path", f"{name} lies outside {root}; give --root")
        if not real.is_file():
            raise BadRow("missing", f"there is no file {name} in {root}")
        if real.stat().st_size > max_bytes:
            raise BadRow("size", f"{name} has {real.stat().st_size} bytes")
        return real.read_bytes()
    except (ValueError, RuntimeError) as error:  # a NUL in the name, a circle of links
        raise BadRow("path", f"{name!r} is no path: {error}") from error
    except PermissionError as error:
        raise BadRow("missing", f"{name} cannot be read") from error


def open_source(
    source: str | Path, columns: Columns, root: Path | None = None, limits: Limits = USUAL
) -> Iterator[SourceRow]:
    """Rows of a table, of a folder of images, of a tar, or of a folder of tars. ``root``: image paths of a
    table are relative to it and must stay inside it; None: the table's folder. Raises UserError for a source
    that cannot be read at all."""
    from .tar_source import tar_rows

    path = Path(source).expanduser()
    kind = path.suffix.lower()
    if path.is_dir():
        names = tar_names(path)
        return tar_rows(path, names, columns, limits) if names else _folder(path, columns)
    known = f"{', '.join((*TABLES, '.tar'))}, or a folder of images or tars"
    if not path.is_file():
        raise UserError(f"there is no {path}; give one of {known}")
    if kind == ".tar":
        return tar_rows(path.parent, [path.name], columns, limits)
    if kind not in TABLES:
        unpack = "; unpack it to .tar" if path.name.endswith((".tar.gz", ".tgz", ".tar.zst")) else ""
        raise UserError(f"{path}: cannot read '{kind}' files; give one of {known}{unpack}")
    root = path.parent if root is None else root
    if kind == ".parquet":
        rows = _parquet(path)
    else:
        rows = _jsonl(path) if kind in (".jsonl", ".ndjson") else _csv(path, kind)
    return _rows(path, rows, columns, root)


def _rows(
    path: Path, rows: Iterator[tuple[int, Mapping[str, Any] | BadRow]], columns: Columns, root: Path
) -> Iterator[SourceRow]:
    found: Columns | None = None
    for number, values in rows:
        if isinstance(values, BadRow):
            yield number, values
            continue
        if found is None:
            found = _find_columns(path, list(values), columns)
        try:
            yield number, _row(values, found, root)
        except BadRow as bad:
            yield number, bad


def _find_columns(path: Path, names: Sequence[str], columns: Columns) -> Columns:
    """The columns of a table, from its first row."""

    def choose(what: str, asked: str | None, usual: Sequence[str]) -> str:
        candidates = (asked,) if asked is not None else usual
        lower = {name.lower(): name for name in reversed(names)}
        for candidate in candidates:
            if candidate in names or (asked is None and candidate in lower):
                return candidate if candidate in names else lower[candidate]
        wanted = f"column '{asked}'" if asked is not None else f"known {what} column"
        raise UserError(f"{path} has no {wanted}; it has {_listed(names)}: choose with --{what}")

    if columns.key is not None and columns.key not in names:
        raise UserError(f"{path} has no column '{columns.key}'; it has {_listed(names)}: choose with --key")
    captions = tuple(choose("caption", asked, CAPTION_COLUMNS) for asked in columns.captions or (None,))
    usual = [name for name in IMAGE_COLUMNS if name not in captions]
    return Columns(choose("image", columns.image, usual), captions, columns.key)


def _listed(names: Sequence[str]) -> str:
    """Names of columns in one line."""
    shown = [" ".join(name.split())[:40] for name in names[:30]]
    return ", ".join(shown) + (", ..." if len(names) > 30 else "")


def _row(values: Mapping[str, Any], columns: Columns, root: Path) -> Row:
    assert columns.image is not None
    image = values.get(columns.image)
    if isinstance(image, Mapping):  # Hugging Face's {"bytes": .., "path": ..}
        image = image.get("bytes") or image.get("path")
    if image is None or image == "":
        raise BadRow("missing", f"column '{columns.image}' is empty")
    if not isinstance(image, bytes | str):
        raise BadRow("missing", f"column '{columns.image}' holds neither a path nor bytes")
    meta = {
        name: plain(value)
        for name, value in values.items()
        if name not in (*columns.captions, columns.image)
        and not isinstance(value, bytes)
        and plain(value) is not None
    }
    if isinstance(image, str):
        meta[columns.image] = image
    key = None
    if columns.key is not None:
        key = str(values.get(columns.key) if values.get(columns.key) is not None else "")
        if not key:
            raise BadRow("key", f"column '{columns.key}' is empty")
    caption, meta = captions_of({name: values.get(name) for name in columns.captions}, meta)
    return Row(image, caption, meta, key, root)


def captions_of(values: Mapping[str, Any], meta: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The first text of some columns, and ``meta`` with all of them as ``captions`` where there are several
    columns or a list. Raises BadRow if there is none."""
    texts: list[str] = []
    for value in values.values():
        members = value if isinstance(value, list | tuple) else [value]
        texts += [text for text in members if isinstance(text, str) and text.strip()]
    several = len(values) > 1 or any(isinstance(value, list | tuple) for value in values.values())
    if texts:
        return texts[0], meta | {"captions": texts} if several else meta
    if len(values) > 1:
        raise BadRow("caption", f"columns {', '.join(map(repr, values))} hold no text")
    ((column, value),) = values.items()
    if isinstance(value, list | tuple):
        raise BadRow("caption", f"column '{column}' is an empty list")
    blank = value is None or isinstance(value, str) or not value
    raise BadRow("caption", f"column '{column}' is {'empty' if blank else 'no text'}")


def plain(value: Any) -> Any:
    """A cell as a JSON value; None for what has no such form (bytes, NaN)."""
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float | Decimal):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, datetime | date | time):
        return value.isoformat()
    if isinstance(value, Mapping):
        return {str(name): plain(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return None


def _csv(path: Path, kind: str) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
    csv.field_size_limit(MAX_IMAGE_BYTES)
    # what is not UTF-8 becomes half characters, which the row's own check refuses
    with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
        head = file.readline()
        file.seek(0)
        tabs = kind == ".tsv" or ("\t" in head and "," not in head)  # open_clip's tables have tabs in .csv
        reader = csv.reader(file, delimiter="\t" if tabs else ",")
        try:
            names = next(reader, None)
            if not names:
                raise UserError(f"{path} is empty; its first line must name the columns")
            if len(set(names)) != len(names):
                raise UserError(f"{path} names a column twice: {_listed(names)}; rename one")
            number = 0
            for cells in reader:
                if not cells:  # an empty line
                    continue
                number += 1
                if len(cells) != len(names):
                    yield number, BadRow("columns", f"it has {len(cells)} cells, the head has {len(names)}")
                else:
                    yield number, dict(zip(names, cells, strict=True))
        except csv.Error as error:
            raise UserError(f"{path}: line {reader.line_num} cannot be read as CSV: {error}") from error


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield number, load_json(line)
            except ValueError as error:
                yield number, BadRow("json", f"the line is no JSON object: {error}")


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | BadRow]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path, page_checksum_verification=True) as file:
            number = 0
            for batch in file.iter_batches(batch_size=64):
                for one in range(batch.num_rows):
                    number += 1
                    yield number, _parquet_row(batch.slice(one, 1))
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path} cannot be read as Parquet: {' '.join(str(error).split())[:200]}") from error


def _parquet_row(row: Any) -> Mapping[str, Any] | BadRow:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return BadRow("json", f"a text of it is not UTF-8: {error}")


def _folder(folder: Path, columns: Columns) -> Iterator[SourceRow]:
    """Images of a folder and its sub-folders in the order of their names, each with ``NAME.txt`` or
    ``NAME.json`` beside it. The key is the path without its ending."""
    number = 0
    for place, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            stem, dot, ending = name.rpartition(".")
            if not dot or not stem or ending.lower() not in EXTENSIONS:
                continue
            number += 1
            path = Path(place, name).relative_to(folder)
            try:
                yield number, _sidecar(folder, path, columns)
            except BadRow as bad:
                yield number, bad


def _sidecar(folder: Path, path: Path, columns: Columns) -> Row:
    meta: dict[str, Any] = {}
    text = _beside(folder, path, ".txt")
    if (data := _beside(folder, path, ".json")) is not None:
        try:
            meta = {name: plain(value) for name, value in load_json(data).items()}
        except ValueError as error:
            raise BadRow("json", f"{path.with_suffix('.json')} is no JSON object: {error}") from error
    if text is not None and not columns.captions:
        values: dict[str, Any] = {
            str(path.with_suffix(".txt")): text.decode("utf-8", "surrogateescape").strip()
        }
    elif text is None and not meta:
        raise BadRow("caption", f"there is neither {path.stem}.txt nor {path.stem}.json beside {path}")
    else:
        usual = next((name for name in CAPTION_COLUMNS if name in meta), CAPTION_COLUMNS[0])
        values = {name: meta.pop(name, None) for name in columns.captions or (usual,)}
    caption, meta = captions_of(values, meta)
    meta.setdefault("path", path.as_posix())
    return Row(path.as_posix(), caption, meta, path.with_suffix("").as_posix(), folder)


def _beside(folder: Path, path: Path, suffix: str) -> bytes | None:
    sidecar = path.with_suffix(suffix)
    return read_inside(folder, sidecar.as_posix()) if (folder / sidecar).exists() else None
