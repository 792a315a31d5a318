"""Training a head on frozen features, and by all methods but ``linear_probe`` the encoders with it.

One seed gives the initial weights, the order of the rows and the dropout.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from ...pretrain.model import Encoders, LoadedModel
from ..config import AdaptConfig, HeadConfig, StoppingConfig
from ..encoders.live import LiveRows, Part, Source
from ..fusion.operators import Head, build_head
from ..fusion.ordinal import Ordinal
from ..fusion.projection import Vectors, start_vectors
from ..tasks.task import Task, calibrate, higher_is_better
from .class_contrast import ClassContrast, ClassTexts
from .encoders import class_texts, encoder_groups, open_encoders, parameter_groups
from .interpolate import State, choose_alpha, greedy, mean_state
from .lora import merge_lora
from .matching import MatchTraining
from .retention import retention
from .retrieval import PairTraining
from .training import (
    LIVE_EVAL_BATCH,
    Keeper,
    Log,
    Training,
    eval_batch,
    inner_score,
    inner_scores,
    logits_of,
)

__all__ = [
    "LIVE_EVAL_BATCH",
    "Fitted",
    "LiveRows",
    "Part",
    "Source",
    "fit",
    "inner_scores",
    "logits_of",
    "soup",
]  # fmt: skip

STANDARD_ROWS = 1024  # at most, evenly spaced, give means and scales of tokens


@dataclass(frozen=True)
class Fitted:
    """A trained head, its own encoders if they were trained too (plain weights, whatever the method), and
    the calibration ``scale * logits + shift``.

    task: the one it was trained for. trained: how many numbers of the encoders were trained. facts: what else
    head.json tells of this seed.
    """

    head: Head
    model: Encoders | None
    scale: float
    shift: float
    best_epoch: int
    task: Task
    trained: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def fit(
    config: HeadConfig,
    adapt: AdaptConfig,
    stopping: StoppingConfig,
    task: Task,
    train: Part,
    inner: Part,
    *,
    widths: dict[str, int],
    token_widths: dict[str, int] | None = None,
    pooled: Sequence[str] = (),
    seed: int,
    init_seed: int | None = None,
    calibration: str = "none",
    live: tuple[LiveRows, LiveRows] | None = None,
    device: torch.device | None = None,
    log: Log = lambda row: None,
    start: Callable[[Head], None] = lambda head: None,
    keeper: Keeper | None = None,
) -> Fitted:
    """Train one head with one seed and keep the weights of its best epoch on the inner rows.

    ``live``: the training and inner rows with a model that may be changed, for all methods but
    ``linear_probe``. ``pooled``: modalities of several vectors per row, which the head pools. ``init_seed``:
    gives the head's initial weights in the place of ``seed``. ``log`` gets one row per epoch: ``epoch``,
    ``samples_seen``, ``loss``, ``lr``, ``inner_loss`` and ``inner_<metric>``. ``start`` gives a new head what
    it takes from the encoders, see ``start_joint``. ``keeper`` keeps the epochs of encoders or tokens, from
    which an equal call goes on; cheaper ones before them are run again.
    """
    task = task.fitted(train.targets)
    train = replace(train, weights=task.weights(train.targets, train.weights))
    gpus = [device] if device is not None and device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed if init_seed is None else init_seed)
        head = build_head(config, widths, task.outputs, token_widths, task.link, pooled)
        start(head)
        head.to(device)
        if init_seed is not None:
            torch.manual_seed(seed)
        rows = torch.arange(len(train.rows))
        if head.reads_tokens:  # all of them may exceed memory
            rows = rows[:: -(-len(rows) // STANDARD_ROWS)]
        features, present = train.rows.batch(rows, tokens=head.reads_tokens)
        head.fit_standard(features, present)
        del features, present
        if isinstance(head, Ordinal):
            head.fit_thresholds(torch.bincount(train.targets, minlength=len(task.classes)).tolist())
        initial = copy.deepcopy(head.state_dict())
        run = training_of(task)(head, task, adapt, stopping, seed, log)
        if adapt.method != "full":
            groups = parameter_groups(head, adapt.weight_decay)
            own = keeper if head.reads_tokens else None  # such heads are never trained with encoders
            run.epochs(train, inner, groups, adapt.lr, adapt.epochs, adapt.batch_size, own)
            run.restore()
        tuned = _Tuned(run.best_epoch)
        if adapt.tunes_encoders:
            assert live is not None
            tuned = _tune(run, initial, replace(train, rows=live[0]), replace(inner, rows=live[1]), keeper)
        rows = inner.rows if tuned.model is None or live is None else live[1]
        logits = logits_of(head, rows, batch_size=eval_batch(rows))
        scale, shift = calibrate(task, logits, inner.targets.cpu(), calibration)
    return Fitted(head, tuned.model, scale, shift, tuned.best_epoch, task, tuned.trained, tuned.facts)


@dataclass(frozen=True)
class _Tuned:
    best_epoch: int
    model: Encoders | None = None
    trained: int = 0
    facts: dict[str, Any] = field(default_factory=dict)


def _tune(run: Training, initial: State | None, train: Part, inner: Part, keeper: Keeper | None) -> _Tuned:
    """Train the encoders of live rows with the head of a run, in place. The head has its best weights so
    far; ``initial`` are those that it began with."""
    assert isinstance(train.rows, LiveRows)
    assert isinstance(inner.rows, LiveRows)
    head, adapt, model, every = run.head, run.adapt, train.rows.model, inner.rows
    before = retention(every, inner.targets, run.task, adapt)
    pretrained = copy.deepcopy(model.clip.state_dict())
    open_encoders(model, head.modalities, adapt)
    trained = sum(p.numel() for p in model.clip.parameters() if p.requires_grad)
    train, inner = (replace(part, rows=_reading(part.rows, head)) for part in (train, inner))
    alphas, floor, facts = adapt.alphas, None, dict[str, Any]()
    if adapt.method == "contrastive":
        floor = (run.best_score, copy.deepcopy(head.state_dict())) if not alphas else None
        alphas = alphas or (1.0,)
        _contrast(run, model, train, inner, keeper)
    else:
        initial = None
        groups = parameter_groups(head, adapt.weight_decay) + encoder_groups(model, adapt)
        run.also(model.clip)
        run.epochs(train, inner, groups, adapt.lr, adapt.encoder_epochs, adapt.encoder_batch_size, keeper)
        run.restore()
        merge_lora(model.clip)
    best_epoch = run.best_epoch
    if alphas:
        alpha, best_epoch, scores = choose_alpha(
            run, alphas, pretrained, train, inner, initial=initial, floor=floor
        )
        sign = 1 if higher_is_better(run.metric) else -1
        facts["alpha"] = alpha
        facts["inner_by_alpha"] = {str(a): sign * score for a, score in scores.items()}
    after = retention(every, inner.targets, run.task, adapt)
    if before is not None and after is not None:
        facts["retention"] = {k: before[k] for k in ("measure", "n")}
        facts["retention"] |= {"before": before["value"], "after": after["value"]}
    return _Tuned(best_epoch, model, trained, facts)


def training_of(task: Task) -> type[Training]:
    """The training loop of a task."""
    if task.negatives is not None:
        return MatchTraining
    return PairTraining if task.type == "retrieval" else Training


def _reading(rows: Source, head: Head) -> LiveRows:
    """Live rows whose encoders work for the modalities that a head reads alone."""
    assert isinstance(rows, LiveRows)
    return replace(rows, read=head.modalities)


def _contrast(run: Training, model: Encoders, train: Part, inner: Part, keeper: Keeper | None) -> None:
    """The contrastive epochs of a run: the encoders of the best one by zero-shot classification, or by
    retrieval, stay."""
    task, adapt = run.task, run.adapt
    assert isinstance(model, LoadedModel)
    assert isinstance(train.rows, LiveRows)
    if task.type == "retrieval":
        pairs = Vectors(dict.fromkeys(run.head.modalities, model.embed_dim), project=False)
        start_vectors(pairs, model)
        contrast = PairTraining(pairs.to(model.device), task, adapt, run.stopping, run.seed, run.log)
    else:
        prompts, together = class_texts(adapt, task.classes), train.rows.together
        texts = ClassTexts(model, prompts, run.head.modalities, task.outputs, together=together)
        contrast = ClassContrast(texts, task, adapt, run.stopping, run.seed, run.log)
    contrast.note = {"phase": "contrastive"}
    contrast.count_on(run)
    contrast.also(model.clip)
    groups = encoder_groups(model, adapt)
    contrast.epochs(train, inner, groups, adapt.lr, adapt.encoder_epochs, adapt.encoder_batch_size, keeper)
    contrast.restore()
    run.epoch, run.samples_seen = contrast.epoch, contrast.samples_seen


def soup(
    members: Sequence[tuple[int, Fitted]],
    adapt: AdaptConfig,
    stopping: StoppingConfig,
    inner: Part,
    live_of: Callable[[Encoders], LiveRows],
    calibration: str,
) -> list[tuple[int, Fitted]]:
    """One model in the place of the seeds': the mean of their weights, heads and encoders. The members must
    have begun with the same weights (``init_seed``).

    ``inner``: the inner rows with the run's features; ``live_of``: the same rows with given encoders. The
    result has the seed of its best member and tells the WiSE-FT of all members. The first member's head
    and encoders are overwritten.
    """
    task = members[0][1].task
    metric = task.check_metric(stopping.metric)
    heads = [copy.deepcopy(one.head.state_dict()) for _, one in members]
    clips = [copy.deepcopy(one.model.clip.state_dict()) for _, one in members if one.model is not None]
    head, model = members[0][1].head, members[0][1].model
    if model is not None:
        inner = replace(inner, rows=live_of(model))

    def score_of(numbers: Sequence[int]) -> float:
        head.load_state_dict(mean_state([heads[i] for i in numbers]))
        if model is not None:
            model.clip.load_state_dict(mean_state([clips[i] for i in numbers]))
        return inner_score(task, metric, head, inner)[0]

    scores = [score_of([i]) for i in range(len(members))]
    chosen = range(len(members)) if adapt.soup == "uniform" else greedy(scores, score_of)
    score_of(chosen)  # leaves the mean in place
    logits = logits_of(head, inner.rows, batch_size=eval_batch(inner.rows))
    scale, shift = calibrate(task, logits, inner.targets.cpu(), calibration)
    seed, best = members[max(chosen, key=lambda i: scores[i])]
    facts: dict[str, Any] = {"soup": sorted(members[i][0] for i in chosen)}
    kept = ("alpha", "inner_by_alpha")
    if "alpha" in best.facts:
        facts["members"] = {str(number): {k: one.facts[k] for k in kept} for number, one in members}
    if "retention" in best.facts:
        assert isinstance(inner.rows, LiveRows)
        after = retention(inner.rows, inner.targets, task, adapt)
        assert after is not None
        facts["retention"] = best.facts["retention"] | {"after": after["value"]}
    return [(seed, Fitted(head, model, scale, shift, best.best_epoch, task, best.trained, facts))]
