"""Where labelled rows come from: a table file, tars of samples, or folders of pictures; and which of them a
name means."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from glob import glob
from pathlib import Path
from typing import Literal, Protocol

import pyarrow as pa

from ...configs.errors import UserError
from ...configs.files import resolve_data_path
from ...data.plain_tars import expand
from .files import CHUNK, FORMATS, Columns, open_table, read_columns
from .folder_samples import FolderSamples
from .samples import Damaged, SampleSource, open_samples, read_samples
from .shard_samples import ShardSamples, tars_of

__all__ = ["Form", "Source", "Whole", "open_source", "read_source"]

Form = Literal["table", "shards", "folders"]
PACKED = (".tar.gz", ".tgz", ".tar.zst", ".tar.bz2", ".tar.xz", ".zip")


class Source(Protocol):
    """Rows that were looked through, read chunk by chunk."""

    @property
    def name(self) -> str:
        """For messages."""
        ...

    @property
    def folder(self) -> Path:
        """Where relative image paths start."""
        ...

    @property
    def names(self) -> tuple[str, ...]:
        """The columns."""
        ...

    @property
    def rows(self) -> int:
        """How many there are."""
        ...

    def chunks(self, size: int = CHUNK) -> Iterator[Columns]:
        """The rows in order, ``size`` at a time, each with all columns."""
        ...

    def types(self, *, exact: bool = True) -> pa.Schema:
        """Arrow types of all columns; unless ``exact``, strings where that costs a pass over the rows."""
        ...


@dataclass(frozen=True)
class Whole:
    """All rows at once. ``damaged``: samples that were left out."""

    name: str
    folder: Path
    columns: Columns
    damaged: list[Damaged] = field(default_factory=list[Damaged])


def open_source(place: str | Path, form: Form | None = None, *, key: str = "format") -> Source:
    """Look through the rows that ``place`` names, as ``read_source``. UserError for a damaged sample."""
    found = _source(str(place), form, key)
    return open_table(found) if isinstance(found, Path) else open_samples(found)


def read_source(place: str | Path, form: Form | None = None, *, key: str = "format") -> Whole:
    """Read the rows that ``place`` names: a table file, a tar, or what ``form`` says that a folder is. Tars
    and folders may be several, by braces (``{000..011}``, ``{train,val}``) or by ``*``; ``corpus:NAME/REST``
    is a place in the cache.

    Raises UserError for what cannot be read, and, beginning with ``key``, where it cannot be told what
    ``place`` is or ``form`` says something else.
    """
    found = _source(str(place), form, key)
    if isinstance(found, Path):
        return Whole(str(found), found.parent, read_columns(found))
    columns, damaged = read_samples(found)
    return Whole(found.name, found.folder, columns, damaged)


def _source(text: str, form: Form | None, key: str) -> Path | SampleSource:
    """A table file, or samples."""
    path = resolve_data_path(text)
    if text.startswith("pipe:") or re.match(r"[a-z0-9]+://", text):
        raise UserError(f"{text} is not on this machine; copy it to a folder and give that")
    if text.lower().endswith(PACKED):
        raise UserError(f"{text} is compressed; unpack it and give what is in it")
    form = _form(text, path, form, key)
    if form == "table":
        return path
    places = _places(str(path), key)
    return ShardSamples(text, tars_of(places)) if form == "shards" else FolderSamples(text, places)


def _form(text: str, path: Path, form: Form | None, key: str) -> Form:
    """What ``text`` means; UserError where it cannot be told, or is not what was said."""
    ending = path.suffix.lower()
    told: Form | None = "table" if ending in FORMATS else "shards" if ending == ".tar" else None
    if told is None and form is None:
        if path.is_dir() or _is_pattern(text):
            raise UserError(
                f"{key}: {text} may be shards (tars of samples) or folders (of pictures, one per class); say "
                "which"
            )
        if not ending and not path.exists():
            raise UserError(f"there is no {text}; give a table, shards or folders")
        return "table"
    if told is not None and form not in (None, told):
        raise UserError(f"{key}: {text} is {told} by its ending and not {form}; say {told} or leave it out")
    if form == "table" and path.is_dir():
        raise UserError(f"{key}: {text} is a folder and no table; say shards or folders")
    if form == "folders" and path.is_dir() and any(path.glob("*.tar")):
        raise UserError(f"{key}: {text} holds tars; say shards, or move them elsewhere")
    return told or form or "table"


def _is_pattern(text: str) -> bool:
    return any(sign in text for sign in "{*")


def _places(text: str, key: str) -> list[Path]:
    """The paths of a pattern in braces and stars, those of a star by name."""
    places: list[Path] = []
    for one in expand(text, key):
        found = sorted(glob(one)) if "*" in one and not Path(one).exists() else [one]
        if not found:
            raise UserError(f"there is nothing at {one}; check the pattern")
        places += map(Path, found)
    return places
