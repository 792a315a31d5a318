"""Scores with intervals: the bootstrap over groups of queries or rows that every reported number takes.

Rows of one group (the drawings of one emoji, the rows of one product) are not independent, so groups are
resampled, never rows (Cameron, Gelbach and Miller 2008). Intervals are 95 % percentile intervals.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError

__all__ = ["Interval", "Score", "bootstrap_means", "bootstrap_metric", "group_ids", "score"]

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
CONFIDENCE = 0.95
_CHUNK = 1 << 20  # resampled group numbers held at once


@dataclass(frozen=True)
class Interval:
    """A value with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Score(Interval):
    """An interval beside the level of guessing; ``majority`` is that of the best constant answer."""

    chance: float
    majority: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers for JSON, without an undefined majority."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def group_ids(groups: Any, n: int) -> Ints:
    """Group numbers 0.. [n] of any hashable labels [n]; None makes every row its own group."""
    if groups is None:
        return np.arange(n, dtype=np.int64)
    labels = np.asarray(groups)
    assert labels.shape == (n,), f"{labels.shape} groups for {n} rows"
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)


def _draws(n_groups: int, samples: int, seed: int) -> Iterator[Ints]:
    """How often each group occurs in each bootstrap sample, int64 [chunk, G]; the same for any chunk size."""
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK // n_groups)
    for start in range(0, samples, step):
        rows = min(step, samples - start)
        drawn = rng.integers(0, n_groups, size=(rows, n_groups)) + np.arange(rows)[:, None] * n_groups
        yield np.bincount(drawn.ravel(), minlength=rows * n_groups).reshape(rows, n_groups)


def bootstrap_means(values: Any, groups: Any = None, *, samples: int = 2000, seed: int = 0) -> list[Interval]:
    """Mean of each column of ``values`` [n, K] (or [n]) with its interval over resampled groups.

    All columns share the resamples, so a difference column gives the paired interval. A column that is all 0
    or all 1 would get an interval of no width; there the exact binomial bound over the groups stands instead
    (Clopper and Pearson 1934), so ten misses out of ten are not reported as certainty.
    """
    table = np.asarray(values, dtype=np.float64)
    table = table[:, None] if table.ndim == 1 else table
    if len(table) == 0:
        raise UserError("there is nothing to score: the selection holds no rows")
    ids = group_ids(groups, len(table))
    n_groups = int(ids.max()) + 1
    sizes = np.bincount(ids, minlength=n_groups).astype(np.float64)
    sums = np.stack([np.bincount(ids, weights=column, minlength=n_groups) for column in table.T], axis=1)
    means = np.concatenate(
        [(counts @ sums) / (counts @ sizes)[:, None] for counts in _draws(n_groups, samples, seed)]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail], axis=0)
    value = table.mean(axis=0)
    bound = tail ** (1 / n_groups)
    low, high = np.where((table == 1).all(0), bound, low), np.where((table == 0).all(0), 1 - bound, high)
    # rounding of the weighted means must not push an end past the value
    low, high = np.minimum(low, value), np.maximum(high, value)
    return [Interval(*map(float, row)) for row in zip(value, low, high, strict=True)]


def bootstrap_metric(
    metric: Callable[[Ints], float], n: int, groups: Any = None, *, samples: int = 1000, seed: int = 0
) -> Interval:
    """Interval of any metric of rows: ``metric`` gets row numbers (with repeats) and returns a number.

    For a paired comparison let it return the difference of two predictors on the same rows. Samples where the
    metric is undefined (NaN, such as an AUROC with one class) are left out.
    """
    ids = group_ids(groups, n)
    order = np.argsort(ids, kind="stable")
    starts = np.searchsorted(ids[order], np.arange(int(ids.max()) + 2))
    members = [order[a:b] for a, b in pairwise(starts)]
    values: list[float] = []
    for counts in _draws(len(members), samples, seed):
        for row in counts:
            chosen = [members[g] for g in np.repeat(np.arange(len(members)), row)]
            values.append(float(metric(np.concatenate(chosen))))
    defined = np.array(values)[~np.isnan(values)]
    value = float(metric(np.arange(n)))
    if len(defined) == 0:
        return Interval(value, float("nan"), float("nan"))
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(defined, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def score(
    hits: Any,
    groups: Any = None,
    *,
    chance: float,
    majority: float | None = None,
    samples: int = 2000,
    seed: int = 0,
) -> Score:
    """Share of hits [n] (bool or 0/1) with its interval, beside chance and majority."""
    interval = bootstrap_means(hits, groups, samples=samples, seed=seed)[0]
    return Score(interval.value, interval.low, interval.high, chance, majority)
