"""What is wrong with these shards: every tar is read from end to end and compared with its index."""

import json
from collections import Counter
from collections.abc import Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_64_hexdigest

from ..configs.errors import UserError
from ..configs.files import cache_dir
from .engine import Engine, Progress, quiet
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
from .repeats import HashColumn, Place
from .scan import Finding, ShardScan
from .scanning import USUAL, Limits, ScanLog, local_folder, scan_shards, tar_names

__all__ = ["VerifyReport", "decode_problem", "verify_folder"]

SHOWN = 3  # copies that the note names


@dataclass
class VerifyReport:
    """What verifying found. ``notes`` are remarks that are no faults."""

    folder: Path
    shards: int = 0
    samples: int = 0
    """Samples that can be used."""
    copies: int = 0
    """Images that are there again, byte for byte."""
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
            "copied_images": self.copies,
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
    duplicates: bool = False,
    limits: Limits = USUAL,
    workers: int = 1,
    engine: Engine = "local",
    progress: Progress = quiet,
) -> VerifyReport:
    """Read every tar of a folder and name what is wrong.

    Per shard: missing, not in the manifest, cut or damaged, other bytes than the manifest says, an index
    that is missing, another's or untrue. Per sample: without image or caption, blank caption, a repeated
    key, bytes that changed since they were indexed, an image beyond ``limits``, an image whose header (or,
    with ``decode``, whose content) cannot be read. Images that are there several times, byte for byte, are
    counted in the notes and, with ``duplicates``, are faults. A folder without a manifest is checked as far
    as that goes. What a killed run had read is not read again. Raises UserError if there is nothing to check.
    """
    folder = local_folder(folder, engine)
    report = VerifyReport(folder)
    names, rows = _listed(folder, report)
    caption_keys = [rows[name].caption_key if name in rows else None for name in names]
    with HashColumn() as keys, HashColumn() as images, _open_log(folder, decode, limits) as log:
        if log is not None and (done := sum(map(log.has, (folder / name for name in names), caption_keys))):
            report.notes.append(f"{done} of {len(names)} shards were read by a run that was stopped")
        check = partial(decode_problem, max_pixels=limits.max_pixels) if decode else None
        scans = scan_shards(
            folder, names, "verifying", caption_keys=caption_keys, limits=limits, check_image=check, log=log,
            workers=workers, engine=engine, progress=progress,
        )  # fmt: skip
        with closing(scans):
            for name, scan in zip(names, scans, strict=True):
                report.shards += 1
                report.samples += int(np.count_nonzero(scan.records["flags"] & OK))
                report.findings += scan.findings
                if name in rows:
                    report.findings += _compare(folder, rows[name], scan)
                keys.append(np.array([key_hash(key) for key in scan.keys], dtype=np.uint64))
                images.append(scan.records["image_xxh3"])
        names_of = _Names(folder, names, log)
        built = bool(rows) and not any(row.foreign for row in rows.values())
        _repeated_keys(report, keys, names_of, strict=built)
        _copied_images(report, images, names_of, strict=duplicates)
        if log is not None:
            log.clear()
    return report


def _listed(folder: Path, report: VerifyReport) -> tuple[list[str], dict[str, ShardRow]]:
    """The tars of the folder and the rows of its manifest; where they differ is reported."""
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
    return names, rows


@contextmanager
def _open_log(folder: Path, decode: bool, limits: Limits) -> Generator[ScanLog | None]:
    """Where finished scans are kept until all are; None where another run holds it or it cannot be."""
    settings = {"folder": str(folder.resolve()), "decode": decode, **vars(limits)}
    log = ScanLog(cache_dir() / "verify" / xxh3_64_hexdigest(json.dumps(settings).encode()), settings)
    try:
        locked = log.lock()
    except OSError:
        locked = False
    try:
        yield log if locked else None
    finally:
        log.release()


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


class _Names:
    """Shard and key of a place."""

    def __init__(self, folder: Path, names: list[str], log: ScanLog | None) -> None:
        self.folder, self.names, self._log = folder, names, log

    def shard(self, place: Place) -> str:
        return self.names[place[0]]

    def key(self, place: Place) -> str:
        name = self.names[place[0]]
        try:
            return map_index(self._log.idx(name) if self._log else idx_path(self.folder / name)).key(place[1])
        except (UserError, IndexError):  # named among the findings
            return f"number {place[1]}"

    def say(self, place: Place) -> str:
        return f"sample {self.key(place)!r} of {self.shard(place)}"


def _repeated_keys(report: VerifyReport, keys: HashColumn, names: _Names, *, strict: bool) -> None:
    """Keys that stand in several shards: a fault where the shards were built as one set, else a note."""
    count = 0
    for first, *others in keys.repeats():
        count += 1
        report.findings += [
            Finding(
                names.shard(place), names.key(place), "duplicate", f"{names.shard(first)} has this key too"
            )
            for place in others
            if strict and place[0] != first[0]
        ]
    if count and not strict:
        report.notes.append(
            f"{count} keys stand in several places; a sample is known by its shard and its key"
        )


def _copied_images(report: VerifyReport, images: HashColumn, names: _Names, *, strict: bool) -> None:
    """Images that are there again: faults, or a note with the first ones."""
    shown = list[str]()
    for first, *others in images.repeats():
        report.copies += len(others)
        if strict:
            report.findings += [
                Finding(
                    names.shard(place),
                    names.key(place),
                    "duplicate-image",
                    f"its image is that of {names.say(first)}",
                )
                for place in others
            ]
        elif len(shown) < SHOWN:
            shown.append(f"{names.say(others[0])} has the image of {names.say(first)}")
    if report.copies and not strict:
        report.notes.append(
            f"{report.copies} images are copies; --duplicates names them all: {', '.join(shown)}"
        )
