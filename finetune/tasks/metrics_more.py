"""Metrics of multilabel and regression tasks, prepared for fixed rows and evaluated for row weights, like
those of ``metrics``."""

import numpy as np
from numpy.typing import NDArray

from .metrics import Floats, Ints, Prepare, WeightedMetric, calibration_error, mean_of

__all__ = ["MULTILABEL", "REGRESSION", "defined_labels"]


def defined_labels(targets: Ints) -> NDArray[np.bool_]:
    """bool [L]: labels that have both a positive and a negative row among targets [n, L]."""
    return (targets.min(axis=0) == 0) & (targets.max(axis=0) == 1)


def _falling(scores: Floats) -> tuple[Ints, Ints]:
    """The order of each column by falling score, and where in it the tie of each place ends: all of a tie
    share its precision."""
    order = np.argsort(-scores, axis=0, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=0)
    last = np.append(ranked[1:] != ranked[:-1], np.ones((1, scores.shape[1]), dtype=bool), axis=0)
    places = np.where(last, np.arange(len(scores))[:, None], len(scores))
    return order, np.minimum.accumulate(places[::-1], axis=0)[::-1]


def _mean_average_precision(targets: Ints, p: Floats) -> WeightedMetric:
    """Average precision per label and its mean over the labels that have positive and negative rows.

    A label without positives has no average precision; as a 0 it would fake a collapse of rare labels.
    Undefined where no label is left.
    """
    order, end = _falling(p)
    positive = np.take_along_axis(targets == 1, order, axis=0)

    def value(weights: Floats) -> float:
        w = weights[order]
        hits = w * positive
        tp, every = (np.take_along_axis(np.cumsum(x, axis=0), end, axis=0) for x in (hits, w))
        total = hits.sum(axis=0)
        defined = (total > 0) & (total < w.sum(axis=0))
        if not defined.any():
            return float("nan")
        precision = np.divide(tp, every, out=np.zeros_like(tp), where=every > 0)
        return float(((hits * precision).sum(axis=0)[defined] / total[defined]).mean())

    return value


def _counts(targets: Ints, p: Floats) -> tuple[Floats, Floats]:
    """True positives, and true plus said positives, float64 [n, L], at the threshold 0.5."""
    said = (p >= 0.5).astype(np.float64)
    return said * targets, said + targets


def _micro_f1(targets: Ints, p: Floats) -> WeightedMetric:
    """F1 over all rows and labels together; 0 where nothing is positive and nothing was said."""
    both, either = (x.sum(axis=1) for x in _counts(targets, p))

    def value(weights: Floats) -> float:
        size = float(weights @ either)
        return 2 * float(weights @ both) / size if size else 0.0

    return value


def _macro_f1(targets: Ints, p: Floats) -> WeightedMetric:
    """Mean F1 of the labels that occur in rows or predictions; undefined where none does."""
    both, either = _counts(targets, p)

    def value(weights: Floats) -> float:
        hit, size = weights @ both, weights @ either
        defined = size > 0
        return float((2 * hit[defined] / size[defined]).mean()) if defined.any() else float("nan")

    return value


def _ranking_precision(targets: Ints, p: Floats) -> WeightedMetric:
    """Label ranking average precision: of the labels ranked at least as high as a true one, the share that is
    true, averaged over a row's true labels and then over rows. A row with no or with all labels counts 1."""
    order, end = _falling(p.T)
    true = np.take_along_axis(targets.T == 1, order, axis=0)
    share = np.take_along_axis(np.cumsum(true, axis=0), end, axis=0) / (end + 1)
    count = true.sum(axis=0)
    some = (count > 0) & (count < len(true))
    values = np.ones(len(p))
    values[some] = (share * true).sum(axis=0)[some] / count[some]
    return mean_of(values)


def _label_ece(targets: Ints, p: Floats) -> WeightedMetric:
    """Calibration error of the labels' probabilities, all labels pooled."""
    return calibration_error(p.ravel(), targets.ravel().astype(np.float64), p.shape[1])


def _rmse(targets: Floats, answers: Floats) -> WeightedMetric:
    """Root of the mean squared error."""
    mean = mean_of((answers[:, 0] - targets) ** 2)
    return lambda weights: mean(weights) ** 0.5


def _mae(targets: Floats, answers: Floats) -> WeightedMetric:
    """Mean absolute error."""
    return mean_of(np.abs(answers[:, 0] - targets))


def _r2(targets: Floats, answers: Floats) -> WeightedMetric:
    """1 - squared error over that of the mean; undefined where all targets are equal."""
    error = (answers[:, 0] - targets) ** 2

    def value(weights: Floats) -> float:
        seen = targets[weights > 0]
        if seen.min() == seen.max():
            return float("nan")
        centred = targets - weights @ targets / weights.sum()
        return 1 - float(weights @ error) / float(weights @ centred**2)

    return value


def _spearman(targets: Floats, answers: Floats) -> WeightedMetric:
    """Spearman's rank correlation, ties at their mean rank; undefined where one side is constant."""
    levels = [np.unique(x, return_inverse=True)[1] for x in (targets, answers[:, 0])]

    def value(weights: Floats) -> float:
        ranks: list[Floats] = []
        for level in levels:
            size = np.bincount(level, weights)
            rank = (np.cumsum(size) - size / 2)[level]
            ranks.append(rank - weights @ rank / weights.sum())
        a, b = ranks
        spread = (float(weights @ a**2) * float(weights @ b**2)) ** 0.5
        return float(weights @ (a * b)) / spread if spread > 1e-12 else float("nan")

    return value


MULTILABEL: dict[str, Prepare] = {
    "macro_map": _mean_average_precision,
    "micro_f1": _micro_f1,
    "macro_f1": _macro_f1,
    "lrap": _ranking_precision,
    "ece": _label_ece,
}
REGRESSION: dict[str, Prepare] = {"rmse": _rmse, "mae": _mae, "r2": _r2, "spearman": _spearman}
