"""What a fine-tuning run works with: the table's rows, their parts, targets and frozen features."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from ..configs.load import to_yaml
from ..pretrain import distributed
from ..pretrain.agree import on_rank_0
from ..pretrain.model import Encoders
from .adapt.encoders import check_methods
from .adapt.fit import Part
from .adapt.matching import with_negatives
from .config import FinetuneConfig, LabelledDataConfig
from .config.search import encoder_cost, import_optuna, trainings
from .config.space import candidates
from .encoders.columns import ColumnState, column_features, fit_columns
from .encoders.features import FeatureRows, Progress, encoder_fingerprint, extract
from .encoders.unimodal import open_source
from .fusion.operators import check_heads
from .runs.journal import Journal
from .runs.saved import device_of, save_encoder
from .splits.checks import check_inner, prepare, without
from .splits.folds import Fold, inner_split, make_folds, strata_of
from .tables.cells import Picture
from .tables.links import linked
from .tables.manifest import Rows, Splits, read_rows, split_rows
from .tasks.targets import Targets, encode_targets, make_task
from .tasks.task import Ints, Task

__all__ = [
    "VERSION",
    "Session",
    "data_config",
    "open_sessions",
    "plan",
    "planned_rows",
    "run_folder",
    "too_many",
]

VERSION = 4  # of what training does; part of every head's key
QUARANTINE_SHARE = 0.001


@dataclass
class Session:
    """What a run, or one fold of it, works with. ``targets`` are those of all rows; those of test rows
    are read when they are scored and not before."""

    config: FinetuneConfig
    folder: Path
    rows: Rows
    splits: Splits
    targets: Targets
    task: Task
    model: Encoders
    fingerprint: str
    features: FeatureRows
    progress: Progress
    journal: Journal
    states: dict[str, ColumnState]
    """How cells of modalities without encoder become vectors, by the training rows."""
    place: Path
    """Where ``heads/`` stands: the run's folder, or a fold's."""
    fold: Fold | None = None

    @property
    def widths(self) -> dict[str, int]:
        """Embedding width per modality, in the config's order."""
        return {k: int(self.features.tables[k].shape[1]) for k in self.rows.modalities}

    @property
    def token_widths(self) -> dict[str, int] | None:
        """Token width per modality, where tokens were asked for."""
        found = {k: self.features.tables.get(f"{k}_tokens") for k in self.rows.modalities}
        return {k: int(t.shape[2]) for k, t in found.items() if t is not None} or None

    @property
    def pooled(self) -> tuple[str, ...]:
        """Modalities of several vectors per row, which heads pool."""
        return tuple(k for k in self.rows.modalities if f"{k}_set" in self.features.tables)

    @property
    def columns(self) -> FeatureRows:
        """Features of all rows' modalities without encoder."""
        tables, index = self.features.tables, self.features.index
        return FeatureRows({k: tables[k] for k in self.states}, {k: index[k] for k in self.states})

    @cached_property
    def data_key(self) -> str:
        """Hash of what heads see of the data: features and labels of training and inner rows, none of the
        test's."""
        parts = [VERSION, self.fingerprint, self.rows.modalities, *asdict(self.task).values()]
        states = {k: state.model_dump(mode="json") for k, state in self.states.items()}
        pools = {k: declared.pool for k, declared in self.rows.declared.items()}
        digest = hashlib.sha256(json.dumps([*parts, states, pools], sort_keys=True).encode())
        digest.update(json.dumps(self.rows.take(self.splits.train).weights).encode())
        for rows in (self.splits.train, self.splits.inner):
            digest.update(self.targets[rows].tobytes())
            digest.update(json.dumps([self.rows.groups[i] for i in rows]).encode())
            self._digest_features(digest, rows)
        return digest.hexdigest()

    @cached_property
    def test_key(self) -> str:
        """Hash of the ids and features of the test rows."""
        ids = [self.rows.ids[i] for i in self.splits.test]
        digest = hashlib.sha256(json.dumps([self.rows.modalities, ids]).encode())
        self._digest_features(digest, self.splits.test)
        return digest.hexdigest()

    def _digest_features(self, digest: Any, rows: Ints) -> None:
        for k, index in self.features.index.items():
            items = index[torch.from_numpy(rows)].cpu()
            digest.update((items >= 0).numpy().tobytes())
            digest.update(self.features.tables[k].cpu()[items[items >= 0]].numpy().tobytes())
            for some in items[items >= 0].split(4096) if k in self.pooled else ():
                every = self.features.several(k, some.to(index.device), tokens=False)
                digest.update(every[f"{k}_set"].cpu().numpy().tobytes())

    def head_folder(self, name: str) -> Path:
        """Where a head of this run or fold is kept."""
        return self.place / "heads" / name

    def part(self, rows: Ints) -> Part:
        """Rows with their targets and weights."""
        weights = torch.tensor([self.rows.weights[i] for i in rows]) if self.rows.weights else None
        return Part(self.features.take(rows), torch.from_numpy(self.targets[rows]), weights)


def run_folder(config: FinetuneConfig) -> Path:
    """``out``, or ``runs/NAME``; with ``eval.holdout`` the folder ``holdout`` in it."""
    folder = Path(config.out) if config.out is not None else Path("runs") / config.name
    return folder / "holdout" if config.eval.holdout else folder


def open_sessions(config: FinetuneConfig, progress: Progress, say: Callable[[str], None]) -> list[Session]:
    """Read, check and encode the table of a config; make the run folder and put config and encoders there.

    The sessions are those of ``plan``, over the same rows and features: of fixed splits one, of a
    cross-validation one per fold and last that of all rows.
    """
    if config.search is not None:
        import_optuna()
    folder = run_folder(config)
    run = folder.parent if config.eval.holdout else folder
    if (run / "checkpoints").is_dir():
        raise UserError(f"out: {run} holds a pretraining run; set out to another folder")
    plain = config.task.model_copy(update={"class_weight": "none"})  # its classes are not known yet
    task_metric = make_task(plain, ("0", "1")).check_metric(config.early_stopping.metric)
    rows, parts = planned_rows(config)
    prepared = [prepare(config, rows, part) for part in parts]
    if config.eval.folds is None and (folder / "folds").is_dir():
        raise UserError(
            f"{folder} holds a cross-validation; keep eval.cv and add --holdout, or give another folder as "
            "out"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if rows.damaged:
        _quarantine(config, folder, rows, {})
    model = open_source(config.model, device_of(config.device))
    task = prepared[0][1]
    fitted = fit_columns(rows.take(parts[-1][1].train))
    widths = {k: fitted[k].width if k in fitted else model.widths[k] for k in rows.modalities}
    for heads in candidates(config):
        check_heads(heads, widths, task.outputs, task.link)
    check_methods(config, model, task.classes)
    fingerprint = encoder_fingerprint(model)
    _check_ranks(rows, fingerprint)
    say(f"{_sizes(config, parts[-1][1])}; stopping by {task_metric}")
    if cost := encoder_cost(config, len(parts[-1][1].train)):
        say(cost)
    features, broken = extract(
        model,
        rows,
        tokens=any(head.reads_tokens for head in config.heads.values()),
        inputs=any(head.reads_inputs for head in config.heads.values()),
        fingerprint=fingerprint if config.model.cache else None,
        batch_size=config.model.batch_size,
        max_pixels=config.data.max_pixels,
        progress=progress,
        together=distributed.world_size() > 1,
    )
    if broken:
        _quarantine(config, folder, rows, broken)
        parts = [(fold, without(splits, list(broken))) for fold, splits in parts]
        for part, (targets, task) in zip(parts, prepared, strict=True):
            check_inner(config, rows, part, targets, task)
    features = features.to(model.device)
    states = [fit_columns(rows.take(splits.train)) for _, splits in parts]
    places = [folder / fold.name if fold else folder for fold, _ in parts]
    journal = Journal(folder, config)
    sessions = [
        Session(
            config, folder, rows, splits, targets, task, model, fingerprint,
            features.beside(column_features(rows, state).to(model.device)), progress, journal, state,
            place, fold,
        )
        for place, (fold, splits), (targets, task), state in zip(places, parts, prepared, states, strict=True)
    ]  # fmt: skip

    def write() -> None:
        save_encoder(model, folder / "encoder", fingerprint)
        atomic_write_text(folder / "config.yaml", to_yaml(config))

    on_rank_0(write)
    return sessions


def planned_rows(config: FinetuneConfig) -> tuple[Rows, list[tuple[Fold | None, Splits]]]:
    """The rows of a run, with pairs that a matching task makes, and what is trained on what (``plan``)."""
    rows = linked(read_rows(data_config(config), config.task), config.task, data_config(config))
    return with_negatives(config, rows, plan(config, rows))


def _check_ranks(rows: Rows, fingerprint: str) -> None:
    """All processes must have read the same: on another machine a path may be another file."""
    seen = json.dumps([fingerprint, rows.ids, rows.cells.get("text"), [str(one) for one in rows.targets]])
    digests = distributed.gather_json(hashlib.sha256(seen.encode("utf-8", "surrogatepass")).hexdigest())
    if odd := [rank for rank, digest in enumerate(digests) if digest != digests[0]]:
        raise UserError(
            f"{rows.source}: process {odd[0]} has read other rows or encoders than the first; give all "
            "machines the same table and checkpoint"
        )


def data_config(config: FinetuneConfig) -> LabelledDataConfig:
    """How the table is read: a cross-validation of all rows makes no use of a split column."""
    folds = config.eval.folds
    if folds is None or folds.rows == "without_test":
        return config.data
    return config.data.model_copy(update={"split": None})


def plan(config: FinetuneConfig, rows: Rows) -> list[tuple[Fold | None, Splits]]:
    """What is trained on what: the fixed splits, or every outer fold and last, without a test, all rows that
    are dealt into folds.

    Labels are read for stratification alone.
    """
    share, cv = config.eval.inner_share, config.eval.folds
    if cv is None:
        return [(None, split_rows(rows, config.data, inner_share=share))]
    among = np.arange(len(rows))
    if cv.rows == "without_test":
        among = np.setdiff1d(among, split_rows(rows, config.data, inner_share=share).test)
    whole = Splits(among, among[:0], among[:0])
    strata = strata_of(encode_targets(rows, config.task, whole, min_rows=0)[0]) if cv.stratify else None
    folds = make_folds(rows, strata, cv, inner_share=share, among=among)
    train, inner = inner_split(rows, among, strata, share=share, seed=cv.seed)
    return [*((fold, fold.splits) for fold in folds), (None, replace(whole, train=train, inner=inner))]


def _sizes(config: FinetuneConfig, splits: Splits) -> str:
    cv = config.eval.folds
    if cv is not None:
        times = f", {cv.repeats} times" if cv.repeats > 1 else ""
        dealt = len(splits.train) + len(splits.inner)
        return f"{dealt:,} rows in {cv.folds} folds{times}; {trainings(config)}"
    sizes = f"{len(splits.train):,} training, {len(splits.inner):,} inner and {len(splits.test):,} test rows"
    return sizes if config.search is None else f"{sizes}; {trainings(config)}"


def too_many(of: int, left_out: int) -> bool:
    """Whether so many rows and samples are more than a quarantine takes: one, or one in a thousand."""
    return left_out > max(1, QUARANTINE_SHARE * of)


def _quarantine(
    config: FinetuneConfig, folder: Path, rows: Rows, broken: Mapping[int, tuple[Picture, str]]
) -> None:
    """List broken rows of the table and damaged samples in quarantine.csv, or say which one to mend."""
    size = len(rows)
    if config.task.type == "matching":  # pairs that were made stand behind the table's rows
        size = list(rows.targets).count(1)
        broken = {i: found for i, found in broken.items() if i < size}
    what = str(rows.damaged[0]) if rows.damaged else ""
    if broken:
        first = min(broken)
        picture, reason = broken[first]
        what = f"{rows.source}: row {first + 1}: image {picture} cannot be read: {reason}"
    if broken and config.data.on_error == "raise":
        more = f" ({len(broken)} such rows)" if len(broken) > 1 else ""
        raise UserError(f"{what}{more}; mend it, empty the cell, or set data.on_error=quarantine")
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["row", "id", "image", "reason"])
    writer.writerows([i + 1, rows.ids[i], *map(str, broken[i])] for i in sorted(broken))
    writer.writerows(["", one.key, one.place, one.reason] for one in rows.damaged)
    if distributed.rank() == 0:
        atomic_write_text(folder / "quarantine.csv", buffer.getvalue())
    left_out, of = (n + len(rows.damaged) for n in (len(broken), size))
    if too_many(of, left_out):
        listed = folder / "quarantine.csv"
        raise UserError(f"{what}; {left_out} of {of} rows are too many, {listed} lists them")
