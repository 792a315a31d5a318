"""Tables, folders and tars into shards: ``diptych data build``.

The rows are cut into parts, which any number of processes make into pieces of shards; the finished pieces
then become shards, in the order of the rows, so that equal sources give equal bytes.
"""

import fcntl
import functools
import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from .engine import Engine, Progress, here, quiet, run_tasks
from .index import MANIFEST, ShardRow, fingerprint, idx_path, make_row, map_index
from .parts import END_BYTES, Made, Part, PartRow, Piece, Settings, make_part
from .recode import Recode
from .repeats import HashColumn
from .scanning import USUAL, Limits
from .sources import Columns, open_source
from .writer import OpenShard, old_shards, publish, remove_shards

__all__ = ["BuildReport", "build_shards", "safe_key"]

REPORT, QUARANTINE, FAILED = "build_report.json", "quarantine.jsonl", "build_failed.json"
STAGING, MOVING = ".building", "moving.json"
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
    kept: int = 0
    """Rows that an earlier run, which did not end, had made into pieces already."""
    anew: int = 0
    """Rows of which it had too, but from other rows or settings; they were made again."""

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
    recode: Recode | None = None,
    limits: Limits = USUAL,
    overwrite: bool = False,
    workers: int = 1,
    engine: Engine = "local",
    progress: Progress = quiet,
) -> BuildReport:
    """Write shards from tables, folders and tars, in the order given; equal sources give equal bytes.

    ``root``: image paths must lie inside it and are relative to it; None: each table's folder. ``decode``:
    decode every image in full, as training will. ``recode``: make images smaller or write them in another
    format. ``val_fraction``: make two folders, ``train`` and ``val``, the latter with this share of the
    images, chosen by their bytes, so that copies never part. Keys are the key column's, a folder's
    paths, a tar's keys, or row numbers over all sources.

    ``workers`` processes (or Ray, ``engine``) make ``samples_per_shard`` rows at a time into pieces, under
    ``.building``; a shard is one piece, or several small ones. After a kill, the same call takes over what
    was finished and is unchanged. ``build_report.json`` counts and ``quarantine.jsonl`` lists the rows left
    out. Raises UserError, with no shards written, if more than ``max_bad_fraction`` of the rows are bad or a
    source cannot be read; ``build_failed.json`` then lists the bad rows.
    """
    if samples_per_shard < 1:
        raise UserError("samples_per_shard must be at least 1")
    out, sources = here(out, engine), [here(source, engine) for source in sources]
    report = BuildReport(out, [str(source) for source in sources])
    columns, root = columns or Columns(), None if root is None else here(root, engine)

    def parts() -> Iterator[Part]:
        opened = [open_source(source, columns, root, limits) for source in sources]
        return _parts(report.sources, opened, samples_per_shard)

    _refuse_other_shape(out, val_fraction)
    settings = Settings(out / STAGING, val_fraction, decode, limits, recode or Recode())
    try:
        with _staged(out, settings, overwrite=overwrite), progress("building", 0) as advance:
            make = functools.partial(make_part, settings)
            made: list[Made] = []
            with closing(run_tasks(make, parts(), workers=workers, engine=engine)) as results:
                for one in results:
                    made.append(one)
                    advance(one.rows)
                    _count(report, [one])
                    if len(report.bad) >= EARLY:
                        _check_limit(report, max_bad_fraction)
            if taken := _repeated_keys(settings, made):
                again = (replace(p, taken=frozenset(taken[p.number])) for p in parts() if p.number in taken)
                with closing(run_tasks(make, again, workers=workers, engine=engine)) as results:
                    for one in results:
                        first = made[one.number]
                        made[one.number] = replace(one, kept=first.kept, anew=first.anew)
                report = _count(BuildReport(out, report.sources), made)
            _check_limit(report, max_bad_fraction)
            pieces = {
                name: [p for m in made for p in m.pieces if p.folder == name] for name in settings.folders
            }
            if empty := [name for name, own in pieces.items() if not own]:
                raise UserError(
                    f"--val-fraction: {val_fraction} of {report.written} images leaves none for {empty[0]}"
                )
            for name, own in pieces.items():
                report.folders[name] = _publish(settings, name, own, samples_per_shard, overwrite=overwrite)
    except UserError:
        if report.bad:
            out.mkdir(parents=True, exist_ok=True)
            atomic_write_text(out / FAILED, _json(report.to_json() | {"bad_rows": report.bad}))
        raise
    (out / FAILED).unlink(missing_ok=True)
    atomic_write_text(out / REPORT, _json(report.to_json()))
    (out / QUARANTINE).unlink(missing_ok=True)
    if report.bad:
        atomic_write_text(out / QUARANTINE, "".join(json.dumps(bad) + "\n" for bad in report.bad))
    return report


def _json(data: dict[str, Any]) -> str:
    return json.dumps(data, indent=1) + "\n"


@contextmanager
def _staged(out: Path, settings: Settings, *, overwrite: bool) -> Generator[None]:
    """The folder for pieces, ours alone. It stays if the block fails and has finished parts."""
    staging = settings.staging
    for name in settings.folders:
        if not _moving(staging):
            old_shards(out / name, overwrite=overwrite)
    try:
        staging.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write shards to {out}: {error.strerror}") from error
    lock = os.open(staging, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise UserError(f"another process writes shards to {out}; wait for it") from error
    except OSError:  # a file system without locks
        pass
    try:
        for name, shards in _moving(staging).items():
            for shard, size in shards.items():
                path = out / name / shard
                if path.exists() and path.stat().st_size != size:
                    raise UserError(f"{path} is not what a killed build left; choose an empty folder")
            remove_shards(out / name, list(shards))
        (staging / MOVING).unlink(missing_ok=True)
        yield
        shutil.rmtree(staging)
    finally:
        if staging.exists() and not any(staging.glob("*.json")):
            shutil.rmtree(staging)
            with suppress(OSError):  # a folder that we made and that stayed empty
                out.rmdir()
        os.close(lock)


def _moving(staging: Path) -> dict[str, dict[str, int]]:
    """The shards by folder, old and new, that a build was replacing when it was killed, with their bytes."""
    try:
        return json.loads((staging / MOVING).read_text())
    except (OSError, ValueError):
        return {}


def _parts(sources: Sequence[str], opened: Sequence[Iterable[Any]], size: int) -> Iterator[Part]:
    """The rows of all sources, ``size`` at a time, each with its key."""
    rows: list[PartRow] = []
    number = 0
    every = chain.from_iterable(((source, *item) for item in given) for source, given in enumerate(opened))
    for count, (source, place, row) in enumerate(every, 1):
        given = getattr(row, "key", None)
        key = f"{count:09d}" if given is None else given
        path = Path(sources[source])
        # two folders may have pictures of one name
        if len(sources) > 1 and given is not None and path.is_dir():
            key = f"{path.name}/{key}"
        rows.append(PartRow(source, place, safe_key(key), row))
        if len(rows) == size:
            yield Part(number, rows)
            number, rows = number + 1, []
    if rows:
        yield Part(number, rows)


def _count(report: BuildReport, made: Iterable[Made]) -> BuildReport:
    for one in made:
        report.rows += one.rows
        report.written += sum(piece.samples for piece in one.pieces)
        report.bad += [bad | {"source": report.sources[bad["source"]]} for bad in one.bad]
        report.kept += one.rows if one.kept else 0
        report.anew += one.rows if one.anew else 0
    return report


def _repeated_keys(settings: Settings, made: Sequence[Made]) -> dict[int, set[tuple[str, str]]]:
    """By part, folder and key of the samples whose key an earlier part has."""
    taken: dict[int, set[tuple[str, str]]] = {}
    for name in settings.folders:
        pieces = [(one.number, piece) for one in made for piece in one.pieces if piece.folder == name]
        indexes = [idx_path(settings.staging / piece.name) for _, piece in pieces]
        with HashColumn() as hashes:
            for path in indexes:
                hashes.append(map_index(path).records["key_hash"])
            for group in hashes.repeats():
                seen: set[str] = set()
                for piece, record in group:
                    key = map_index(indexes[piece]).key(record)
                    if key in seen:
                        taken.setdefault(pieces[piece][0], set()).add((name, key))
                    seen.add(key)
    return taken


def _publish(
    settings: Settings, name: str, pieces: Sequence[Piece], samples_per_shard: int, *, overwrite: bool
) -> dict[str, Any]:
    """Make the pieces of a folder the shards of a set: each run of pieces that fits becomes one."""
    staging, folder = settings.staging, settings.staging.parent / name
    runs: list[list[Piece]] = []
    for piece in pieces:
        run = runs[-1] if runs else []
        joined = [*run, piece]
        fits = sum(p.samples for p in joined) <= samples_per_shard
        if run and fits and sum(p.payload for p in joined) <= END_BYTES:
            runs[-1] = joined
        else:
            runs.append([piece])
    ready = staging / f"{name.strip('.') or 'all'}-shards"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    rows = [_join(staging, ready / f"{number:05d}.tar", run) for number, run in enumerate(runs)]
    folder.mkdir(parents=True, exist_ok=True)
    old = old_shards(folder, overwrite=overwrite)
    if old:  # out of the way first, so that a name stands for one size
        sizes = {shard: (folder / shard).stat().st_size for shard in old if (folder / shard).exists()}
        atomic_write_text(staging / MOVING, json.dumps(_moving(staging) | {name: sizes}))
        remove_shards(folder, old)
    sizes = {row.shard: row.bytes for row in rows}
    atomic_write_text(staging / MOVING, json.dumps(_moving(staging) | {name: sizes}))
    publish(folder, ready, rows, overwrite=overwrite)
    return {"samples": sum(row.num_ok for row in rows), "shards": len(rows), "fingerprint": fingerprint(rows)}


def _join(staging: Path, path: Path, run: Sequence[Piece]) -> ShardRow:
    """One shard of several pieces. They stay, so that a build that is killed now can do it again."""
    if len(run) == 1:
        with suppress(OSError):  # a file system without links
            os.link(staging / run[0].name, path)
            os.link(idx_path(staging / run[0].name), idx_path(path))
            return make_row(path.name, idx_path(path).read_bytes())
        path.unlink(missing_ok=True)
    shard = OpenShard(path)
    with shard.file:
        for piece in run:
            shard.extend(staging / piece.name, piece.payload)
        return shard.finish()


def _refuse_other_shape(out: Path, val_fraction: float) -> None:
    """One set around another's train and val, or the other way round, would train on what is held out."""
    if val_fraction and (out / MANIFEST).exists():
        raise UserError(f"{out} holds a set of shards itself; choose another folder for train and val")
    if not val_fraction and (inside := [n for n in ("train", "val") if (out / n / MANIFEST).exists()]):
        raise UserError(
            f"{out} holds {' and '.join(inside)} already; give --val-fraction again, or choose another folder"
        )


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
