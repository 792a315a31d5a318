"""Points of ROC and precision-recall curves, as scikit-learn gives them, and fewer of them for drawing."""

from typing import Any

import numpy as np

from ..tasks.metrics import Floats

__all__ = ["pr_points", "roc_points", "stepped", "thinned"]


def _counts(positive: Any, scores: Floats) -> tuple[Floats, Floats]:
    """True and false positives when all rows from each distinct score on are called positive, from the
    highest score down."""
    order = np.argsort(-scores, kind="stable")
    ranked, hit = scores[order], np.asarray(positive, dtype=bool)[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))
    tp = np.cumsum(hit)[last].astype(np.float64)
    return tp, 1.0 + last - tp


def roc_points(positive: Any, scores: Floats) -> tuple[Floats, Floats]:
    """False and true positive rates, float64 [k] each, from (0, 0) to (1, 1), of ``positive`` bool [n] and
    scores float64 [n]; one point per distinct score. Needs a positive and a negative row.

    The area by the trapezoidal rule is the AUROC.
    """
    tp, fp = _counts(positive, scores)
    return np.append(0.0, fp / fp[-1]), np.append(0.0, tp / tp[-1])


def pr_points(positive: Any, scores: Floats) -> tuple[Floats, Floats]:
    """Recall and precision, float64 [k] each, by rising recall from (0, 1) on; one point per distinct score.
    Needs a positive row.

    The sum of precision times the step of recall is the average precision.
    """
    tp, fp = _counts(positive, scores)
    return np.append(0.0, tp / tp[-1]), np.append(1.0, tp / (tp + fp))


def stepped(recall: Floats, precision: Floats) -> tuple[Floats, Floats]:
    """The staircase whose area is the average precision: the precision of a point holds since the recall of
    the point before it."""
    xs = np.repeat(recall, 2)[:-1]
    ys = np.repeat(precision, 2)[1:]
    return xs, ys


def thinned(xs: Floats, ys: Floats, most: int = 240) -> tuple[list[float], list[float]]:
    """At most ``most`` of the points, the first and the last among them, evenly spread along the curve."""
    if len(xs) <= most:
        return xs.tolist(), ys.tolist()
    way = np.append(0.0, np.cumsum(np.abs(np.diff(xs)) + np.abs(np.diff(ys))))
    kept = np.unique(np.searchsorted(way, np.linspace(0, way[-1], most)).clip(0, len(xs) - 1))
    kept = np.unique(np.concatenate([[0], kept, [len(xs) - 1]]))
    if len(kept) > most:
        kept = np.delete(kept, len(kept) // 2)
    return xs[kept].tolist(), ys[kept].tolist()
