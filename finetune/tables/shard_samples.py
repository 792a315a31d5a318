"""WebDataset tars as labelled tables: every sample is a row.

Columns are ``__key__``, ``__folder__`` (the name of the tar's folder), ``image``, ``text`` (the ``.txt``) and
``cls`` (the ``.cls``, as text), each where samples have it, and the fields of the ``.json``. A field that has
the name of one of these, or begins with ``json.``, is called ``json.FIELD``. Samples are grouped as
webdataset does; a picture is read from its place in the tar when it is wanted.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_intdigest

from ...configs.errors import UserError
from ...data.image_header import EXTENSIONS, MAX_IMAGE_BYTES
from ...data.index import MANIFEST, MAX_TEXT_BYTES, Index, load_json, text_hash
from ...data.plain_tars import groups
from ...data.scan import split_name
from ...data.scanning import tar_names
from ...data.shards import ShardSet, open_shards
from ...data.tars import Member, TarReader
from .cells import Picture
from .samples import Damaged, Sample, SampleSource

__all__ = ["ShardSamples", "tars_of"]

OWN = ("__key__", "__folder__", "image", "text", "cls")
TEXTS = ("txt", "json", "cls")


def tars_of(places: Sequence[Path]) -> list[Path]:
    """The tars that are meant: tars as they are, and of folders all of theirs, by name. UserError for what is
    not there, is no tar, or holds none."""
    tars: list[Path] = []
    for place in places:
        if place.is_dir():
            names = tar_names(place)
            if not names:
                raise UserError(f"{place} holds no .tar files; give a folder of shards")
            tars += [place / name for name in names]
        elif not place.is_file():
            raise UserError(f"there is no {place}; give shards or a folder of them")
        else:
            tars.append(place)
    if len(set(tars)) != len(tars):
        raise UserError(f"{next(tar for tar in tars if tars.count(tar) > 1)} is named twice; name it once")
    return tars


class _Bad(Exception):
    """Why a sample cannot be used."""


class ShardSamples(SampleSource):
    """The samples of tars, in the order of the list and of each tar.

    Where a tar lies in an indexed folder, its samples must have the hashes of the index.
    """

    pictures = ("image",)

    def __init__(self, name: str, tars: Sequence[Path]) -> None:
        super().__init__(name, tars[0].parent)
        self._tars = tars

    @cached_property
    def _indexed(self) -> dict[Path, ShardSet]:
        """The sets of the folders that have an index. UserError where files are not those of the manifest."""
        folders = dict.fromkeys(tar.parent for tar in self._tars)
        return {folder: open_shards(folder) for folder in folders if (folder / MANIFEST).is_file()}

    def samples(self) -> Iterator[Sample | Damaged]:
        """All samples from the first tar on. UserError for a tar that cannot be read."""
        for tar in self._tars:
            try:
                yield from self._of_tar(tar)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise UserError(f"{tar}: {reason}; check the file system") from error

    def _of_tar(self, tar: Path) -> Iterator[Sample | Damaged]:
        hashes, seen, key = self._hashes(tar), set[str](), ""
        with tar.open("rb") as file:
            reader = TarReader(file, _wanted)
            for key, members in groups(reader):
                if reader.kind in ("truncated", "damaged"):
                    break  # behind its last member some may be missing
                try:
                    if key in seen:
                        raise _Bad("is a second sample of its key in the tar")
                    seen.add(key)
                    yield _sample(tar, key, members, hashes)
                except _Bad as bad:
                    yield Damaged(str(tar), _printable(key), str(bad))
        if reader.problem is not None:
            whole = reader.kind == "trailing"
            reason = f"{'' if whole else 'may lack members: the tar '}{reader.problem}"
            yield Damaged(str(tar), "" if whole else _printable(key), reason)

    def _hashes(self, tar: Path) -> "_Hashes | None":
        shards = self._indexed.get(tar.parent)
        if shards is None or tar.name not in shards.shard_names:
            return None
        return _Hashes(shards.index(shards.shard_names.index(tar.name)))


class _Hashes:
    """What an index says of the bytes of a tar's samples."""

    def __init__(self, index: Index) -> None:
        self._index = index
        self._number: dict[str, int] = {}
        for number, key in enumerate(index.keys()):
            self._number.setdefault(key, number)

    def check(self, key: str, image: bytes | None, text: bytes | None, meta: bytes | None) -> None:
        """Raise _Bad where they are others."""
        if key not in self._number:
            raise _Bad("is not in the index of its folder; index it again with `diptych data index`")
        record = self._index.record(self._number[key])
        if not record.image_size:  # then neither was hashed
            return
        if image is None or xxh3_64_intdigest(image) != record.image_xxh3:
            raise _Bad("has another picture than when it was indexed")
        caption = (text or b"") if record.caption_size else b""
        if text_hash(caption, meta or b"") != record.text_xxh3:
            raise _Bad("has another text or JSON than when it was indexed")


def _wanted(name: str, size: int) -> bool:
    parts = split_name(name)
    if parts is None:
        return False
    return size <= MAX_IMAGE_BYTES if parts[1] in EXTENSIONS else parts[1] in TEXTS and size <= MAX_TEXT_BYTES


def _sample(tar: Path, key: str, members: dict[str, Member | None], hashes: _Hashes | None) -> Sample:
    """The cells of a sample; _Bad where they cannot be read."""
    data: dict[str, bytes] = {}
    extension = next((name for name in EXTENSIONS if name in members), "")
    for name in (extension, *TEXTS) if extension else TEXTS:
        if name not in members:
            continue
        member = members[name]
        if member is None:
            raise _Bad(f"has two members '.{name}'")
        if member.data is None:
            raise _Bad(f"has a member '.{name}' of {member.size} bytes, which is too large")
        data[name] = member.data
    if _printable(key) != key:
        raise _Bad("has a name that is not UTF-8")
    if hashes is not None:
        hashes.check(key, data.get(extension), data.get("txt"), data.get("json"))
    sample: Sample = {"__key__": key, "__folder__": tar.parent.name}
    if (image := members.get(extension)) is not None:
        place = (image.offset, image.size, xxh3_64_intdigest(data[extension]))
        sample["image"] = Picture(path=tar, key=key, place=place) if image.size else None
    if "txt" in data:
        sample["text"] = _text(data["txt"], "txt")
    if "cls" in data:
        sample["cls"] = _text(data["cls"], "cls").strip() or None
    return sample | _fields(data["json"]) if "json" in data else sample


def _text(data: bytes, extension: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Bad(f"has a '.{extension}' that is not UTF-8") from error


def _fields(data: bytes) -> dict[str, Any]:
    """The fields of a JSON, those with names of other columns renamed."""
    try:
        fields = load_json(data)
        if b"\\u" in data:
            json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise _Bad("has half a surrogate pair in its '.json', which is no character") from error
    except ValueError as error:
        raise _Bad(f"has a '.json' that cannot be read ({error})") from error
    return {f"json.{n}" if n in OWN or n.startswith("json.") else n: value for n, value in fields.items()}


def _printable(key: str) -> str:
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
