"""What is wrong with these shards: every tar is read from end to end and compared with its index."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from ..configs.files import resolve_data_path
from .foreign import Progress, quiet, scan_shards, tar_names
from .image_header import MAX_PIXELS
from .index import (
    HEADER,
    MANIFEST,
    OK,
    RECORD,
    Index,
    ShardRow,
    idx_path,
    index_bytes,
    key_hash,
    map_index,
    read_manifest,
)
from .scan import Finding, ShardScan

__all__ = ["VerifyReport", "decode_problem", "verify_folder"]


@dataclass
class VerifyReport:
    """What verifying found. ``notes`` are remarks that are no faults."""

    folder: Path
    shards: int = 0
    samples: int = 0
    """Samples that can be used."""
    findings: list[Finding] = field(default_factory=list[Finding])
    notes: list[str] = field(default_factory=list[str])

    @property
    def reasons(self) -> dict[str, int]:
        """How many findings there are of each reason, the most frequent first."""
        return dict(Counter(finding.reason for finding in self.findings).most_common())

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; ``ok`` is whether nothing was found."""
        return {
            "folder": str(self.folder),
            "ok": not self.findings,
            "shards": self.shards,
            "samples": self.samples,
            "reasons": self.reasons,
            "findings": [asdict(finding) for finding in self.findings],
            "notes": self.notes,
        }


def decode_problem(data: bytes, max_pixels: int = MAX_PIXELS) -> tuple[str, str] | None:
    """Decode an image in full, as training does: None, or the reason and what the decoder says."""
    from .decode import DecodeError, decode_image  # torch, which a look at headers does without

    try:
        decode_image(data, max_pixels=max_pixels)
    except DecodeError as error:
        return error.reason, str(error)
    return None


def verify_folder(
    folder: str | Path,
    *,
    decode: bool = False,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    progress: Progress = quiet,
) -> VerifyReport:
    """Read every tar of a folder and name what is wrong.

    Per shard: missing, not in the manifest, cut or damaged, other bytes than the manifest says, an index
    that is missing or another's. Per sample: without image or caption, blank caption, a repeated key, bytes
    that changed since they were indexed, too many pixels (``max_pixels``), an image whose header (or, with
    ``decode``, whose content) cannot be read. A folder without a manifest is checked as far as that goes.
    Raises UserError if there is nothing to check.
    """
    folder = resolve_data_path(folder)
    report = VerifyReport(folder)
    names = tar_names(folder)
    rows: dict[str, ShardRow] = {}
    if (folder / MANIFEST).exists():
        rows = {row.shard: row for row in read_manifest(folder)}
        for name in names:
            if name not in rows:
                report.findings.append(Finding(name, "", "unlisted", "the manifest does not name it"))
    elif names:
        report.notes.append(f"no {MANIFEST}: hashes and counts are not compared")
    else:
        raise UserError(f"{folder} holds no shards; give a folder of .tar files")
    for name in rows:
        if name not in names:
            report.findings.append(Finding(name, "", "missing", "the manifest names it, but it is not there"))
    hashes: list[NDArray[np.uint64]] = []
    scans = scan_shards(
        folder,
        names,
        "verifying",
        caption_keys=[rows[name].caption_key if name in rows else None for name in names],
        max_pixels=max_pixels,
        check_image=partial(decode_problem, max_pixels=max_pixels) if decode else None,
        workers=workers,
        progress=progress,
    )
    for name, scan in zip(names, scans, strict=True):
        report.shards += 1
        report.samples += int(np.count_nonzero(scan.records["flags"] & 1))
        report.findings += scan.findings
        if name in rows:
            report.findings += _compare(folder, rows[name], scan)
        hashes.append(np.array([key_hash(key) for key in scan.keys], dtype=np.uint64))
    _repeated(report, names, hashes, strict=bool(rows) and not any(row.foreign for row in rows.values()))
    return report


def _compare(folder: Path, row: ShardRow, scan: ShardScan) -> Iterator[Finding]:
    """A shard against its manifest row and its index."""
    name, whole = row.shard, False
    if scan.size != row.bytes:
        yield Finding(name, "", "hash", f"it has {scan.size} bytes, the manifest says {row.bytes}")
    elif f"{scan.xxh3:016x}" != row.xxh3:
        yield Finding(name, "", "hash", "its bytes are not those that the manifest was written for")
    else:
        whole = True
    path = idx_path(folder / name)
    try:
        index = map_index(path)
    except UserError as error:
        yield Finding(name, "", "index", str(error))
        return
    if not index.belongs_to(row):
        yield Finding(name, "", "index", f"{path.name} is not the index that the manifest was written for")
        whole = False
    changed = list(_changed(name, index, scan))
    yield from changed
    if whole and not changed and not _agrees(index, scan):
        yield Finding(name, "", "index", f"{path.name} says other things of its samples than they are")


def _agrees(index: Index, scan: ShardScan) -> bool:
    """Whether an index describes a tar as reading the tar does. Samples that only one of them takes to be
    usable are left aside: they were indexed with other limits, or have a finding of their own."""
    own = index_bytes(scan.size, scan.xxh3, scan.records, scan.keys)
    usable = int(np.count_nonzero(index.records["flags"] & OK))
    if not scan.findings and len(index.records) == usable:
        return own == index.raw.tobytes()
    header = (scan.size, scan.xxh3, len(scan.records), usable)
    if tuple(index.header[["shard_bytes", "shard_xxh3", "n", "n_ok"]].item()) != header:
        return False
    now = np.frombuffer(own, dtype=RECORD, count=len(scan.records), offset=HEADER.itemsize)
    both = (now["flags"] & index.records["flags"] & OK) > 0
    return bool(np.array_equal(now[both], index.records[both]))


def _changed(name: str, index: Index, scan: ShardScan) -> Iterator[Finding]:
    """Samples of the index that the tar no longer holds as they were."""
    found = {key: record for key, record in zip(scan.keys, scan.records, strict=True)}
    reported = {finding.key for finding in scan.findings}
    for key, record in zip(index.keys(), index.records, strict=True):
        now = found.get(key)
        if now is None:
            yield Finding(name, key, "missing", "the index has it, the tar does not")
        elif key not in reported:
            for part, what in (("image_xxh3", "image"), ("text_xxh3", "caption or JSON")):
                if now[part] != record[part]:
                    yield Finding(name, key, "hash", f"its {what} has changed since it was indexed")


def _repeated(
    report: VerifyReport, names: list[str], hashes: list[NDArray[np.uint64]], *, strict: bool
) -> None:
    """Keys that stand in several shards: a fault where the shards were built as one set, else a note."""
    every = np.concatenate(hashes) if hashes else np.zeros(0, dtype=np.uint64)
    values, counts = np.unique(every, return_counts=True)
    repeated = values[counts > 1]
    if not len(repeated):
        return
    if not strict:
        note = f"{len(repeated)} keys stand in several places; a sample is known by its shard and its key"
        report.notes.append(note)
        return
    seen: dict[int, str] = {}
    for name, own in zip(names, hashes, strict=True):
        for record in np.flatnonzero(np.isin(own, repeated)):
            value = int(own[record])
            if value in seen and seen[value] != name:
                report.findings.append(
                    Finding(
                        name,
                        _key(report.folder / name, int(record)),
                        "duplicate",
                        f"{seen[value]} has this key too",
                    )
                )
            seen.setdefault(value, name)


def _key(shard: Path, record: int) -> str:
    try:
        return map_index(idx_path(shard)).key(record)
    except UserError:  # named among the findings
        return f"number {record}"
