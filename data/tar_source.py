"""Tars as a source of pairs: the samples that indexing would find, their images still in the tar."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..configs.errors import UserError
from .index import MANIFEST, OK, load_json, read_manifest
from .scan import scan_shard
from .scanning import Limits
from .sources import BadRow, Columns, Row, SourceRow, Span, captions_of, plain

__all__ = ["tar_rows"]


def tar_rows(folder: Path, names: Sequence[str], columns: Columns, limits: Limits) -> Iterator[SourceRow]:
    """The samples of tars, one tar after the other; each tar is read once for it. The caption is ``.txt``, or
    the keys of the JSON that ``columns`` names, or the one that the folder was indexed with. What cannot be
    used is a BadRow."""
    indexed: dict[str, str | None] = {}
    if (folder / MANIFEST).is_file():
        indexed = {row.shard: row.caption_key for row in read_manifest(folder)}
    if columns.image is not None or columns.key is not None:
        raise UserError(f"{folder}: tars have no columns; leave --image and --key out")
    number = 0
    for name in names:
        captions = columns.captions or ((indexed[name],) if indexed.get(name) else ())
        for row in _tar(folder / name, tuple(map(str, captions)), limits):
            number += 1
            if columns.prefix_keys and isinstance(row, Row):
                row = replace(row, key=f"{Path(name).stem}/{row.key}")
            yield number, row


def _tar(path: Path, captions: tuple[str, ...], limits: Limits) -> Iterator[Row | BadRow]:
    scan = scan_shard(path, max_pixels=limits.max_pixels, max_image_bytes=limits.max_image_bytes,
                      caption_key=captions[0] if captions else None)  # fmt: skip
    problems = iter([finding for finding in scan.findings if finding.key])
    with path.open("rb") as file:

        def read(record: np.void, part: str) -> bytes:
            file.seek(int(record[f"{part}_offset"]))
            return file.read(int(record[f"{part}_size"])) if record[f"{part}_size"] else b""

        for key, record in zip(scan.keys, scan.records, strict=True):
            usable = bool(record["flags"] & OK)
            problem = None if usable else next(problems)
            # where several keys are asked for, it is enough that one of them has text
            if problem is not None and not (problem.reason == "caption" and len(captions) > 1):
                yield BadRow(problem.reason, f"{path.name}: sample {key!r}: {problem.detail}")
                continue
            meta = load_json(read(record, "json")) if record["json_size"] else {}
            span = Span(path, *(int(record[name]) for name in ("image_offset", "image_size", "image_xxh3")))
            values: dict[str, Any] = {name: meta.get(name) for name in captions}
            try:
                caption, meta = captions_of(
                    values or {"txt": read(record, "caption").decode("utf-8")},
                    {name: plain(value) for name, value in meta.items() if plain(value) is not None},
                )
            except BadRow as bad:
                bad = BadRow(bad.reason, f"{path.name}: sample {key!r}: {bad.detail}")
                yield bad
                continue
            yield Row(span, caption, meta, key)
    for finding in scan.findings:
        if not finding.key:
            yield BadRow(finding.reason, f"{path.name}: {finding.detail}")
