"""Bootstrap intervals of several predictors on the same rows, and of their differences.

Groups are resampled, never rows, and all predictors share the resamples: a difference is paired (see
``pretrain.statistics``).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...pretrain.statistics import CONFIDENCE, Interval, bootstrap_means, group_ids
from ..tasks.retrieval_metrics import hit_rate
from ..tasks.task import METRICS, Floats, Task, WeightedMetric, higher_is_better, predicted
from ..tasks.thresholds import DECIDED

__all__ = ["paired_intervals"]


def paired_intervals(
    targets: Any,
    probabilities: Mapping[str, Floats],
    metrics: Sequence[str],
    groups: Any = None,
    *,
    task: Task | None = None,
    said: Mapping[str, Floats] | None = None,
    against: str | None = None,
    samples: int = 1000,
    seed: int = 0,
) -> tuple[dict[str, dict[str, Interval]], dict[str, Interval]]:
    """Intervals ``{predictor: {metric: Interval}}`` and, of the first metric, each predictor's gain over
    ``against``: their difference, turned round where less is better, so that a positive gain is a better
    predictor.

    targets: int64 [n], or what ``task`` says (default: binary or multiclass); probabilities: float64 [n, C]
    per predictor; groups: any labels [n], None for rows by themselves; said: answers of which metrics of what
    is said are taken (see ``thresholds.decided``), by default the probabilities. Resamples where a metric is
    undefined (an AUROC with one class) are left out.
    """
    said = probabilities if said is None else said
    names = list(probabilities)
    prepare, decide = (METRICS.__getitem__, predicted) if task is None else (task.prepare, task.predicted)
    prepared = [
        [prepare(m)(targets, (said if m in DECIDED else probabilities)[name]) for m in metrics]
        for name in names
    ]
    ids = group_ids(groups, len(targets))
    n_groups = int(ids.max()) + 1
    rng = np.random.default_rng(seed)
    drawn = np.empty((samples, len(names), len(metrics)))
    for i in range(samples):
        weights = np.bincount(rng.integers(0, n_groups, n_groups), minlength=n_groups)[ids].astype(np.float64)
        drawn[i] = _values(prepared, weights)
    value = np.array(_values(prepared, np.ones(len(targets))))
    scores = {
        name: {m: _interval(value[i, j], drawn[:, i, j]) for j, m in enumerate(metrics)}
        for i, name in enumerate(names)
    }
    if "accuracy" in metrics:  # the same resamples, and a bound where all rows are right or wrong
        hits = np.stack([decide(said[name]) == targets for name in names], axis=1)
        exact = bootstrap_means(hits, groups, samples=samples, seed=seed)
        for name, interval in zip(names, exact, strict=True):
            scores[name]["accuracy"] = interval
    bound = ((1 - CONFIDENCE) / 2) ** (1 / n_groups)
    for one in scores.values():  # a hit rate of all or none is no certainty, see ``bootstrap_means``
        for metric in filter(hit_rate, metrics):
            one[metric] = _exact(one[metric], bound)
    if against is None:
        return scores, {}
    base = names.index(against)
    sign = 1 if higher_is_better(metrics[0]) else -1
    gains = {
        name: _interval(sign * (value[i, 0] - value[base, 0]), sign * (drawn[:, i, 0] - drawn[:, base, 0]))
        for i, name in enumerate(names)
        if name != against
    }
    return scores, gains


def _values(prepared: list[list[WeightedMetric]], weights: Floats) -> list[list[float]]:
    return [[metric(weights) for metric in row] for row in prepared]


def _exact(interval: Interval, bound: float) -> Interval:
    low = bound if interval.value == 1 else interval.low
    return Interval(interval.value, low, 1 - bound if interval.value == 0 else interval.high)


def _interval(value: float, drawn: Floats) -> Interval:
    """Percentile interval; never past the value by rounding."""
    defined = drawn[~np.isnan(drawn)]
    if len(defined) == 0:
        return Interval(float(value), float("nan"), float("nan"))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(float(value), float(min(low, value)), float(max(high, value)))
