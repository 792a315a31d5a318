"""Indexing tars in place: those that webdataset, img2dataset or open_clip's users wrote become shards."""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from .image_header import MAX_PIXELS
from .index import MAGIC, MANIFEST, ShardRow, idx_path, index_bytes, make_row, read_manifest, write_manifest
from .scan import Check, Finding, ShardScan, scan_shard

__all__ = ["IndexReport", "Progress", "index_folder", "quiet", "scan_shards", "tar_names"]

REPORT = "index_report.json"

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""``progress(what, total)`` gives a context in which a function is told of every bit done."""


def quiet(what: str, total: int) -> AbstractContextManager[Callable[[int], object]]:
    """A progress that shows nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class IndexReport:
    """What indexing found: the manifest's rows, and everything that was left out."""

    rows: list[ShardRow]
    findings: list[Finding]

    @property
    def reasons(self) -> dict[str, int]:
        """How many samples and shards there are of each reason, the most frequent first."""
        return dict(Counter(finding.reason for finding in self.findings).most_common())


def tar_names(folder: Path) -> list[str]:
    """Names of the tars in a folder, sorted; UserError if there is no folder."""
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; give a folder of tars")
    return sorted(p.name for p in folder.glob("*.tar") if p.is_file() and not p.name.startswith("."))


def scan_shards(
    folder: Path,
    names: Sequence[str],
    what: str,
    *,
    caption_keys: Sequence[str | None],
    max_pixels: int = MAX_PIXELS,
    check_image: Check | None = None,
    workers: int = 1,
    progress: Progress = quiet,
) -> Iterator[ShardScan]:
    """Scan shards in order, ``workers`` at a time in processes of their own; ``caption_keys``: one per
    shard."""
    scan = partial(_scan, max_pixels=max_pixels, check_image=check_image)
    paths = [folder / name for name in names]
    with progress(what, len(names)) as advance:
        if workers <= 1 or len(names) <= 1:
            for path, caption_key in zip(paths, caption_keys, strict=True):
                yield scan(path, caption_key)
                advance(1)
            return
        pool = ProcessPoolExecutor(min(workers, len(names)), mp_context=get_context("spawn"))
        try:
            for got in pool.map(scan, paths, caption_keys):
                yield got
                advance(1)
        finally:
            pool.shutdown(cancel_futures=True)


def _scan(path: Path, caption_key: str | None, *, max_pixels: int, check_image: Check | None) -> ShardScan:
    return scan_shard(path, caption_key=caption_key, max_pixels=max_pixels, check_image=check_image)


def index_folder(
    folder: str | Path,
    *,
    caption_key: str | None = None,
    overwrite: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    progress: Progress = quiet,
) -> IndexReport:
    """Write an ``.idx`` beside every tar of ``folder``, then ``sizes.json`` and ``manifest.jsonl``.

    The tars are read and left as they are. Samples that cannot be used (no image, no caption, undecodable
    header, the last one before a cut, a repeated key within a shard) are left out by their flags and named
    in the report and in ``index_report.json``. Keys may repeat from shard to shard.

    Raises UserError if there are no tars, an index exists (unless ``overwrite``), or no sample can be used.
    """
    folder = Path(folder).expanduser()
    names = tar_names(folder)
    _check_before(folder, names, overwrite)
    rows, findings = list[ShardRow](), list[Finding]()
    json_keys = Counter[str]()
    ours = _built_here(folder)
    try:
        scans = scan_shards(
            folder,
            names,
            "indexing",
            caption_keys=[caption_key] * len(names),
            max_pixels=max_pixels,
            workers=workers,
            progress=progress,
        )
        for name, scan in zip(names, scans, strict=True):
            idx = index_bytes(scan.size, scan.xxh3, scan.records, scan.keys)
            _new(folder, name).write_bytes(idx)
            row = make_row(name, idx, foreign=True, caption_key=caption_key)
            rows.append(make_row(name, idx) if (name, row.xxh3) in ours and caption_key is None else row)
            findings += scan.findings
            json_keys.update(scan.json_keys)
        report = IndexReport(rows, findings)
        if not any(row.num_ok for row in rows):
            raise UserError(_nothing(folder, report, json_keys, caption_key))
        (folder / MANIFEST).unlink(missing_ok=True)
        for name in names:
            _new(folder, name).replace(idx_path(folder / name))
    finally:
        for name in names:
            _new(folder, name).unlink(missing_ok=True)
    _write_report(folder, report)
    write_manifest(folder, rows)
    return report


def _check_before(folder: Path, names: list[str], overwrite: bool) -> None:
    if not names:
        packed = sorted(p.name for p in folder.iterdir() if p.name.endswith((".tar.gz", ".tgz", ".tar.zst")))
        if packed:
            raise UserError(
                f"{folder}/{packed[0]} is compressed and cannot be read at random; unpack it to .tar"
            )
        raise UserError(f"{folder} holds no .tar files; make shards with `diptych data build`")
    if overwrite:
        return
    if (folder / MANIFEST).exists():
        raise UserError(f"{folder} has an index already; give --overwrite to make it again")
    for name in names:
        path = idx_path(folder / name)
        if path.is_file() and not path.read_bytes().startswith(MAGIC):
            raise UserError(f"{path} is the index of another program; give --overwrite to replace it")


def _new(folder: Path, name: str) -> Path:
    return folder / f".{Path(name).stem}.idx.new"


def _built_here(folder: Path) -> set[tuple[str, str]]:
    """Name and hash of the shards that the old manifest says were built, not indexed in place."""
    try:
        return {(row.shard, row.xxh3) for row in read_manifest(folder) if not row.foreign}
    except UserError:
        return set()


def _nothing(folder: Path, report: IndexReport, json_keys: Counter[str], caption_key: str | None) -> str:
    if report.reasons.get("caption") and json_keys:
        keys = ", ".join(name for name, _ in json_keys.most_common(8))
        where = f"'{caption_key}' of the JSON" if caption_key is not None else "'.txt'"
        return (
            f"{folder}: no sample has a caption in {where}; the JSON has text under {keys}: "
            "choose with --caption-key"
        )
    first = f"; the first: {report.findings[0]}" if report.findings else ": the tars hold no samples"
    return f"{folder} holds no usable sample ({len(report.findings)} findings){first}"


def _write_report(folder: Path, report: IndexReport) -> None:
    data = {
        "shards": len(report.rows),
        "samples": sum(row.num_ok for row in report.rows),
        "bad": sum(row.num_bad for row in report.rows),
        "reasons": report.reasons,
        "findings": [asdict(finding) for finding in report.findings],
    }
    atomic_write_text(folder / REPORT, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
