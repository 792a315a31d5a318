"""Cells of a table: pictures, texts, tabular columns and embeddings.

A picture is a path, bytes, or ``FOLDER#KEY`` for a sample of a shard folder. Paths are taken relative to the
table's folder and never lead outside it, or outside the root that the config names. Pixels are
counted before anything is decoded.
"""

import hashlib
import io
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from xxhash import xxh3_64_intdigest

from ...configs.errors import UserError
from ...data.shards import DamagedSample, ShardSet, open_shards
from ..config.modality import ModalityConfig

__all__ = [
    "BrokenPicture",
    "Picture",
    "PictureFolder",
    "PictureReader",
    "embeddings",
    "is_missing",
    "records",
    "text_of",
]


class BrokenPicture(Exception):
    """A picture that is named and cannot be had; the message says why."""


@dataclass(frozen=True)
class Picture:
    """Where a picture is: a file, bytes, a key of a shard folder, or a place in a tar. Equal ones are encoded
    once."""

    path: Path | None = None
    key: str | None = None
    data: bytes | None = None
    place: tuple[int, int, int] | None = None
    """Of a sample ``key`` of the tar ``path``: offset and size of the picture's bytes, and their xxh3."""

    def __str__(self) -> str:
        if self.data is not None:
            return f"{len(self.data)} bytes"
        return f"{self.path}#{self.key}" if self.key is not None else str(self.path)


class PictureFolder:
    """Turns cells into pictures. ``folder``: where relative paths start; ``root``: what they may not leave
    (default: ``folder``)."""

    def __init__(self, folder: Path, root: Path | None = None) -> None:
        self.folder = Path(os.path.realpath(folder))
        self.root = Path(os.path.realpath(root)) if root is not None else self.folder
        self._shards: dict[str, Path | None] = {}

    def several(self, cell: Any, where: str, declared: ModalityConfig) -> tuple[Picture, ...] | None:
        """The pictures of a cell, one if the modality has no ``pool``, or None for an empty one; empty items
        of a list are no pictures. Raises UserError as ``parse`` does, and for a list where none may be."""
        if isinstance(cell, str) and declared.separator is not None:
            cell = cell.split(declared.separator)
        listed = isinstance(cell, list | tuple | np.ndarray)
        if listed and declared.pool is None:
            raise UserError(
                f"{where}: the image is a list; set data.modalities.image.pool to mean or attention if rows "
                "have several pictures"
            )
        found = [self.parse(item, where) for item in (cell if listed else [cell])]
        return tuple(picture for picture in found if picture is not None) or None

    def parse(self, cell: Any, where: str) -> Picture | None:
        """The picture of a cell, or None for an empty one. Also takes PIL images, and pictures as they are.
        Raises UserError for a path that leads outside and for a cell of another kind; ``where`` begins the
        message."""
        if isinstance(cell, Picture):
            return cell
        if cell is None or cell == "" or (isinstance(cell, float) and math.isnan(cell)):
            return None
        if isinstance(cell, bytes | bytearray | memoryview):
            return Picture(data=bytes(cell)) if len(cell) else None
        if isinstance(cell, Image.Image):
            buffer = io.BytesIO()
            cell.save(buffer, format="PNG")
            return Picture(data=buffer.getvalue())
        if not isinstance(cell, str | Path):
            raise UserError(f"{where}: the image is {type(cell).__name__}; give a path, bytes or FOLDER#KEY")
        text = str(cell).strip()
        if not text:
            return None
        folder, hash_sign, key = text.rpartition("#")
        if hash_sign and (shards := self._shard_folder(folder, where)) is not None:
            return Picture(path=shards, key=key)
        return Picture(path=self._inside(text, where))

    def _shard_folder(self, text: str, where: str) -> Path | None:
        """The shard folder that ``text`` names, or None if it is none (file names may hold a #)."""
        if text not in self._shards:
            path = self._inside(text, where)
            self._shards[text] = path if (path / "manifest.jsonl").is_file() else None
        return self._shards[text]

    def _inside(self, text: str, where: str) -> Path:
        if "\0" in text:
            raise UserError(f"{where}: the image path holds a zero byte; mend it")
        path = Path(os.path.realpath(self.folder / text))
        if not path.is_relative_to(self.root):
            raise UserError(
                f"{where}: image '{text}' leads out of {self.root}; move it inside or set data.root to a "
                "folder that holds both"
            )
        return path


class PictureReader:
    """Reads the bytes of pictures; shard folders are opened once."""

    def __init__(self) -> None:
        self._open: dict[Path, ShardSet] = {}

    def _shards(self, folder: Path) -> ShardSet:
        if folder not in self._open:
            self._open[folder] = open_shards(folder)
        return self._open[folder]

    def read(self, picture: Picture) -> bytes:
        """The bytes of the encoded picture; BrokenPicture if they cannot be had."""
        if picture.data is not None:
            return picture.data
        assert picture.path is not None
        try:
            if picture.place is not None:
                return _read_place(picture.path, *picture.place)
            if picture.key is None:
                return picture.path.read_bytes()
            shards = self._shards(picture.path)
            return shards.read(shards.find(picture.key)).image
        except KeyError as error:
            raise BrokenPicture(f"the shards have no sample '{picture.key}'") from error
        except DamagedSample as error:
            raise BrokenPicture(f"the sample is damaged ({error.reason})") from error
        except OSError as error:
            raise BrokenPicture((error.strerror or str(error)).lower()) from error

    def fingerprint(self, picture: Picture) -> str:
        """sha256 of the picture's bytes, wherever they are; BrokenPicture if they cannot be had."""
        return hashlib.sha256(self.read(picture)).hexdigest()


def _read_place(path: Path, offset: int, size: int, xxh3: int) -> bytes:
    """Bytes of a tar; BrokenPicture where they are not those that were found there."""
    with path.open("rb") as file:
        file.seek(offset)
        data = file.read(size)
    if xxh3_64_intdigest(data) != xxh3:
        raise BrokenPicture("the tar has changed since it was looked through")
    return data


def is_missing(cell: Any) -> bool:
    """Whether a cell is empty: None, NaN or nothing but white space."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return True
    return isinstance(cell, str) and not cell.strip()


def text_of(cell: Any, where: str) -> str | None:
    """The text of a cell, or None for an empty one; UserError for what is no string."""
    if is_missing(cell):
        return None
    if not isinstance(cell, str):
        raise UserError(
            f"{where}: the text is {type(cell).__name__} {str(cell)[:40]!r}; write it as a string"
        )
    return cell


def records(
    declared: ModalityConfig, columns: Sequence[Sequence[Any]], where: Sequence[str]
) -> list[tuple[float | str | None, ...] | None]:
    """Tabular cells row by row, numbers first: None for an empty one, and None in the place of a row that has
    nothing else. UserError for a number that is none and for a category that is no plain value."""
    names = (*declared.numeric, *declared.categorical)
    kinds = [_number] * len(declared.numeric) + [_category] * len(declared.categorical)
    made: list[tuple[float | str | None, ...] | None] = []
    for place, cells in zip(where, zip(*columns, strict=True), strict=True):
        values = tuple(
            None if is_missing(cell) else kind(cell, name, place)
            for kind, name, cell in zip(kinds, names, cells, strict=True)
        )
        made.append(None if all(value is None for value in values) else values)
    return made


def _number(cell: Any, name: str, where: str) -> float:
    try:
        value = float(cell)
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise UserError(
            f"{where}: '{str(cell)[:40]}' in column '{name}' is no finite number; mend or empty it"
        )
    return value


def _category(cell: Any, name: str, where: str) -> str:
    if isinstance(cell, np.generic):
        cell = cell.item()
    if isinstance(cell, float) and cell.is_integer():  # whole numbers beside empty cells are read as floats
        cell = int(cell)
    if not isinstance(cell, str | int | float | bool):
        raise UserError(
            f"{where}: column '{name}' holds {type(cell).__name__}; a category is a string or a number"
        )
    return str(cell)


def embeddings(cells: Sequence[Any], name: str, where: Sequence[str]) -> list[NDArray[np.float32] | None]:
    """Vectors float32 [W], None for an empty cell. UserError for what is no list of finite numbers, and for
    vectors of different lengths."""
    made: list[NDArray[np.float32] | None] = []
    width = 0
    for cell, place in zip(cells, where, strict=True):
        if is_missing(cell) or (isinstance(cell, list | tuple | np.ndarray) and len(cell) == 0):
            made.append(None)
            continue
        vector = _vector(cell)
        if vector is None:
            raise UserError(
                f"{place}: the embedding in column '{name}' is no list of finite numbers; write lists in "
                "Parquet or JSONL, and leave missing ones empty"
            )
        width = width or len(vector)
        if len(vector) != width:
            raise UserError(
                f"{place}: the embedding in column '{name}' has {len(vector)} numbers, those before have "
                f"{width}; give all the same"
            )
        made.append(vector)
    return made


def _vector(cell: Any) -> NDArray[np.float32] | None:
    if not isinstance(cell, list | tuple | np.ndarray):
        return None
    try:
        given = np.asarray(cell)
    except ValueError:  # lists of different lengths
        return None
    if given.ndim != 1 or given.dtype.kind not in "fiu":
        return None
    with np.errstate(over="ignore"):
        vector = given.astype(np.float32)
    return vector if np.isfinite(vector).all() else None
