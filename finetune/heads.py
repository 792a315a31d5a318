"""Heads of a run: trained with every seed, kept on disk, and asked for probabilities."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from ..pretrain import distributed
from ..pretrain.model import Encoders, LoadedModel
from .adapt.fit import LIVE_EVAL_BATCH, Fitted, LiveRows, fit, inner_scores, logits_of, soup
from .adapt.presence import Shown, logits_under
from .adapt.retention import mean_retention, told
from .adapt.training import Diverged, below, inner_score
from .config import AdaptConfig, HeadConfig
from .config.space import is_searched
from .fusion.joint import start_joint
from .fusion.operators import Head, build_head
from .fusion.projection import start_vectors
from .runs.piece import Piece
from .runs.saved import open_encoder, read_head, read_json, save_head
from .search import Found, search_head, search_key, told_search
from .session import Session
from .tables.cells import PictureReader
from .tasks.task import Floats, Ints
from .tasks.thresholds import choose_thresholds, used

__all__ = [
    "How",
    "finished",
    "head_answers",
    "head_probabilities",
    "history_of",
    "kept_inner",
    "kept_thresholds",
    "piece_of",
    "settings_for",
    "train_head",
    "train_seed",
]

Json = dict[str, Any]
How = tuple[HeadConfig, AdaptConfig]
"""A head's settings, and how it trains."""


def train_head(session: Session, name: str, head: HeadConfig, say: Callable[[str], None]) -> None:
    """Train a head with every seed and save it, unless that was done before."""
    config, folder, journal = session.config, session.head_folder(name), session.journal
    history, fold, label = history_of(session, name), session.fold, _label(session, name)
    if finished(session, name):
        remove_pieces(session, name)
        journal.keep(history)
        say(f"{label}: kept from before")
        return
    found = settings_for(session, name)
    how = head, adapt = (found.head, found.adapt) if found else (head, config.adapt_of(name))
    journal.begin(history)
    begun, rows = time.perf_counter(), list[dict[str, Any]]()
    members: list[tuple[int, Fitted]] = []
    where = {"repeat": fold.repeat, "fold": fold.fold} if fold else {}
    total = len(config.eval.seeds) * adapt.most_epochs
    costly = adapt.tunes_encoders or head.reads_tokens
    with session.progress(f"training {label}", total) as advance:
        for seed in config.eval.seeds:

            def record(row: dict[str, Any], seed: int = seed) -> None:
                rows.append(journal.log(name, where | {"seed": seed} | row))
                advance(1)

            got, before = train_seed(session, name, how, seed, record, keep=costly)
            members.append((seed, got))
            begun -= before
    if adapt.soup != "none":
        inner = session.part(session.splits.inner)
        stopping, scaling = config.early_stopping, config.eval.calibration
        members = soup(
            members, adapt, stopping, inner, lambda m: _live(session, m, session.splits.inner), scaling
        )
    seconds = time.perf_counter() - begun
    document: Json = _document(session, name, head, adapt, members)
    document |= {"key": _key(session, name), "seconds": seconds}
    document |= {} if found is None else {"search": found.document}
    save_head(folder, document, [(seed, got.head, got.model) for seed, got in members])
    atomic_write_text(history, "".join(json.dumps(row) + "\n" for row in rows))
    remove_pieces(session, name)
    score = document["inner"][session.task.primary]
    more = told(document) + told_search(document)
    say(f"{label}: inner {session.task.primary} {score:.3f}, {seconds:.1f} s{more}")


def _label(session: Session, name: str) -> str:
    fold = session.fold
    return f"repeat {fold.repeat}, fold {fold.fold}, {name}" if fold else name


def settings_for(session: Session, name: str) -> Found | None:
    """What the search for a head's settings found, searched now unless that was done before; None for a head
    that is trained as it is written."""
    if not is_searched(session.config, name):
        return None
    return search_head(session, name, lambda *how: _inner_of(session, how), _label(session, name))


def _inner_of(session: Session, how: How) -> dict[str, float] | None:
    """Loss and metrics on the inner rows of a head that is trained with the first seed and not kept; None if
    it came to no numbers."""
    inner = session.part(session.splits.inner)
    try:
        got = _fit_seed(session, how, session.config.eval.seeds[0], lambda row: None)
    except Diverged:
        return None
    if got.model is not None:
        inner = replace(inner, rows=_live(session, got.model, session.splits.inner))
    return inner_score(got.task, got.task.primary, got.head, inner)[1]


def _key(session: Session, name: str) -> str:
    """Hash of what a head's training depends on."""
    config = session.config
    asked = [config.all_heads()[name], config.adapt_of(name), config.early_stopping, config.eval.calibration]
    text = json.dumps(
        [part if isinstance(part, str) else part.model_dump() for part in asked], sort_keys=True
    )
    text += search_key(config, name)
    return hashlib.sha256(f"{session.data_key}{text}{list(config.eval.seeds)}".encode()).hexdigest()


def finished(session: Session, name: str) -> bool:
    """Whether a head was trained before, with the same settings and data, and saved."""
    document = session.head_folder(name) / "head.json"
    return document.is_file() and read_json(document).get("key") == _key(session, name)


def piece_of(session: Session, name: str, seed: int, *, writes: bool = True) -> Piece:
    """Where a head's training with one seed is kept until the head is saved."""
    folder = session.place / "training" / name / f"seed_{seed}"
    return Piece(folder, f"{_key(session, name)}-{seed}", writes=writes)


def remove_pieces(session: Session, name: str) -> None:
    """Forget what was kept of the trainings of a head that is saved now."""
    shutil.rmtree(session.place / "training" / name, ignore_errors=True)


def train_seed(
    session: Session,
    name: str,
    how: How,
    seed: int,
    record: Callable[[dict[str, Any]], None],
    *,
    keep: bool,
    together: bool = False,
) -> tuple[Fitted, float]:
    """Train a head with one seed, or take the result that was kept; how many seconds it took before.

    ``how``: its settings. ``keep``: its epochs and its result. ``together``: all processes do it, see
    ``live.LiveRows``.
    """
    piece = piece_of(session, name, seed, writes=distributed.rank() == 0 or not together)
    kept = piece.load_result()
    if kept is not None:
        for row in kept[1]["rows"]:
            record(row)
        return _restored(session, how[0], *kept), kept[1]["seconds"]
    begun, rows = time.perf_counter(), list[dict[str, Any]]()

    def note(row: dict[str, Any]) -> None:
        rows.append(row)
        record(row)

    try:
        got = _fit_seed(session, how, seed, note, piece if keep else None, together=together)
    except Diverged as error:
        raise UserError(f"heads.{name}: {error}") from error
    if keep:
        piece.save_result(got, rows, time.perf_counter() - begun)
    return got, 0.0


def _restored(
    session: Session, config: HeadConfig, tensors: dict[str, Tensor], facts: Mapping[str, Any]
) -> Fitted:
    """What ``Piece.save_result`` was given."""
    task = session.task.fitted(torch.from_numpy(session.targets[session.splits.train]))
    head = build_head(config, session.widths, task.outputs, session.token_widths, task.link, session.pooled)
    head.load_state_dict(below(tensors, "head/"))
    model, clip = None, below(tensors, "clip/")
    if clip:
        model = open_encoder(session.folder / "encoder", session.model.device)
        model.clip.load_state_dict(clip)
    return Fitted(head.to(session.model.device), model, task=task, **facts["result"])


def history_of(session: Session, name: str) -> Path:
    """Where a head's own lines of metrics.jsonl are kept."""
    return session.head_folder(name) / "metrics.jsonl"


def _fit_seed(
    session: Session,
    how: How,
    seed: int,
    record: Callable[[dict[str, Any]], None],
    keeper: Piece | None = None,
    *,
    together: bool = False,
) -> Fitted:
    head, adapt = how
    live = None
    if adapt.tunes_encoders:
        model = open_encoder(session.folder / "encoder", session.model.device)
        parts = (session.splits.train, session.splits.inner)
        train, inner = (replace(_live(session, model, rows), together=together) for rows in parts)
        live = (train, inner)
    return fit(
        head,
        adapt,
        session.config.early_stopping,
        session.task,
        session.part(session.splits.train),
        session.part(session.splits.inner),
        widths=session.widths,
        token_widths=session.token_widths,
        pooled=session.pooled,
        seed=seed,
        init_seed=None if adapt.soup == "none" else session.config.eval.seeds[0],
        calibration=session.config.eval.calibration,
        live=live,
        device=session.model.device,
        log=record,
        start=lambda new: _start(new, session.model),
        keeper=keeper,
    )


def _start(head: Head, model: Encoders) -> None:
    """What a new head takes from the encoders."""
    start_joint(head, model)
    if isinstance(model, LoadedModel):
        start_vectors(head, model)


def _live(session: Session, model: Encoders, rows: Ints) -> LiveRows:
    limit, columns = session.config.data.max_pixels, session.columns.take(rows)
    return LiveRows(
        model,
        session.rows.take(rows),
        limit,
        PictureReader(),
        columns if columns.index else None,
        groups=session.features.take(rows).groups,
    )


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
        own = {"seed": seed, "best_epoch": got.best_epoch, "scale": got.scale, "shift": got.shift}
        seeds.append(own | got.facts)
    p = session.task.averaged(parts)
    stage, level = head.stage
    targets = session.targets[inner_rows]
    return {
        "name": name,
        "config": json.loads(head.model_dump_json()),
        "adapt": json.loads(adapt.model_dump_json()),
        "stage": stage,
        "level": level,
        "columns": {k: json.loads(state.model_dump_json()) for k, state in session.states.items()},
        "params": sum(q.numel() for q in members[0][1].head.parameters()) + members[0][1].trained,
        "inner": inner_scores(session.task, torch.from_numpy(targets), p),
        "thresholds": choose_thresholds(session.task, targets, p),
        "seeds": seeds,
        "retention": mean_retention(seeds),
    }


def kept_inner(session: Session, name: str) -> dict[str, float]:
    """Loss and metrics of a saved head on the inner rows."""
    return read_json(session.head_folder(name) / "head.json")["inner"]


def kept_thresholds(session: Session, name: str) -> list[float]:
    """From which probabilities on a saved head says its labels, by ``eval.threshold``."""
    chosen = read_json(session.head_folder(name) / "head.json")["thresholds"]
    return used(session.config.eval.threshold, chosen)


def head_probabilities(session: Session, name: str, rows: Ints) -> Floats:
    """Calibrated probabilities [n, C] of a saved head, averaged over its seeds."""
    return head_answers(session, name, rows, [{}])[0]


def head_answers(session: Session, name: str, rows: Ints, shown: Sequence[Shown]) -> list[Floats]:
    """Calibrated probabilities [n, C] of a saved head, averaged over its seeds, for each way of hiding
    modalities of the rows."""
    saved = read_head(
        session.head_folder(name), session.widths, session.token_widths, session.task, session.pooled
    )
    parts: list[list[Floats]] = [[] for _ in shown]
    for one in saved:
        if one.encoder is None:
            source = session.features.take(rows)
        else:
            source = _live(session, open_encoder(one.encoder, session.model.device), rows)
        size = 4096 if one.encoder is None else LIVE_EVAL_BATCH
        logits = logits_under(one.head.to(session.model.device), source, shown, batch_size=size)
        for found, own in zip(parts, logits, strict=True):
            found.append(session.task.probabilities(one.calibrated(own)))
    return [session.task.averaged(found) for found in parts]
