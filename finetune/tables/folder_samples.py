"""Folders of pictures as labelled tables: ``root/CLASS/*.jpg``, as torchvision's ``ImageFolder`` reads them.

Columns are ``__key__`` (the picture's path without its ending), ``__folder__`` (the root's name), ``image``
(its path), ``label`` (the folder of the root that it is in, however deep) and ``text``, what a ``.txt`` of
the same name beside it holds. Names that begin with a dot are passed over.
"""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from ...configs.errors import UserError
from ...data.image_header import EXTENSIONS
from ...data.index import MAX_TEXT_BYTES
from .samples import Damaged, Sample, SampleSource

__all__ = ["FolderSamples"]

UNREAD = ("avif", "bmp", "gif", "heic", "pgm", "ppm", "tif", "tiff")
"""Endings of pictures in formats that are not read."""


class FolderSamples(SampleSource):
    """The pictures of one or more roots, by class, folder and name; those in a root itself have no label."""

    def __init__(self, name: str, roots: Sequence[Path]) -> None:
        for root in roots:
            if not root.is_dir():
                raise UserError(
                    f"there is no folder {root}; give one that holds a folder of pictures per class"
                )
        whole = [Path(os.path.abspath(root)) for root in roots]
        super().__init__(name, whole[0] if len(whole) == 1 else Path(os.path.commonpath(whole)))
        self._roots = whole

    def samples(self) -> Iterator[Sample | Damaged]:
        """All pictures from the first root's first class on. UserError for a folder that cannot be read."""
        try:
            for root in self._roots:
                yield from self._in(root, root, None)
                for name in sorted(entry.name for entry in root.iterdir() if entry.is_dir()):
                    empty = True
                    for folder in _below(root / name):
                        for sample in self._in(root, folder, name):
                            empty = False
                            yield sample
                    if empty and not name.startswith("."):
                        yield Damaged(str(root / name), "", "holds no picture")
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise UserError(f"{error.filename or self.name}: {reason}; check the folder") from error

    def _in(self, root: Path, folder: Path, label: str | None) -> Iterator[Sample | Damaged]:
        """The pictures that lie in a folder itself."""
        files = sorted(path for path in folder.iterdir() if path.name[0] != "." and path.is_file())
        stems = {path.stem for path in files if _ending(path) in EXTENSIONS}
        texts = {path.stem: path for path in files if _ending(path) == "txt"}
        for path in files:
            ending = _ending(path)
            try:
                if ending in EXTENSIONS:
                    yield self._sample(root, path, label, texts.get(path.stem))
                elif ending in UNREAD:
                    yield Damaged(str(path), "", f"is no picture of {', '.join(EXTENSIONS)}")
                elif ending == "txt" and path.stem not in stems:
                    yield Damaged(str(path), "", "has no picture of its name beside it")
            except ValueError as error:
                yield Damaged(str(path), "", str(error))

    def _sample(self, root: Path, path: Path, label: str | None, text: Path | None) -> Sample:
        """The cells of a picture. Raises ValueError for a name or a text that is not UTF-8."""
        name = path.relative_to(self.folder).as_posix()
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise ValueError("has a name that is not UTF-8") from error
        key = name[: len(name) - len(path.suffix)]
        cells: Sample = {"__key__": key, "__folder__": root.name, "image": name, "label": label}
        return cells if text is None else cells | {"text": _read(text)}


def _ending(path: Path) -> str:
    return path.suffix[1:].lower()


def _below(folder: Path) -> list[Path]:
    """A folder and those in it, links followed but where they lead back; in ``ImageFolder``'s order."""
    found: list[str] = []
    real = {os.path.realpath(folder)}
    if folder.name.startswith("."):
        return []
    for place, names, _ in os.walk(folder, followlinks=True, onerror=_raise):
        found.append(place)
        kept: list[str] = []
        for name in sorted(names):
            target = os.path.realpath(os.path.join(place, name))
            if not name.startswith(".") and target not in real:
                real.add(target)
                kept.append(name)
        names[:] = kept
    return [Path(place) for place in sorted(found)]


def _raise(error: OSError) -> None:
    raise error


def _read(path: Path) -> str:
    """A text of moderate size; ValueError if it is none."""
    with path.open("rb") as file:
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"has a .txt of more than {MAX_TEXT_BYTES >> 20} MiB")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError("has a .txt that is not UTF-8") from error
