"""Heads of a run: trained with every seed, kept on disk, and asked for probabilities."""

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from ..pretrain.model import Encoders
from .adapt import LIVE_EVAL_BATCH, Fitted, LiveRows, fit, inner_scores, logits_of, soup
from .cells import PictureReader
from .config import AdaptConfig, HeadConfig
from .fusion import Head
from .joint import start_joint
from .presence import Shown, logits_under
from .projection import start_vectors
from .retention import mean_retention, told
from .saved import open_encoder, read_head, read_json, save_head
from .search import search_head, search_key, told_search
from .search_space import is_searched
from .session import Session
from .tasks import Floats, Ints
from .thresholds import choose_thresholds, used
from .training import Diverged, inner_score

__all__ = [
    "head_answers",
    "head_probabilities",
    "history_of",
    "kept_inner",
    "kept_thresholds",
    "train_head",
]

Json = dict[str, Any]


def train_head(session: Session, name: str, head: HeadConfig, say: Callable[[str], None]) -> None:
    """Train a head with every seed and save it, unless that was done before."""
    config, folder, journal = session.config, session.head_folder(name), session.journal
    adapt = config.adapt_of(name)
    asked = [head, adapt, config.early_stopping, config.eval.calibration]
    text = json.dumps(
        [part if isinstance(part, str) else part.model_dump() for part in asked], sort_keys=True
    )
    text += search_key(config, name)
    key = hashlib.sha256(f"{session.data_key}{text}{list(config.eval.seeds)}".encode()).hexdigest()
    history = history_of(session, name)
    fold = session.fold
    label = f"repeat {fold.repeat}, fold {fold.fold}, {name}" if fold else name
    if (folder / "head.json").is_file() and read_json(folder / "head.json").get("key") == key:
        journal.keep(history)
        say(f"{label}: kept from before")
        return
    found = None
    if is_searched(config, name):
        found = search_head(session, name, lambda new, how: _inner_of(session, new, how), label)
        head, adapt = found.head, found.adapt
    journal.begin(history)
    begun, rows = time.perf_counter(), list[dict[str, Any]]()
    members: list[tuple[int, Fitted]] = []
    where = {"repeat": fold.repeat, "fold": fold.fold} if fold else {}
    total = len(config.eval.seeds) * adapt.most_epochs
    with session.progress(f"training {label}", total) as advance:
        for seed in config.eval.seeds:

            def record(row: dict[str, Any], seed: int = seed) -> None:
                rows.append(journal.log(name, where | {"seed": seed} | row))
                advance(1)

            try:
                members.append((seed, _fit_seed(session, head, adapt, seed, record)))
            except Diverged as error:
                raise UserError(f"heads.{name}: {error}") from error
    if adapt.soup != "none":
        inner = session.part(session.splits.inner)
        stopping, scaling = config.early_stopping, config.eval.calibration
        members = soup(
            members, adapt, stopping, inner, lambda m: _live(session, m, session.splits.inner), scaling
        )
    seconds = time.perf_counter() - begun
    document: Json = _document(session, name, head, adapt, members) | {"key": key, "seconds": seconds}
    document |= {} if found is None else {"search": found.document}
    save_head(folder, document, [(seed, got.head, got.model) for seed, got in members])
    atomic_write_text(history, "".join(json.dumps(row) + "\n" for row in rows))
    score = document["inner"][session.task.primary]
    more = told(document) + told_search(document)
    say(f"{label}: inner {session.task.primary} {score:.3f}, {seconds:.1f} s{more}")


def _inner_of(session: Session, head: HeadConfig, adapt: AdaptConfig) -> dict[str, float] | None:
    """Loss and metrics on the inner rows of a head that is trained with the first seed and not kept; None if
    it came to no numbers."""
    inner = session.part(session.splits.inner)
    try:
        got = _fit_seed(session, head, adapt, session.config.eval.seeds[0], lambda row: None)
    except Diverged:
        return None
    if got.model is not None:
        inner = replace(inner, rows=_live(session, got.model, session.splits.inner))
    return inner_score(got.task, got.task.primary, got.head, inner)[1]


def history_of(session: Session, name: str) -> Path:
    """Where a head's own lines of metrics.jsonl are kept."""
    return session.head_folder(name) / "metrics.jsonl"


def _fit_seed(
    session: Session,
    head: HeadConfig,
    adapt: AdaptConfig,
    seed: int,
    record: Callable[[dict[str, Any]], None],
) -> Fitted:
    live = None
    if adapt.tunes_encoders:
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
        pooled=session.pooled,
        seed=seed,
        init_seed=None if adapt.soup == "none" else session.config.eval.seeds[0],
        calibration=session.config.eval.calibration,
        live=live,
        device=session.model.device,
        log=record,
        start=lambda new: _start(new, session.model),
    )


def _start(head: Head, model: Encoders) -> None:
    """What a new head takes from the encoders."""
    start_joint(head, model)
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
