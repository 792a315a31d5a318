"""Tables and folders into shards: ``diptych data build``."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from .engine import Progress, quiet
from .image_header import MAX_PIXELS, HeaderError, read_header
from .index import fingerprint, read_manifest
from .sources import BadRow, Columns, Row, SourceRow, open_source, read_inside
from .verify import decode_problem
from .writer import RefusedSample, ShardWriter

__all__ = ["BuildReport", "build_shards", "safe_key"]

REPORT, QUARANTINE, FAILED = "build_report.json", "quarantine.jsonl", "build_failed.json"
AHEAD = 64  # rows read and decoded at a time
EARLY = 1000  # bad rows after which a build that is past its limit stops at once


@dataclass
class BuildReport:
    """What became of every row."""

    folder: Path
    sources: list[str]
    rows: int = 0
    written: int = 0
    bad: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    """Bad rows: source, row number, reason, detail."""
    folders: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Samples, shards and fingerprint of each folder of shards: ".", or "train" and "val"."""

    @property
    def reasons(self) -> dict[str, int]:
        """Bad rows by reason, the most frequent first."""
        return dict(Counter(bad["reason"] for bad in self.bad).most_common())

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; the rows themselves are in quarantine.jsonl."""
        return {
            "sources": self.sources,
            "rows": self.rows,
            "written": self.written,
            "bad": len(self.bad),
            "reasons": self.reasons,
            "folders": self.folders,
        }


def safe_key(text: str) -> str:
    """A key that every webdataset reader takes, made from any text: dots, control characters and halves of
    characters become ``_``, what is too long ends in a hash. Keys that are fit stay as they are."""
    key = re.sub(r"[.\x00-\x1f\x7f\ud800-\udfff]", "_", text)
    key = re.sub("/+", "/", key).strip("/")
    key = "k" + key if key.startswith("__") or not key else key
    if len(key.encode()) > 90:
        tail = "-" + xxh3_64_hexdigest(text.encode("utf-8", "surrogateescape"))
        key = key.encode()[: 90 - len(tail)].decode("utf-8", "ignore").rstrip("/") + tail
    return key


def build_shards(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    columns: Columns | None = None,
    root: str | Path | None = None,
    samples_per_shard: int = 1000,
    val_fraction: float = 0.0,
    max_bad_fraction: float = 0.01,
    decode: bool = True,
    overwrite: bool = False,
    workers: int = 2,
    progress: Progress = quiet,
) -> BuildReport:
    """Write shards from tables and folders, in the order given; equal sources give equal bytes.

    ``root``: image paths must lie inside it and are relative to it; None: each table's folder. ``decode``:
    decode every image in full, as training will. ``val_fraction``: make two folders, ``train`` and ``val``,
    the latter with this share of the images, chosen by their bytes, so that copies never part. Keys are the
    key column's, a folder's paths, or row numbers over all sources. ``build_report.json`` counts and
    ``quarantine.jsonl`` lists the rows left out. Raises UserError, with no shards written, if more than
    ``max_bad_fraction`` of the rows are bad or a source cannot be read; ``build_failed.json`` then lists the
    bad rows.
    """
    out = Path(out).expanduser()
    report = BuildReport(out, [str(source) for source in sources])
    opened = [
        open_source(source, columns or Columns(), None if root is None else Path(root).expanduser())
        for source in sources
    ]
    try:
        with (
            ExitStack() as writers,
            ThreadPoolExecutor(max(1, workers)) as pool,
            progress("building", 0) as advance,
        ):
            by_name = {
                name: writers.enter_context(
                    ShardWriter(out / name, samples_per_shard=samples_per_shard, overwrite=overwrite)
                )
                for name in (("train", "val") if val_fraction else (".",))
            }
            for source, rows in zip(report.sources, opened, strict=True):
                while chunk := list(islice(rows, AHEAD)):
                    images = list(pool.map(lambda item: _prepare(item[1], decode), chunk))
                    _write_rows(by_name, val_fraction, report, source, chunk, images)
                    advance(len(chunk))
                    if len(report.bad) >= EARLY:
                        _check_limit(report, max_bad_fraction)
            report.written = sum(writer.count for writer in by_name.values())
            _check_limit(report, max_bad_fraction)
            if empty := [name for name, writer in by_name.items() if not writer.count]:
                raise UserError(
                    f"--val-fraction: {val_fraction} of {report.written} images leaves none for {empty[0]}"
                )
    except UserError:
        if report.bad:
            out.mkdir(parents=True, exist_ok=True)
            atomic_write_text(out / FAILED, _json(report.to_json() | {"bad_rows": report.bad}))
        raise
    for name, writer in by_name.items():
        manifest = read_manifest(out / name)
        samples, shards = writer.count, len(manifest)
        report.folders[name] = {"samples": samples, "shards": shards, "fingerprint": fingerprint(manifest)}
    (out / FAILED).unlink(missing_ok=True)
    atomic_write_text(out / REPORT, _json(report.to_json()))
    (out / QUARANTINE).unlink(missing_ok=True)
    if report.bad:
        atomic_write_text(out / QUARANTINE, "".join(json.dumps(bad) + "\n" for bad in report.bad))
    return report


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"


def _prepare(row: Row | BadRow, decode: bool) -> bytes | BadRow:
    """The image's bytes, looked at; run in threads."""
    if isinstance(row, BadRow):
        return row
    try:
        image = row.image if isinstance(row.image, bytes) else read_inside(row.root, row.image)
        header = read_header(image)
    except BadRow as bad:
        return bad
    except HeaderError as error:
        return BadRow("decode", f"cannot read the image: {error}")
    if header.width * header.height > MAX_PIXELS:
        return BadRow("size", f"the image has {header.width} x {header.height} pixels")
    problem = decode_problem(image) if decode else None
    return image if problem is None else BadRow(*problem)


def _write_rows(
    writers: Mapping[str, ShardWriter],
    val_fraction: float,
    report: BuildReport,
    source: str,
    rows: Sequence[SourceRow],
    images: Sequence[bytes | BadRow],
) -> None:
    """Write rows of one source, and note the bad ones."""
    for (number, row), image in zip(rows, images, strict=True):
        report.rows += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if isinstance(image, BadRow):
                raise image
            key = f"{report.rows:09d}" if row.key is None else row.key
            if len(report.sources) > 1 and Path(source).is_dir():  # two folders may have pictures of one name
                key = f"{Path(source).name}/{key}"
            held_back = xxh3_64_intdigest(image) < val_fraction * 2**64
            writer = writers["."] if not val_fraction else writers["val" if held_back else "train"]
            writer.write(safe_key(key), image, read_header(image).format, row.caption, row.meta)
        except (BadRow, RefusedSample) as bad:
            detail = bad.detail if isinstance(bad, BadRow) else str(bad)
            report.bad.append({"source": source, "row": number, "reason": bad.reason, "detail": detail})


def _check_limit(report: BuildReport, max_bad_fraction: float) -> None:
    if not report.rows:
        raise UserError(f"{', '.join(report.sources)}: no rows; a source holds pairs of image and text")
    fraction = len(report.bad) / report.rows
    if fraction > max_bad_fraction or len(report.bad) == report.rows:
        first = report.bad[0]
        counts = ", ".join(f"{reason} {count}" for reason, count in report.reasons.items())
        raise UserError(
            f"{len(report.bad)} of {report.rows} rows are bad ({counts}), the first is row {first['row']} of "
            f"{first['source']}: {first['detail']}; mend them, all are in {report.folder / FAILED}, "
            "or allow more with --max-bad-fraction"
        )
