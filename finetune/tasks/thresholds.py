"""From which probability on a label is said: a number of the config, or chosen on the inner rows for F1.

Only binary and multilabel tasks have such thresholds, multilabel ones one per label. They move what is said,
and so accuracy and F1; probabilities, rankings, calibration and losses are as they are.
"""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .task import Floats, Task

__all__ = ["DECIDED", "Threshold", "best_threshold", "choose_thresholds", "decided", "has_thresholds", "used"]

Threshold = float | Literal["auto"]
DECIDED = ("accuracy", "f1", "micro_f1", "macro_f1")
"""Metrics of what is said."""
USUAL = 0.5


def has_thresholds(task: str) -> bool:
    """Whether tasks of this type say a label from some probability on."""
    return task in ("binary", "multilabel")


def best_threshold(positive: NDArray[np.bool_], p: Floats) -> float:
    """The threshold t with the greatest F1 of ``p >= t`` (Lipton et al. 2014, arXiv 1402.1892) on rows: which
    are positive [n], and their probabilities [n].

    Between two neighbouring probabilities F1 is the same; such a range stands by its middle, that with 0.5 in
    it by 0.5. Of ranges with equal F1 it is the one nearest to 0.5, of two as near the lower. F1 is 0 where
    nothing is right, so without a positive row it is 0.5.
    """
    values = np.unique(p)
    edges = np.concatenate([[0.0], values])
    middle = (edges[:-1] + edges[1:]) / 2
    middle = np.where(middle > edges[:-1], middle, values)  # of neighbouring floats the middle is one of them
    middle[(edges[:-1] < USUAL) & (values >= USUAL)] = USUAL
    candidates = np.append(middle, USUAL)  # which may lie above all
    ranked = np.sort(p[positive])
    right = len(ranked) - np.searchsorted(ranked, candidates, side="left")
    said = len(p) - np.searchsorted(np.sort(p), candidates, side="left")
    f1 = 2 * right / np.maximum(said + len(ranked), 1)
    best = candidates[f1 == f1.max()]
    distance = np.abs(best - USUAL)
    return float(best[distance == distance.min()].min())


def choose_thresholds(task: Task, targets: Any, p: Floats) -> list[float]:
    """The best threshold of the positive class, or of every label, for answers p [n, C]; none for other
    tasks."""
    if task.type == "binary":
        return [best_threshold(targets == 1, p[:, 1])]
    if task.type == "multilabel":
        return [best_threshold(targets[:, c] == 1, p[:, c]) for c in range(p.shape[1])]
    return []


def used(setting: Threshold, chosen: Sequence[float]) -> list[float]:
    """The thresholds that a setting means, where ``chosen`` are those of the inner rows."""
    return [float(t) if setting == "auto" else float(setting) for t in chosen]


def decided(task: Task, p: Floats, thresholds: Any) -> Floats:
    """What is said of answers p [..., C] as probabilities of 0 and 1; p itself for tasks without thresholds.

    thresholds: [1] or [labels], or of every row [n, 1] or [n, labels].
    """
    if not has_thresholds(task.type):
        return p
    limits = np.asarray(thresholds, dtype=np.float64)
    if task.type == "multilabel":
        return (p >= limits).astype(np.float64)
    said = (p[..., 1:] >= limits).astype(np.float64)
    return np.concatenate([1 - said, said], axis=-1)
