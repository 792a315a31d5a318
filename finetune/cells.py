"""Image cells of a table: a path, bytes, or ``FOLDER#KEY`` for a sample of a shard folder.

Paths are taken relative to the table's folder and never lead outside it, or outside the root that the config
names. Pixels are counted before anything is decoded.
"""

import hashlib
import io
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from xxhash import xxh3_64_intdigest

from ..configs.errors import UserError
from ..data.shards import DamagedSample, ShardSet, open_shards

__all__ = ["BrokenPicture", "Picture", "PictureFolder", "PictureReader"]


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
