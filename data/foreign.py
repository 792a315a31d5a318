"""Indexing tars in place: those that webdataset, img2dataset or open_clip's users wrote become shards."""

import json
from collections import Counter
from collections.abc import Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from .engine import Engine, Progress, quiet
from .index import MAGIC, MANIFEST, ShardRow, idx_path, make_row, read_manifest, write_manifest
from .scan import Finding
from .scanning import USUAL, Limits, ScanLog, local_folder, scan_shards, stamp, tar_names

__all__ = ["IndexReport", "index_folder"]

REPORT = "index_report.json"
UNFINISHED = ".indexing"


@dataclass(frozen=True)
class IndexReport:
    """What indexing found: the manifest's rows, and everything that was left out."""

    rows: list[ShardRow]
    findings: list[Finding]
    kept: int = 0
    """Shards whose index was there and fits; they were not read."""

    @property
    def reasons(self) -> dict[str, int]:
        """How many samples and shards there are of each reason, the most frequent first."""
        return dict(Counter(finding.reason for finding in self.findings).most_common())


def index_folder(
    folder: str | Path,
    *,
    caption_key: str | None = None,
    overwrite: bool = False,
    limits: Limits = USUAL,
    workers: int = 1,
    engine: Engine = "local",
    progress: Progress = quiet,
) -> IndexReport:
    """Write an ``.idx`` beside every tar of ``folder``, then ``sizes.json`` and ``manifest.jsonl``.

    The tars are read and left as they are. Samples that cannot be used (no image, no caption, undecodable
    header, beyond ``limits``, the last one before a cut, a repeated key within a shard) are left out by their
    flags and named in the report and in ``index_report.json``. Keys may repeat from shard to shard.

    Where the folder has an index, the tars that it covers are kept as they are, and those that came since
    are added; ``overwrite`` reads all again. What a killed run had finished is not read again. Raises
    UserError if there are no tars, a tar is gone or is not the one that was indexed (unless ``overwrite``),
    or no sample can be used.
    """
    folder = local_folder(folder, engine)
    names = tar_names(folder)
    _check_before(folder, names, overwrite)
    old = _Old(folder) if not overwrite and (folder / MANIFEST).exists() else None
    kept = {} if old is None else old.kept(names, caption_key)
    log = ScanLog(folder / UNFINISHED, vars(limits))
    if not log.lock():
        raise UserError(f"another process indexes {folder}; wait for it")
    try:
        rows, findings = dict(kept), [] if old is None else old.findings(kept)
        todo = [name for name in names if name not in kept]
        json_keys, ours = Counter[str](), _built_here(folder)
        scans = scan_shards(
            folder, todo, "indexing", caption_keys=[caption_key] * len(todo), limits=limits, log=log,
            workers=workers, engine=engine, progress=progress,
        )  # fmt: skip
        with closing(scans):
            for name, scan in zip(todo, scans, strict=True):
                idx = log.idx(name).read_bytes()
                row = make_row(name, idx, foreign=True, caption_key=caption_key)
                rows[name] = make_row(name, idx) if (name, row.xxh3) in ours and caption_key is None else row
                findings += scan.findings
                json_keys.update(scan.json_keys)
        place = {name: number for number, name in enumerate(names)}
        findings.sort(key=lambda finding: place[finding.shard])
        report = IndexReport([rows[name] for name in names], findings, len(kept))
        if old is not None:
            old.check(rows)
        if not any(row.num_ok for row in report.rows):
            raise UserError(_nothing(folder, report, json_keys, caption_key))
        _publish(folder, report, todo, log)
        log.clear()
    except UserError:
        log.clear()
        raise
    finally:
        log.release()
    return report


class _Old:
    """The index that is there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows = {row.shard: row for row in read_manifest(folder)}
        try:
            report: Any = json.loads((folder / REPORT).read_text(encoding="utf-8"))
            self.stamps: Mapping[str, Any] = report.get("indexed", {})
            self.found = [Finding(**finding) for finding in report["findings"]]
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            self.stamps, self.found = {}, []

    def kept(self, names: list[str], caption_key: str | None) -> dict[str, ShardRow]:
        """Rows of the tars that are as they were, and whose indexes are; UserError where one is not."""
        mend = "copy it again, or make the index anew with --overwrite"
        if gone := [name for name in self.rows if name not in names]:
            raise UserError(f"{self.folder}/{MANIFEST} names {gone[0]}, which is missing; {mend}")
        kept: dict[str, ShardRow] = {}
        for name, row in self.rows.items():
            now = stamp(self.folder / name)
            if now["bytes"] != row.bytes:
                raise UserError(
                    f"{self.folder / name} has {now['bytes']} bytes, {row.bytes} when it was indexed; {mend}"
                )
            if caption_key is not None and caption_key != row.caption_key:
                was = f"'{row.caption_key}' of the JSON" if row.caption_key else "'.txt'"
                raise UserError(
                    f"{self.folder} is indexed with captions from {was}; give --overwrite to change that"
                )
            idx = idx_path(self.folder / name)
            same = self.stamps.get(name, now) == now
            if same and idx.is_file() and xxh3_64_hexdigest(idx.read_bytes()) == row.idx_xxh3:
                kept[name] = row
        return kept

    def findings(self, kept: Mapping[str, ShardRow]) -> list[Finding]:
        """What was found in the kept shards."""
        return [finding for finding in self.found if finding.shard in kept]

    def check(self, rows: Mapping[str, ShardRow]) -> None:
        """UserError if a tar that was read again is another than the one that was indexed."""
        for name, row in self.rows.items():
            if rows[name].xxh3 != row.xxh3:
                raise UserError(
                    f"{self.folder / name} has other bytes than when it was indexed; copy it again, "
                    "or make the index anew with --overwrite"
                )


def _publish(folder: Path, report: IndexReport, todo: list[str], log: ScanLog) -> None:
    """Put the new indexes in their places; the manifest, which makes them valid, comes last."""
    stamps = {row.shard: stamp(folder / row.shard) for row in report.rows}
    if todo or not (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        for name in todo:
            log.idx(name).replace(idx_path(folder / name))
        data = {
            "shards": len(report.rows),
            "samples": sum(row.num_ok for row in report.rows),
            "bad": sum(row.num_bad for row in report.rows),
            "reasons": report.reasons,
            "findings": [asdict(finding) for finding in report.findings],
            "indexed": stamps,
        }
        atomic_write_text(folder / REPORT, json.dumps(data, ensure_ascii=False, indent=1) + "\n")
        write_manifest(folder, report.rows)


def _check_before(folder: Path, names: list[str], overwrite: bool) -> None:
    if not names:
        packed = sorted(p.name for p in folder.iterdir() if p.name.endswith((".tar.gz", ".tgz", ".tar.zst")))
        if packed:
            raise UserError(
                f"{folder}/{packed[0]} is compressed and cannot be read at random; unpack it to .tar"
            )
        raise UserError(f"{folder} holds no .tar files; make shards with `diptych data build`")
    if overwrite or (folder / MANIFEST).exists():
        return
    for name in names:
        path = idx_path(folder / name)
        if path.is_file() and not _begins(path, MAGIC):
            raise UserError(f"{path} is the index of another program; give --overwrite to replace it")


def _begins(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


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
