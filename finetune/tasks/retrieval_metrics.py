"""Metrics of retrieval: pictures find their texts and texts their pictures.

The gallery is the distinct pictures, or texts, of the rows that are searched together (the test rows, or
those of one fold); every distinct item that has a match there is a query once. A picture and a text match if
some row of the one and some row of the other match the same (see ``links``). R@K is the hit rate: the share
of queries with at least one match among their K nearest (CLIP, Radford et al. 2021; CLIP_benchmark), not the
share of matches that were found. mAP@R is the mean over queries of the average precision among the first R,
R being the query's number of matches (Musgrave et al. 2020, arXiv 2003.08505). Ties go to the lower place in
a gallery that is ordered by hashes of content: by chance, and the same each time.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix

from ...pretrain.retrieval import hit_chance, ranks_among, top_k
from ..tables.links import GALLERY, KEY, MISSING, PICTURE, TEXT
from .metrics import Floats, Ints, Prepare, WeightedMetric
from .vectors import halves

__all__ = ["KS", "RETRIEVAL", "WAYS", "Way", "chances", "galleries", "hit_rate", "search"]

KS = (1, 5, 10)
WAYS = {"image_to_text": (PICTURE, TEXT), "text_to_image": (TEXT, PICTURE)}
"""From which column of the targets to which is searched."""


@dataclass(frozen=True)
class Way:
    """The queries of one way. rows: the first row of each, int64 [q]; matches, sizes: how many matches it has
    among how many items; ranks: of its best match, from 0; precision: its average precision among the first
    R, float64 [q]."""

    rows: Ints
    matches: Ints
    sizes: Ints
    ranks: Ints
    precision: Floats


@dataclass(frozen=True)
class _Gallery:
    """Queries with matches, and the items searched: the first row of each, and which match, [q, g]."""

    queries: Ints
    items: Ints
    relevant: Any


def _gallery(targets: Ints, rows: Ints, source: int, aim: int) -> _Gallery:
    """The search from one column to another among some rows."""
    keys = np.unique(targets[rows, KEY], return_inverse=True)[1]
    firsts: list[Ints] = []
    holds: list[Any] = []
    for column in (source, aim):
        there = np.flatnonzero(targets[rows, column] != MISSING)
        _, first, number = np.unique(targets[rows[there], column], return_index=True, return_inverse=True)
        firsts.append(rows[there[first]])
        ones = np.ones(len(there), dtype=np.int32)
        holds.append(csr_matrix((ones, (number, keys[there])), shape=(len(first), keys.max(initial=-1) + 1)))
    relevant = csr_matrix(holds[0] @ holds[1].T)
    asked = np.flatnonzero(np.diff(relevant.indptr))
    return _Gallery(firsts[0][asked], firsts[1], relevant[asked])


def _split(targets: Ints) -> list[Ints]:
    """The rows of each gallery."""
    return [np.flatnonzero(targets[:, GALLERY] == number) for number in np.unique(targets[:, GALLERY])]


def galleries(targets: Ints) -> dict[str, Any]:
    """Per way the number of queries, and the mean over queries of matches and of gallery size; how many
    galleries there are."""
    told: dict[str, Any] = {"n": len(_split(targets))}
    for way, (source, aim) in WAYS.items():
        found = [_gallery(targets, rows, source, aim) for rows in _split(targets)]
        queries = [len(one.queries) for one in found]
        n = max(1, sum(queries))
        told[way] = {
            "queries": sum(queries),
            "size": sum(q * len(one.items) for q, one in zip(queries, found, strict=True)) / n,
            "matches": sum(int(one.relevant.nnz) for one in found) / n,
        }
    return told


def _way(targets: Ints, p: Floats, source: int, aim: int) -> Way:
    """Search one way in every gallery. Vectors of items are those of their first rows."""
    vectors = dict(zip((PICTURE, TEXT), halves(p), strict=True))
    made: list[list[Any]] = []
    for rows in _split(targets):
        found = _gallery(targets, rows, source, aim)
        if len(found.queries) == 0:
            continue
        queries, items, relevant = vectors[source][found.queries], vectors[aim][found.items], found.relevant
        ranks = ranks_among(
            queries, items, lambda part, of=relevant: torch.from_numpy(of[part].toarray() > 0)
        )
        matches = np.diff(relevant.indptr).astype(np.int64)
        places = top_k(queries, items, int(matches.max()))[1]
        asking = np.repeat(np.arange(len(queries)), places.shape[1])
        hits = np.asarray(relevant[asking, places.ravel()]).reshape(places.shape) > 0
        order = np.arange(1, hits.shape[1] + 1)
        hits &= order <= matches[:, None]
        precision = (hits * hits.cumsum(1) / order).sum(1) / matches
        sizes = np.full(len(queries), len(items), dtype=np.int64)
        made.append([found.queries, matches, sizes, ranks, precision])
    if not made:
        none = np.zeros(0, dtype=np.int64)
        return Way(none, none, none, none, none.astype(np.float64))
    return Way(*(np.concatenate(part) for part in zip(*made, strict=True)))


class _Last:
    """The last search: metrics are prepared one after the other for the same arrays, which nobody changes."""

    targets: Any = None
    p: Any = None
    ways: dict[str, Way]

    def of(self, targets: Ints, p: Floats) -> dict[str, Way]:
        if self.targets is not targets or self.p is not p:
            self.ways = {way: _way(targets, p, *columns) for way, columns in WAYS.items()}
            self.targets, self.p = targets, p
        return self.ways


_last = _Last()


def search(targets: Ints, p: Floats) -> dict[str, Way]:
    """Both ways of targets int64 [n, 4] and vectors float64 [n, 2 W]."""
    return _last.of(targets, p)


def _mean(rows: Ints, values: Floats) -> WeightedMetric:
    """Mean of a value per query, weighted by its row; undefined without queries."""

    def value(weights: Floats) -> float:
        w = weights[rows]
        return float(w @ values / w.sum()) if w.sum() > 0 else float("nan")

    return value


def _recall(way: str, k: int) -> Prepare:
    def prepare(targets: Ints, p: Floats) -> WeightedMetric:
        found = search(targets, p)[way]
        return _mean(found.rows, (found.ranks < k).astype(np.float64))

    return prepare


def _mean_recall(targets: Ints, p: Floats) -> WeightedMetric:
    """Mean of R@1, R@5 and R@10 both ways."""
    parts = [_recall(way, k)(targets, p) for way in WAYS for k in KS]
    return lambda weights: float(np.mean([part(weights) for part in parts]))


def _median_rank(way: str) -> Prepare:
    """Median over queries of the rank of the best match, from 1."""

    def prepare(targets: Ints, p: Floats) -> WeightedMetric:
        found = search(targets, p)[way]
        order = np.argsort(found.ranks, kind="stable")
        rows, ranks = found.rows[order], found.ranks[order] + 1.0

        def value(weights: Floats) -> float:
            total = np.cumsum(weights[rows])
            if len(total) == 0 or total[-1] == 0:
                return float("nan")
            ends = (
                np.searchsorted(total, total[-1] / 2, side="left"),
                np.searchsorted(total, total[-1] / 2, "right"),
            )
            return float(ranks[np.minimum(ends, len(ranks) - 1)].mean())

        return value

    return prepare


def _precision(way: str) -> Prepare:
    def prepare(targets: Ints, p: Floats) -> WeightedMetric:
        found = search(targets, p)[way]
        return _mean(found.rows, found.precision)

    return prepare


def _ways(kinds: dict[str, Callable[[str], Prepare]]) -> dict[str, Prepare]:
    return {f"{way}_{kind}": make(way) for kind, make in kinds.items() for way in WAYS}


RETRIEVAL: dict[str, Prepare] = {
    "mean_recall": _mean_recall,
    **_ways({f"R@{k}": lambda way, k=k: _recall(way, k) for k in KS}),
    **_ways({"median_rank": _median_rank, "mAP@R": _precision}),
}


def hit_rate(metric: str) -> bool:
    """Whether a metric is a mean of hits and misses."""
    return "_R@" in metric


def chances(targets: Ints) -> dict[str, float]:
    """What a random order of every gallery gives, exactly: the expectation of every metric but the median
    ranks, of which the median; NaN where nothing is asked."""
    made: dict[str, float] = {}
    for way, columns in WAYS.items():
        found = [_gallery(targets, rows, *columns) for rows in _split(targets)]
        m = np.concatenate([np.diff(one.relevant.indptr) for one in found]).astype(np.int64)
        n = np.concatenate([np.full(len(one.queries), len(one.items)) for one in found])
        parts = [(size, np.unique(m[n == size], return_counts=True)) for size in np.unique(n)]

        def hit(k: int, parts: Any = parts, total: float = len(n) or math.nan) -> float:
            return sum(float(times @ hit_chance(int(size), some, k)) for size, (some, times) in parts) / total

        made |= {f"{way}_R@{k}": hit(k) for k in KS}
        low, high = 1, int(n.max(initial=1))
        while low < high:
            middle = (low + high) // 2
            low, high = (low, middle) if hit(middle) >= 0.5 - 1e-12 else (middle + 1, high)
        made[f"{way}_median_rank"] = float(low)
        random = [
            t * _random_precision(int(size), int(r))
            for size, some in parts
            for r, t in zip(*some, strict=True)
        ]
        made[f"{way}_mAP@R"] = float(sum(random)) / (len(n) or math.nan)
    made["mean_recall"] = float(np.mean([made[f"{way}_R@{k}"] for way in WAYS for k in KS]))
    return {metric: made[metric] for metric in RETRIEVAL}


def _random_precision(n: int, m: int) -> float:
    """Expected average precision among the first m of n items in random order, m of them matches."""
    places = np.arange(1, m + 1)
    other = (m - 1) / (n - 1) if n > 1 else 0.0
    return float((m / n * (1 + (places - 1) * other) / places).sum() / m)
