"""Means of weights: between pretrained and fine-tuned encoders (WiSE-FT, Wortsman et al. 2021, arXiv
2109.01903), and over seeds (model soups, Wortsman et al. 2022, arXiv 2203.05482).

The inner rows alone choose, by the metric of early stopping.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..encoders.live import LiveRows, Part, encode_rows
from .encoders import parameter_groups
from .training import Training

__all__ = ["State", "between", "choose_alpha", "greedy", "mean_state"]

State = Mapping[str, Tensor]


def between(pretrained: State, tuned: State, alpha: float) -> dict[str, Tensor]:
    """(1 - alpha) pretrained + alpha tuned, tensor by tensor; at 0 and 1 bit for bit the one or the other.
    Integers are pretrained's."""
    if alpha in (0.0, 1.0):
        return dict(tuned if alpha else pretrained)
    return {k: torch.lerp(v, tuned[k], alpha) if v.is_floating_point() else v for k, v in pretrained.items()}


def mean_state(states: Sequence[State]) -> dict[str, Tensor]:
    """Mean of states of one kind, summed in fp64, so that equal states give themselves. Integers are the
    first's."""
    out: dict[str, Tensor] = {}
    for name, value in states[0].items():
        mean = torch.stack([state[name].double() for state in states]).mean(0)
        out[name] = mean.to(value.dtype) if value.is_floating_point() else value
    return out


def frozen(part: Part) -> Part:
    """Live rows as tables of what their encoders give now."""
    rows = part.rows
    assert isinstance(rows, LiveRows)
    read = rows.modalities if rows.read is None else tuple(k for k in rows.modalities if k in rows.read)
    features = encode_rows(rows, read)
    index: dict[str, Tensor] = {}
    for k in rows.modalities:  # of those that are not read, whether they are there
        there = torch.tensor([item is not None for item in rows.rows.cells[k]], dtype=torch.int64)
        index[k] = features.index[k] if k in read else there - 1
    features = replace(features, index=index).to(rows.model.device)
    return replace(part, rows=features if rows.columns is None else features.beside(rows.columns))


def refit(earlier: Training, train: Part, inner: Part, note: dict[str, Any], *, warm: bool) -> Training:
    """Train the head again, from its weights as they are, on what the encoders of live rows give now.

    ``warm``: the weights know these encoders or some near to them, and stay if no epoch is better; without
    it they are initial ones, and the features' means and scales are taken anew.
    """
    head, adapt, tables = earlier.head, earlier.adapt, (frozen(train), frozen(inner))
    again = type(earlier)(head, earlier.task, adapt, earlier.stopping, earlier.seed, earlier.log)
    again.note = note
    again.count_on(earlier)
    if warm:
        again.begin_with_best(tables[1])
    else:
        head.fit_standard(*tables[0].rows.batch(torch.arange(len(tables[0].rows))))
    groups = parameter_groups(head, adapt.weight_decay)
    again.epochs(*tables, groups, adapt.lr, adapt.epochs, adapt.batch_size)
    again.restore()
    return again


def choose_alpha(
    run: Training,
    alphas: Sequence[float],
    pretrained: State,
    train: Part,
    inner: Part,
    *,
    initial: State | None = None,
    floor: tuple[float, State] | None = None,
) -> tuple[float, int, dict[float, float]]:
    """Try encoders between ``pretrained`` and those of the live rows, refit the head on each, and leave the
    best in place; of equals the one nearest to the pretrained encoders.

    ``initial``: weights that the head begins with instead of those it has. ``floor``: score and head of the
    pretrained encoders, kept where nothing is better. Returns the share that was taken, its best epoch, and
    the score of each.
    """
    assert isinstance(inner.rows, LiveRows)
    clip, head = inner.rows.model.clip, run.head
    tuned, warm = copy.deepcopy(clip.state_dict()), initial is None
    begin = copy.deepcopy(head.state_dict()) if initial is None else initial
    best: tuple[float, float, int, State] | None = None
    if floor is not None:
        best = (floor[0], 0.0, run.best_epoch, floor[1])
    scores: dict[float, float] = {}
    for alpha in alphas:
        clip.load_state_dict(between(pretrained, tuned, alpha))
        head.load_state_dict(begin)
        last = refit(run, train, inner, {"alpha": alpha}, warm=warm)
        run.epoch, run.samples_seen = last.epoch, last.samples_seen
        scores[alpha] = last.best_score
        if best is None or last.best_score > best[0]:
            best = (last.best_score, alpha, last.best_epoch, copy.deepcopy(head.state_dict()))
    assert best is not None
    _, alpha, epoch, state = best
    clip.load_state_dict(between(pretrained, tuned, alpha))
    head.load_state_dict(state)
    return alpha, epoch, scores


def greedy(scores: Sequence[float], score_of: Callable[[Sequence[int]], float]) -> tuple[int, ...]:
    """Members of a greedy soup (recipe 1 of the paper): from the best member on, each joins unless the mean
    then scores less. ``scores``: of the members; ``score_of``: of the mean of some."""
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    chosen, best = order[:1], scores[order[0]]
    for i in order[1:]:
        score = score_of([*chosen, i])
        if score >= best:
            chosen, best = [*chosen, i], score
    return tuple(chosen)
