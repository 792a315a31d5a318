"""Which training samples also stand in an evaluation set: the same picture, nearly the same, or the caption.

What is found can be written as the filter that takes them out of the training (a source's ``drop``).
"""

import functools
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from ..configs.files import resolve_data_path, temporary_beside
from .canonical import caption_hash
from .engine import Engine, Progress, here, quiet, run_tasks
from .image_header import MAX_PIXELS
from .index import OK
from .scan import Finding
from .shards import DamagedSample, ShardSet, open_shards

__all__ = ["MATCHES", "MAX_DISTANCE", "OverlapReport", "find_overlap"]

MATCHES = ("image", "similar-image", "caption")
"""What can be compared: the image's bytes, its perceptual hash, the canonical caption."""
MAX_DISTANCE = 6
"""Bits of 64 in which the perceptual hashes of one picture may differ. The nearest of
540,000 unrelated pairs differed in 13; a copy that lost 4 % at every side is still found."""
READ_SIDE = 128
KEPT = 1000  # findings that the report holds; the filter has all


@dataclass
class OverlapReport:
    """What two data sets have in common."""

    folder: str
    against: list[str]
    samples: int = 0
    """Training samples that were compared."""
    matched: int = 0
    """Training samples that also stand in an evaluation set."""
    unread: int = 0
    """Samples of either side that are damaged: of their pictures only the bytes' hashes were compared."""
    reasons: Counter[str] = field(default_factory=Counter[str])
    """Findings by reason."""
    findings: list[Finding] = field(default_factory=list[Finding])
    """The first 1,000."""

    def to_json(self) -> dict[str, Any]:
        """The report as plain data; ``ok`` is whether nothing was found."""
        return vars(self) | {
            "ok": not self.matched,
            "reasons": dict(self.reasons.most_common()),
            "findings": [asdict(finding) for finding in self.findings],
        }


@dataclass(frozen=True)
class _Signatures:
    """What is compared, of the samples of a shard or of whole sets: 0 where a sample has no such value."""

    images: NDArray[np.uint64]
    """xxh3 of the bytes, [n]."""
    hashes: NDArray[np.uint64]
    """Perceptual hashes, [n, len(CROPS)]."""
    captions: NDArray[np.int64]
    unread: int = 0


def find_overlap(
    folder: str | Path,
    against: Sequence[str | Path],
    *,
    match: Sequence[str] = MATCHES,
    max_distance: int = MAX_DISTANCE,
    write_filter: str | Path | None = None,
    max_pixels: int = MAX_PIXELS,
    workers: int = 1,
    engine: Engine = "local",
    progress: Progress = quiet,
) -> OverlapReport:
    """Compare the shards of ``folder`` with those of the evaluation sets in ``against``.

    ``match``: some of ``MATCHES``. Pictures are similar if their perceptual hashes, or the hash of one and
    that of a crop of the other, differ in at most ``max_distance`` bits; pictures that show next to nothing
    (``phash``) are compared by their bytes alone. ``write_filter``: a Parquet file with the columns key,
    shard, reason and detail, a row for every finding. About 110 bytes of memory per evaluation sample are
    needed, and nothing per training sample. Raises UserError as ``open_shards`` does.
    """
    if unknown := [name for name in match if name not in MATCHES]:
        raise UserError(f"--match: '{unknown[0]}' must be some of {', '.join(MATCHES)}")
    if not against or not match:
        raise UserError("--against and --match need at least one value")
    if engine == "ray":
        folder, *against = (_everywhere(path) for path in (folder, *against))
    train, sets = open_shards(folder), [open_shards(path) for path in against]
    for path, other in zip(against, sets, strict=True):
        if other.fingerprint == train.fingerprint:
            raise UserError(f"--against {path} is the data set itself; give an evaluation set")
    read = functools.partial(_signatures, tuple(match), max_pixels)
    tasks = [
        (str(path), shard) for path, other in zip(against, sets, strict=True) for shard in _shards(other)
    ]
    parts: list[_Signatures] = []
    with (
        progress("reading evaluation sets", len(tasks)) as advance,
        closing(run_tasks(read, tasks, workers=workers, engine=engine)) as results,
    ):
        for part in results:
            parts.append(part)
            advance(1)
    reference = _Signatures(
        images=np.concatenate([part.images for part in parts]),
        hashes=np.concatenate([part.hashes for part in parts]),
        captions=np.concatenate([part.captions for part in parts]),
    )
    report = OverlapReport(str(folder), [str(path) for path in against], len(train))
    report.unread = sum(part.unread for part in parts)
    compare = functools.partial(_compare, read, reference, max_distance)
    tasks = [(str(folder), shard) for shard in _shards(train)]
    with ExitStack() as stack:
        write = stack.enter_context(_Filter(write_filter)) if write_filter is not None else None
        advance = stack.enter_context(progress("comparing", len(tasks)))
        compared = stack.enter_context(closing(run_tasks(compare, tasks, workers=workers, engine=engine)))
        for (_, shard), (found, unread) in zip(tasks, compared, strict=True):
            findings = list(_name(train, shard, found, sets, against))
            report.unread += unread
            report.matched += len({finding.key for finding in findings})
            report.reasons.update(finding.reason for finding in findings)
            report.findings += findings[: KEPT - len(report.findings)]
            if write is not None:
                write.add(findings)
            advance(1)
    return report


def _everywhere(path: str | Path) -> str:
    """A place as every worker finds it."""
    return str(path) if "://" in str(path) else str(here(resolve_data_path(path), "ray"))


def _shards(shards: ShardSet) -> list[int]:
    return [number for number, size in enumerate(shards.shard_sizes.tolist()) if size]


@functools.lru_cache(maxsize=8)
def _opened(folder: str) -> ShardSet:
    return open_shards(folder)


def _signatures(match: tuple[str, ...], max_pixels: int, task: tuple[str, int]) -> _Signatures:
    """Look at the samples of one shard."""
    from .phash import CROPS

    shards, shard = _opened(task[0]), task[1]
    first, n = int(shards.shard_sizes[:shard].sum()), int(shards.shard_sizes[shard])
    images, captions = np.zeros(n, np.uint64), np.zeros(n, np.int64)
    hashes, unread = np.zeros((n, len(CROPS)), np.uint64), 0
    records = shards.records(shard)
    if "image" in match:
        images[:] = records["image_xxh3"][(records["flags"] & OK) > 0]
    for number in range(n) if set(match) - {"image"} else ():
        try:
            raw = shards.read(first + number)
            captions[number] = caption_hash(raw.caption) if "caption" in match else 0
            hashes[number] = _shown(raw.image, max_pixels) if "similar-image" in match else 0
        except (DamagedSample, ValueError):  # DecodeError is one
            unread += 1
    return _Signatures(images, hashes, captions, unread)


def _shown(image: bytes, max_pixels: int) -> NDArray[np.uint64] | int:
    """The perceptual hashes of an image, 0 if it shows too little."""
    from .decode import decode_image  # torch, which comparing bytes does without
    from .phash import perceptual_hashes

    pixels = decode_image(image, max_pixels=max_pixels, least=READ_SIDE).permute(1, 2, 0)
    found = perceptual_hashes(np.ascontiguousarray(pixels.numpy()))
    return 0 if found is None else found


_Match = tuple[int, str, int, int]
"""A sample's number in its shard, the reason, the sample of the evaluation sets, the distance."""


def _compare(
    read: functools.partial[_Signatures], reference: _Signatures, max_distance: int, task: tuple[str, int]
) -> tuple[list[_Match], int]:
    own = read(task)
    found: list[_Match] = []
    for reason, values, known in (
        ("image", own.images, reference.images),
        ("caption", own.captions, reference.captions),
    ):
        order = np.argsort(known, kind="stable")
        place = np.minimum(np.searchsorted(known, values, sorter=order), len(known) - 1)
        same = (known[order[place]] == values) & (values != 0)
        found += [(number, reason, int(order[place[number]]), 0) for number in np.flatnonzero(same).tolist()]
    identical = {number for number, reason, *_ in found if reason == "image"}
    shown = np.flatnonzero(reference.hashes[:, 0])  # the others show too little
    hashes = reference.hashes[shown]
    for number in np.flatnonzero(own.hashes[:, 0]).tolist() if len(shown) else ():
        if number not in identical:
            distance, at = _nearest(own.hashes[number], hashes)
            if distance <= max_distance:
                found.append((number, "similar-image", int(shown[at]), distance))
    return sorted(found), own.unread


def _nearest(one: NDArray[np.uint64], others: NDArray[np.uint64]) -> tuple[int, int]:
    """Bits between a picture and the nearest of others, and which one that is: it against their crops, and
    its crops against them."""
    from .phash import distances

    apart = distances(one[0], others.reshape(-1))
    at = int(apart.argmin())
    best = int(apart[at]), at // others.shape[1]
    whole = np.ascontiguousarray(others[:, 0])
    for crop in one[1:]:
        apart = distances(crop, whole)
        at = int(apart.argmin())
        best = min(best, (int(apart[at]), at))
    return best


def _name(
    train: ShardSet,
    shard: int,
    found: Sequence[_Match],
    sets: Sequence[ShardSet],
    against: Sequence[str | Path],
) -> Iterator[Finding]:
    """Findings as people read them."""
    first = int(train.shard_sizes[:shard].sum())
    ends = np.cumsum([len(other) for other in sets])
    for number, reason, place, distance in found:
        at = int(np.searchsorted(ends, place, side="right"))
        sample_id = place - (int(ends[at - 1]) if at else 0)
        other = f"sample {sets[at].key_of(sample_id)!r} of {against[at]}"
        detail = {
            "image": f"its image is that of {other}",
            "caption": f"its caption is that of {other}",
            "similar-image": f"its image is like that of {other}, {distance} of 64 bits apart",
        }[reason]
        yield Finding(train.shard_names[shard], train.key_of(first + number), reason, detail)


class _Filter:
    """The Parquet file of a filter; whole or absent."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.suffix != ".parquet":
            raise UserError(f"--write-filter {path}: the filter is Parquet; name it {self.path.stem}.parquet")
        if not self.path.parent.is_dir():
            raise UserError(f"--write-filter {path}: there is no folder {self.path.parent}; make it first")

    def __enter__(self) -> "_Filter":
        import pyarrow
        import pyarrow.parquet

        names = ("key", "shard", "reason", "detail")
        self._schema = pyarrow.schema([(name, pyarrow.string()) for name in names])
        self._stack = ExitStack()
        temporary = self._stack.enter_context(temporary_beside(self.path))
        self._writer = self._stack.enter_context(pyarrow.parquet.ParquetWriter(temporary, self._schema))
        return self

    def add(self, findings: Sequence[Finding]) -> None:
        """Append rows."""
        import pyarrow

        if findings:
            # half characters, which names in foreign tars may have, are not for Parquet
            rows = [
                {name: text.encode(errors="replace").decode() for name, text in asdict(finding).items()}
                for finding in findings
            ]
            self._writer.write_table(pyarrow.Table.from_pylist(rows, schema=self._schema))

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)
