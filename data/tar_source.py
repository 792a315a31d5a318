"""Tars as a source of pairs: the samples that indexing would find, their images still in the tar."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..configs.errors import UserError
from .index import MANIFEST, OK, ShardRow, idx_path, load_json, map_index, read_manifest, text_hash
from .scan import ShardScan, scan_shard
from .scanning import Limits
from .sources import BadRow, Columns, Row, SourceRow, Span, captions_of, plain

__all__ = ["tar_rows"]


def tar_rows(folder: Path, names: Sequence[str], columns: Columns, limits: Limits) -> Iterator[SourceRow]:
    """The samples of tars, one tar after the other. The caption is ``.txt``, or the keys of the JSON that
    ``columns`` names, or the one that the folder was indexed with. A tar without an index is read once for
    it. What cannot be used is a BadRow."""
    if columns.image is not None or columns.key is not None:
        raise UserError(f"{folder}: tars have no columns; leave --image and --key out")
    indexed: dict[str, ShardRow] = {}
    if (folder / MANIFEST).is_file():
        indexed = {row.shard: row for row in read_manifest(folder)}
    number = 0
    for name in names:
        captions, known = columns.captions, indexed.get(name)
        if not captions and known is not None and known.caption_key is not None:
            captions = (known.caption_key,)
        for row in _tar(folder / name, captions, limits, known):
            number += 1
            if columns.prefix_keys and isinstance(row, Row):
                row = replace(row, key=f"{Path(name).stem}/{row.key}")
            yield number, row


def _described(path: Path, caption_key: str | None, limits: Limits, known: ShardRow | None) -> ShardScan:
    """What the tar holds: from its index where that fits and left nothing out, else by reading it."""
    fits = known is not None and not known.num_bad and known.caption_key == caption_key
    if known is not None and fits and path.stat().st_size == known.bytes:
        with suppress(UserError):
            index = map_index(idx_path(path))
            if index.belongs_to(known) and index.is_sound():
                return ShardScan(known.bytes, int(known.xxh3, 16), index.records, index.keys())
    return scan_shard(
        path,
        caption_key=caption_key,
        max_pixels=limits.max_pixels,
        max_image_bytes=limits.max_image_bytes,
    )


def _tar(
    path: Path, captions: tuple[str, ...], limits: Limits, known: ShardRow | None
) -> Iterator[Row | BadRow]:
    scan = _described(path, captions[0] if captions else None, limits, known)
    problems = iter([finding for finding in scan.findings if finding.key])
    with path.open("rb") as file:
        for key, record in zip(scan.keys, scan.records, strict=True):
            problem = None if record["flags"] & OK else next(problems)
            # where several keys are asked for, it is enough that one of them has text
            if problem is not None and not (problem.reason == "caption" and len(captions) > 1):
                yield BadRow(problem.reason, f"{path.name}: sample {key!r}: {problem.detail}")
                continue
            try:
                yield _row(path, file, key, record, captions)
            except BadRow as bad:
                yield BadRow(bad.reason, f"{path.name}: sample {key!r}: {bad.detail}")
    for finding in scan.findings:
        if not finding.key:
            yield BadRow(finding.reason, f"{path.name}: {finding.detail}")


def _row(path: Path, file: BinaryIO, key: str, record: np.void, captions: tuple[str, ...]) -> Row:
    def read(part: str) -> bytes:
        file.seek(int(record[f"{part}_offset"]))
        return file.read(int(record[f"{part}_size"])) if record[f"{part}_size"] else b""

    caption, data = read("caption"), read("json")
    if text_hash(caption, data) != record["text_xxh3"]:
        raise BadRow("hash", "its caption or JSON has changed since it was indexed")
    meta = load_json(data) if data else {}
    span = Span(path, *(int(record[name]) for name in ("image_offset", "image_size", "image_xxh3")))
    values: dict[str, Any] = {name: meta.get(name) for name in captions}
    text, meta = captions_of(
        values or {"txt": caption.decode("utf-8", "surrogateescape")},
        {name: plain(value) for name, value in meta.items() if plain(value) is not None},
    )
    return Row(span, text, meta, key)
