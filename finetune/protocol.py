"""The protocol of a fine-tuning run: what may be looked at, when, and how a score is made.

1. The table is read and checked; train, inner (val) and test rows are set apart, groups whole.
2. Every head is trained with every seed on the training rows; the inner rows stop it and calibrate it.
3. The inner rows choose the head that the run recommends, and the best single modality.
4. The test rows are scored once, all heads together: probabilities averaged over seeds, 95 % intervals over
   groups, and paired differences to the best single modality.

Finished heads are kept: the same command goes on where it stopped, and trains anew only what has changed.
"""

import csv
import hashlib
import io
import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from ..configs.load import to_yaml
from ..pretrain.model import LoadedModel, load_model
from ..pretrain.tracking import Tracker
from .adapt import LIVE_EVAL_BATCH, Fitted, LiveRows, Part, fit, inner_scores, logits_of
from .cells import PictureReader
from .config import SINGLE, AdaptConfig, FinetuneConfig, HeadConfig
from .features import FeatureRows, Progress, encoder_fingerprint, extract, silent
from .fusion import STAGES
from .intervals import paired_intervals
from .manifest import Rows, Splits, encode_targets, read_rows, split_rows
from .results import headline, make_results, write_predictions
from .saved import open_encoder, read_head, read_json, save_encoder, save_head
from .tasks import Floats, Ints, Task

__all__ = ["finetune", "run_folder"]

Json = dict[str, Any]
log = logging.getLogger(__name__)
VERSION = 1  # of what training does; part of every head's key
QUARANTINE_SHARE = 0.001


@dataclass
class Session:
    """What a run works with. ``targets`` are class numbers of all rows; those of test rows are read by
    ``_score`` alone."""

    config: FinetuneConfig
    folder: Path
    rows: Rows
    splits: Splits
    targets: Ints
    task: Task
    model: LoadedModel
    fingerprint: str
    features: FeatureRows
    progress: Progress
    tracker: Tracker | None = None
    data_key: str = ""
    step: int = 0
    times: dict[str, float] = field(default_factory=dict)

    @property
    def widths(self) -> dict[str, int]:
        """Embedding width per modality, in the config's order."""
        return {k: int(self.features.tables[k].shape[1]) for k in self.rows.modalities}

    @property
    def token_widths(self) -> dict[str, int] | None:
        """Token width per modality, where tokens were asked for."""
        found = {k: self.features.tables.get(f"{k}_tokens") for k in self.rows.modalities}
        return {k: int(t.shape[2]) for k, t in found.items() if t is not None} or None

    def finish(self, exit_code: int = 0) -> None:
        """Close the tracker, if there was anything to track."""
        if self.tracker is not None:
            self.tracker.finish(exit_code)
            self.tracker = None

    def part(self, rows: Ints) -> Part:
        """Rows with their targets."""
        return Part(self.features.take(rows), torch.from_numpy(self.targets[rows]))


def run_folder(config: FinetuneConfig) -> Path:
    """``out``, or ``runs/NAME``."""
    return Path(config.out) if config.out is not None else Path("runs") / config.name


def finetune(
    config: FinetuneConfig, *, progress: Progress = silent, say: Callable[[str], None] = log.info
) -> dict[str, Any]:
    """Train and score all heads of a config; write the run folder and return what results.json holds.

    Raises UserError for whatever the user can mend. See docs/finetune.md for the files of a run.
    """
    session = _open(config, progress, say)
    heads = config.all_heads()
    try:
        for name in heads:
            _train_head(session, name, heads[name], say)
    except BaseException:
        session.finish(exit_code=1)
        raise
    session.finish()
    inner = {name: _inner(session, name) for name in heads}
    best, single = _choose(session.task, config, inner)
    _write_run(session, best)
    result = _score(session, list(heads), best, single, inner)
    atomic_write_text(session.folder / "results.json", json.dumps(result, indent=1) + "\n")
    return result


def _open(config: FinetuneConfig, progress: Progress, say: Callable[[str], None]) -> Session:
    task_metric = Task(config.task.type, ("0", "1")).check_metric(config.early_stopping.metric)
    rows = read_rows(config.data, config.task)
    splits = split_rows(rows, config.data, inner_share=config.eval.inner_share)
    targets, classes = encode_targets(rows, config.task, splits, min_rows=config.data.min_class_rows)
    folder = run_folder(config)
    folder.mkdir(parents=True, exist_ok=True)
    model = load_model(config.model.checkpoint, device=_device(config.device))
    fingerprint = encoder_fingerprint(model)
    say(
        f"{len(splits.train):,} training, {len(splits.inner):,} inner and {len(splits.test):,} test rows; "
        f"stopping by {task_metric}"
    )
    features, broken = extract(
        model,
        rows,
        tokens=any(head.op == "cross" for head in config.heads.values()),
        fingerprint=fingerprint if config.model.cache else None,
        batch_size=config.model.batch_size,
        max_pixels=config.data.max_pixels,
        progress=progress,
    )
    if broken:
        splits = _quarantine(config, folder, rows, splits, broken)
    session = Session(
        config, folder, rows, splits, targets, Task(config.task.type, tuple(classes)), model, fingerprint,
        features.to(model.device), progress,
    )  # fmt: skip
    session.data_key = _data_key(session)
    save_encoder(model, folder / "encoder", fingerprint)
    atomic_write_text(folder / "config.yaml", to_yaml(config))
    return session


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: 'cuda' cannot be used here; give auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def _quarantine(
    config: FinetuneConfig, folder: Path, rows: Rows, splits: Splits, broken: Mapping[int, str]
) -> Splits:
    """Leave broken rows out and list them in quarantine.csv, or say which one to mend."""
    first = min(broken)
    what = f"{rows.source}: row {first + 1}: image {rows.images[first]} cannot be read: {broken[first]}"
    if config.data.on_error == "raise":
        more = f" ({len(broken)} such rows)" if len(broken) > 1 else ""
        raise UserError(f"{what}{more}; mend it, empty the cell, or set data.on_error=quarantine")
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(["row", "id", "image", "reason"])
    writer.writerows([i + 1, rows.ids[i], str(rows.images[i]), broken[i]] for i in sorted(broken))
    atomic_write_text(folder / "quarantine.csv", buffer.getvalue())
    if len(broken) > max(1, QUARANTINE_SHARE * len(rows)):
        listed = folder / "quarantine.csv"
        raise UserError(f"{what}; {len(broken)} of {len(rows)} rows are too many, {listed} lists them")
    bad = list(broken)
    return Splits(*(part[~np.isin(part, bad)] for part in (splits.train, splits.inner, splits.test)))


def _data_key(session: Session) -> str:
    """Hash of what heads see of the data: features and labels of training and inner rows, none of the
    test's."""
    digest = hashlib.sha256(json.dumps([VERSION, session.fingerprint, session.task.classes]).encode())
    for rows in (session.splits.train, session.splits.inner):
        digest.update(session.targets[rows].tobytes())
        for k, index in session.features.index.items():
            items = index[torch.from_numpy(rows)].cpu()
            digest.update((items >= 0).numpy().tobytes())
            digest.update(session.features.tables[k].cpu()[items[items >= 0]].numpy().tobytes())
    return digest.hexdigest()


def _train_head(session: Session, name: str, head: HeadConfig, say: Callable[[str], None]) -> None:
    """Train a head with every seed and save it, unless that was done before."""
    config, folder = session.config, session.folder / "heads" / name
    adapt = config.adapt_of(name)
    asked = [head, adapt, config.early_stopping, config.eval.calibration]
    text = json.dumps(
        [part if isinstance(part, str) else part.model_dump() for part in asked], sort_keys=True
    )
    key = hashlib.sha256(f"{session.data_key}{text}{list(config.eval.seeds)}".encode()).hexdigest()
    history = folder / "metrics.jsonl"
    if (folder / "head.json").is_file() and read_json(folder / "head.json").get("key") == key:
        session.step += len(history.read_text(encoding="utf-8").splitlines()) if history.is_file() else 0
        say(f"{name}: kept from before")
        return
    if session.tracker is None:
        session.tracker = _tracker(session, name)
    begun, rows = time.perf_counter(), list[dict[str, Any]]()
    members: list[tuple[int, Fitted]] = []
    total = len(config.eval.seeds) * (adapt.epochs + (adapt.encoder_epochs if adapt.method == "lp_ft" else 0))
    with session.progress(f"training {name}", total) as advance:
        for seed in config.eval.seeds:

            def record(row: dict[str, Any], seed: int = seed) -> None:
                rows.append({"kind": name, "step": session.step, "seed": seed} | row)
                session.step += 1
                if session.tracker is not None:
                    session.tracker.log(rows[-1])
                advance(1)

            members.append((seed, _fit_seed(session, head, adapt, seed, record)))
    seconds = time.perf_counter() - begun
    document: Json = _document(session, name, head, adapt, members) | {"key": key, "seconds": seconds}
    save_head(folder, document, [(seed, got.head, got.model) for seed, got in members])
    atomic_write_text(history, "".join(json.dumps(row) + "\n" for row in rows))
    inner = document["inner"][session.task.primary]
    say(f"{name}: inner {session.task.primary} {inner:.3f}, {seconds:.1f} s")


def _tracker(session: Session, name: str) -> Tracker:
    """The run's tracker, its metrics file cut back to the finished heads before ``name``."""
    kept: list[str] = []
    for other in session.config.all_heads():
        if other == name:
            break
        path = session.folder / "heads" / other / "metrics.jsonl"
        kept += path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    atomic_write_text(session.folder / "metrics.jsonl", "".join(line + "\n" for line in kept))
    settings = json.loads(session.config.model_dump_json())
    return Tracker(session.folder, session.config.tracking, settings)


def _fit_seed(
    session: Session,
    head: HeadConfig,
    adapt: AdaptConfig,
    seed: int,
    record: Callable[[dict[str, Any]], None],
) -> Fitted:
    live = None
    if adapt.method == "lp_ft":
        model = open_encoder(session.folder / "encoder", session.model.device)
        live = (_live(session, model, session.splits.train), _live(session, model, session.splits.inner))
    return fit(
        head,
        adapt,
        session.config.early_stopping,
        session.task,
        session.part(session.splits.train),
        session.part(session.splits.inner),
        widths=session.widths,
        token_widths=session.token_widths,
        seed=seed,
        calibration=session.config.eval.calibration,
        live=live,
        device=session.model.device,
        log=record,
    )


def _live(session: Session, model: LoadedModel, rows: Ints) -> LiveRows:
    part = session.rows.take(rows)
    limit = session.config.data.max_pixels
    return LiveRows(model, part.images, part.texts, part.modalities, limit, PictureReader())


def _document(
    session: Session, name: str, head: HeadConfig, adapt: AdaptConfig, members: list[tuple[int, Fitted]]
) -> Json:
    """head.json without its key: what the head is, and how it does on the inner rows."""
    inner_rows = session.splits.inner
    parts: list[Floats] = []
    seeds: list[dict[str, Any]] = []
    for seed, got in members:
        rows = _live(session, got.model, inner_rows) if got.model else session.features.take(inner_rows)
        size = LIVE_EVAL_BATCH if got.model else 4096
        logits = got.scale * logits_of(got.head, rows, batch_size=size).double() + got.shift
        parts.append(session.task.probabilities(logits))
        seeds.append({"seed": seed, "best_epoch": got.best_epoch, "scale": got.scale, "shift": got.shift})
    p = np.mean(parts, axis=0)
    stage, level = STAGES[head.op]
    encoders = members[0][1].model
    trained = sum(q.numel() for q in encoders.clip.parameters() if q.requires_grad) if encoders else 0
    return {
        "name": name,
        "config": json.loads(head.model_dump_json()),
        "adapt": json.loads(adapt.model_dump_json()),
        "stage": stage,
        "level": level,
        "params": sum(q.numel() for q in members[0][1].head.parameters()) + trained,
        "inner": inner_scores(session.task, torch.from_numpy(session.targets[inner_rows]), p),
        "seeds": seeds,
    }


def _inner(session: Session, name: str) -> dict[str, float]:
    return read_json(session.folder / "heads" / name / "head.json")["inner"]


def _choose(task: Task, config: FinetuneConfig, inner: Mapping[str, Mapping[str, float]]) -> tuple[str, str]:
    """The recommended head and the best single modality, both by the inner rows alone."""

    def score(name: str) -> tuple[float, float]:
        return inner[name][task.primary], -inner[name]["loss"]

    fused = [name for name in inner if name not in SINGLE] or list(inner)
    return max(fused, key=score), max((name for name in inner if name in SINGLE), key=score)


def _write_run(session: Session, best: str) -> None:
    """run.json: what a prediction needs beside heads and encoders."""
    data = session.config.data
    document = {
        "task": session.task.type,
        "classes": list(session.task.classes),
        "target": session.config.task.target,
        "modalities": {k: m.column for k, m in data.modalities.items()},
        "id": data.id,
        "widths": session.widths,
        "token_widths": session.token_widths,
        "max_pixels": data.max_pixels,
        "heads": list(session.config.all_heads()),
        "best": best,
        "encoder_sha256": session.fingerprint,
    }
    atomic_write_text(session.folder / "run.json", json.dumps(document, indent=1) + "\n")


def _score(
    session: Session, names: list[str], best: str, single: str, inner: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """The one place where test labels are read. Writes predictions.parquet."""
    rows, task, config = session.splits.test, session.task, session.config
    targets = session.targets[rows]
    p: dict[str, Floats] = {}
    with session.progress("scoring the test rows", len(names)) as advance:
        for name in names:
            p[name] = head_probabilities(session, name, rows)
            advance(1)
    groups = [session.rows.groups[i] for i in rows]
    scores, gains = paired_intervals(
        targets, p, task.metrics, groups, against=single, samples=config.eval.bootstrap
    )
    write_predictions(session.folder, session.task, session.rows, session.targets, rows, p)
    documents = {n: read_json(session.folder / "heads" / n / "head.json") for n in names}
    result = make_results(task, documents, scores, gains, targets, best=best, single=single)
    result |= {
        "target": config.task.target,
        "n_train": len(session.splits.train),
        "n_inner": len(session.splits.inner),
        "n_test": len(rows),
        "n_test_groups": len(set(groups)),
        "checkpoint": config.model.checkpoint,
        "encoder_sha256": session.fingerprint,
    }
    return {"task": config.name, "headline": headline(result)} | result


def head_probabilities(session: Session, name: str, rows: Ints) -> Floats:
    """Calibrated probabilities [n, C] of a saved head, averaged over its seeds."""
    saved = read_head(
        session.folder / "heads" / name, session.widths, session.token_widths, session.task.outputs
    )
    parts: list[Floats] = []
    for one in saved:
        if one.encoder is None:
            source = session.features.take(rows)
        else:
            source = _live(session, open_encoder(one.encoder, session.model.device), rows)
        size = 4096 if one.encoder is None else LIVE_EVAL_BATCH
        logits = logits_of(one.head.to(session.model.device), source, batch_size=size)
        parts.append(session.task.probabilities(one.calibrated(logits)))
    return np.mean(parts, axis=0)
