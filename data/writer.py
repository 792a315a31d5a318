"""Writing shards: whole or absent, and the same bytes for the same samples."""

import fcntl
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from xxhash import xxh3_64, xxh3_64_intdigest

from ..configs.errors import UserError
from ..configs.files import fsync_folder
from .image_header import EXTENSIONS, FORMATS, MAX_IMAGE_BYTES, HeaderError, read_header
from .index import (
    MANIFEST,
    OK,
    RECORD,
    ROTATED,
    SIZES,
    ShardRow,
    idx_path,
    index_bytes,
    make_row,
    map_index,
    read_manifest,
    text_hash,
    write_manifest,
)
from .tars import END, MAX_NAME_BYTES, member_header, padding

__all__ = [
    "OpenShard",
    "RefusedSample",
    "ShardWriter",
    "check_key",
    "encode_sample",
    "old_shards",
    "publish",
    "remove_shards",
]

STAGING = ".partial"
TAR_RECORD = 10240  # tar pads archives to this
CHUNK = 1 << 20


class RefusedSample(UserError):
    """A sample that may not go into a shard: its key and a reason in one word beside the sentence."""

    def __init__(self, key: str, reason: str, message: str) -> None:
        super().__init__(message)
        self.key, self.reason = key, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.key, self.reason, str(self))


def check_key(key: str) -> None:
    """RefusedSample unless every webdataset reader finds ``key`` as it is: no dot (a reader cuts there), no
    control character, no empty or absolute path, no leading ``__`` (readers skip such members), and short
    enough for a USTAR header."""
    if "." in key:
        problem = "has a dot, where readers cut it; write '-' or '_' for it"
    elif not key or key.startswith(("/", "__")) or "//" in key or key.endswith("/"):
        problem = "is empty, begins with '/' or '__', or has an empty part; name it otherwise"
    elif re.search(r"[\x00-\x1f\x7f\ud800-\udfff]", key):
        problem = "has a control character or half a character; take it out"
    elif len(key.encode()) > MAX_NAME_BYTES - len(".webp"):
        problem = f"is longer than {MAX_NAME_BYTES - len('.webp')} bytes; shorten it"
    else:
        return
    raise RefusedSample(key, "key", f"key {key!r} {problem}")


class ShardWriter:
    """Write samples into ``folder`` as tars of ``samples_per_shard``, each with its index::

        with ShardWriter("my-shards") as writer:
            writer.write("cat-0001", png, "png", "a cat on a mat", {"source": "mine"})

    The shards appear in ``folder`` when the block ends well, ``manifest.jsonl`` last of all; after an error
    there is nothing. A killed process leaves its half under ``.partial``, which the next writer clears. Equal
    samples in equal order give equal bytes. UserError if the folder holds shards already, unless
    ``overwrite``, or if nothing was written.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        samples_per_shard: int = 1000,
        bytes_per_shard: int = 1 << 30,
        overwrite: bool = False,
    ) -> None:
        if samples_per_shard < 1 or bytes_per_shard < 1:
            raise UserError("samples_per_shard and bytes_per_shard must be at least 1")
        self.folder = Path(folder)
        self.samples_per_shard, self.bytes_per_shard = samples_per_shard, bytes_per_shard
        self.overwrite = overwrite
        self.count = 0
        """Samples written so far."""
        self._keys: set[str] = set()
        self._rows: list[ShardRow] = []
        self._shard: OpenShard | None = None
        self._lock: int | None = None

    def __enter__(self) -> Self:
        old_shards(self.folder, overwrite=self.overwrite)
        staging = self.folder / STAGING
        try:
            staging.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write shards to {self.folder}: {error.strerror}") from error
        self._lock = os.open(staging, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            self._lock = None
            raise UserError(f"another process writes shards to {self.folder}; wait for it") from error
        except OSError:  # a file system without locks
            pass
        for old in staging.iterdir():
            old.unlink()
        return self

    def write(self, key: str, image: bytes, extension: str, caption: str, meta: Mapping[str, Any]) -> None:
        """Append one sample.

        ``extension``: what the bytes of ``image`` are: "jpg", "jpeg", "png" or "webp". ``caption``: not
        blank.
        ``meta``: a flat dict of JSON values. Raises RefusedSample, a UserError, and stays as it was if key,
        image, caption or meta are not fit to be written, or the key is there already.
        """
        if self._lock is None:
            raise ValueError("write() outside the writer's with block")
        check_key(key)
        if key in self._keys:
            raise RefusedSample(key, "duplicate", f"key '{key}' is there twice; keys must be unique")
        members, record = encode_sample(key, image, extension, caption, meta)
        if self._shard is None:
            self._shard = OpenShard(self.folder / STAGING / f"{len(self._rows):05d}.tar")
        self._shard.add(key, members, record)
        self._keys.add(key)
        self.count += 1
        if len(self._shard.keys) >= self.samples_per_shard or self._shard.size >= self.bytes_per_shard:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._shard is not None:
            self._rows.append(self._shard.finish())
            self._shard = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish_shard()
                if not self._rows:
                    raise UserError(f"no samples were written to {self.folder}")
                publish(self.folder, self.folder / STAGING, self._rows, overwrite=self.overwrite)
        finally:
            if self._shard is not None:
                self._shard.file.close()
            shutil.rmtree(self.folder / STAGING, ignore_errors=True)
            with suppress(OSError):  # a folder that we made and that stayed empty
                self.folder.rmdir()
            if self._lock is not None:
                os.close(self._lock)
                self._lock = None


def encode_sample(
    key: str, image: bytes, extension: str, caption: str, meta: Mapping[str, Any]
) -> tuple[dict[str, bytes], np.ndarray]:
    """The members of a sample by extension, and its record but for the places; RefusedSample as
    ``ShardWriter.write`` raises it. The key is taken as it is."""
    try:
        header = read_header(image)
    except HeaderError as error:
        raise RefusedSample(key, "decode", f"sample '{key}': cannot read the image: {error}") from error
    if len(image) > MAX_IMAGE_BYTES:
        raise RefusedSample(key, "size", f"sample '{key}': the image has {len(image)} bytes")
    if EXTENSIONS.get(extension.lower().lstrip(".")) != header.format:
        raise RefusedSample(
            key, "format", f"sample '{key}': the image is {header.format}, not {extension}; name it so"
        )
    if not caption.strip():
        raise RefusedSample(key, "caption", f"sample '{key}': the caption is blank")
    try:
        text = caption.encode("utf-8")
        json_bytes = json.dumps(
            dict(meta), ensure_ascii=False, sort_keys=True, allow_nan=False, separators=(",", ":")
        ).encode("utf-8")
    except (TypeError, ValueError, RecursionError) as error:
        raise RefusedSample(
            key, "json", f"sample '{key}': caption or meta cannot be written as JSON text: {error}"
        ) from error
    record = np.zeros((), dtype=RECORD)
    record["width"], record["height"] = header.width, header.height
    record["format"] = FORMATS.index(header.format)
    record["image_xxh3"] = xxh3_64_intdigest(image)
    record["text_xxh3"] = text_hash(text, json_bytes)
    record["text_len"] = min(len(caption), 65535)
    record["flags"] = OK | (ROTATED if header.rotated else 0)
    return {header.format: image, "json": json_bytes, "txt": text}, record


class OpenShard:
    """A tar that is being written to ``path``, and its index, which is written when it is finished."""

    def __init__(self, path: Path) -> None:
        self.path, self.keys, self.records = path, list[str](), list[np.ndarray]()
        self.file = path.open("wb")
        self.size, self.hash = 0, xxh3_64()

    def add(self, key: str, members: Mapping[str, bytes], record: np.ndarray) -> None:
        """Append a sample as ``encode_sample`` gives it."""
        for extension in sorted(members):
            data = members[extension]
            name = {"json": "json", "txt": "caption"}.get(extension, "image")
            record[f"{name}_offset"] = self.size + 512
            record[f"{name}_size"] = len(data)
            self._append(member_header(f"{key}.{extension}", len(data)) + data + padding(len(data)))
        self.keys.append(key)
        self.records.append(record)

    def extend(self, shard: Path, payload: int) -> None:
        """Append the samples of a finished shard, whose members end at byte ``payload``."""
        index, base = map_index(idx_path(shard)), self.size
        with shard.open("rb") as file:
            while file.tell() < payload:
                self._append(file.read(min(CHUNK, payload - file.tell())))
        records = index.records.copy()
        for part in ("image", "caption", "json"):
            records[f"{part}_offset"] += np.uint64(base)
        self.keys += index.keys()
        self.records += list(records)

    def _append(self, data: bytes) -> None:
        self.file.write(data)
        self.hash.update(data)
        self.size += len(data)

    def finish(self) -> ShardRow:
        """Close the tar, write its index, and give the manifest's row."""
        self._append(END)
        self._append(padding(self.size, TAR_RECORD))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        idx = index_bytes(self.size, self.hash.intdigest(), np.stack(self.records), self.keys)
        with idx_path(self.path).open("wb") as file:
            file.write(idx)
            file.flush()
            os.fsync(file.fileno())
        return make_row(self.path.name, idx)


def publish(folder: Path, staging: Path, rows: Sequence[ShardRow], *, overwrite: bool) -> None:
    """Move the shards of ``rows`` from ``staging`` into the folder; the manifest, which makes them valid,
    comes last."""
    remove_shards(folder, old_shards(folder, overwrite=overwrite))
    for row in rows:
        shard = staging / row.shard
        # never an index without its tar
        shard.rename(folder / shard.name)
        idx_path(shard).rename(folder / idx_path(shard).name)
    fsync_folder(folder)
    write_manifest(folder, rows)


def old_shards(folder: Path, *, overwrite: bool) -> list[str]:
    """The shards of the data set that is to be replaced. UserError unless the folder is empty or
    ``overwrite`` is set and all of its shards were built here."""
    listed = (folder / MANIFEST).exists()
    if not listed and not any(folder.glob("*.tar")):
        return []
    if not overwrite or not listed:
        raise UserError(f"{folder} holds shards already; choose an empty folder or give --overwrite")
    old = read_manifest(folder)
    if any(row.foreign for row in old):
        raise UserError(f"{folder} holds tars that were only indexed here; choose another folder")
    return [row.shard for row in old]


def remove_shards(folder: Path, names: Sequence[str]) -> None:
    """Remove shards, the manifest first."""
    if names:
        (folder / MANIFEST).unlink(missing_ok=True)
        (folder / SIZES).unlink(missing_ok=True)
    for name in names:
        idx_path(folder / name).unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)
