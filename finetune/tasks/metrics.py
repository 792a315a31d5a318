"""Metrics of class probabilities, each prepared once for fixed rows and then evaluated for row weights.

That is what makes a bootstrap of thousands of resamples cheap. With equal weights they are scikit-learn's,
and with whole-number weights scikit-learn's on repeated rows, as the tests show.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["BINARY", "BINS", "MULTICLASS", "ORDINAL", "Floats", "Ints", "Prepare", "WeightedMetric"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
WeightedMetric = Callable[[Floats], float]
"""Row weights float64 [n] to the metric's value; NaN where it is undefined."""
Prepare = Callable[[Any, Floats], WeightedMetric]
"""Targets [n] or [n, L] and answers [n, C] to the metric of their rows."""
BINS = 15
UNITS = (
    "qwk", "rmse", "mae", "mae_ranks", "r2", "spearman", "image_to_text_median_rank",
    "text_to_image_median_rank",
)  # fmt: skip
"""Metrics that are no shares, so that a percent of them says nothing."""


def higher_is_better(name: str) -> bool:
    """Whether more of a metric is better."""
    less = ("loss", "brier", "ece", "rmse", "mae", "mae_ranks")
    return name not in less and not name.endswith("median_rank")


def predicted(p: Floats) -> Ints:
    """Class numbers int64 [n] of probabilities [n, C]; of equals the first, of two classes the second."""
    return (p[:, 1] >= 0.5).astype(np.int64) if p.shape[1] == 2 else p.argmax(axis=1)


def median_class(p: Floats) -> Ints:
    """The class int64 [n] that holds the middle of ordered probabilities [n, K]: as many thresholds are
    passed as have P(y > k) > 1/2 (CORAL, Cao et al. 2020, arXiv 1901.07884). It has the least expected
    distance in ranks."""
    return (p.cumsum(axis=1)[:, :-1] < 0.5 - 1e-9).sum(axis=1)  # a half but for rounding is a half


def mean_of(values: NDArray[Any]) -> WeightedMetric:
    """The mean of one value per row."""
    return lambda weights: float(weights @ values / weights.sum())


def _accuracy(decide: Callable[[Floats], Ints]) -> Prepare:
    """Share of rows whose said class is theirs (binary: the positive one from 0.5 on)."""
    return lambda targets, p: mean_of((decide(p) == targets).astype(np.float64))


def _ranked(targets: Ints, p: Floats) -> tuple[Ints, NDArray[np.bool_], Ints]:
    """Rows by falling probability of the positive class, which are positive, and the last of each tie."""
    order = np.argsort(-p[:, 1], kind="stable")
    scores = p[order, 1]
    last = np.flatnonzero(np.append(scores[1:] != scores[:-1], True))
    return order, targets[order] == 1, last


def _auroc(targets: Ints, p: Floats) -> WeightedMetric:
    """Area under the ROC curve; ties count half. Undefined with one class."""
    order, positive, last = _ranked(targets, p)

    def value(weights: Floats) -> float:
        w = weights[order]
        tp, fp = np.cumsum(w * positive)[last], np.cumsum(w * ~positive)[last]
        if tp[-1] == 0 or fp[-1] == 0:
            return float("nan")
        return float(np.trapezoid(np.append(0, tp), np.append(0, fp)) / (tp[-1] * fp[-1]))

    return value


def _ap(targets: Ints, p: Floats) -> WeightedMetric:
    """Average precision, the step-wise sum of precision over recall. Undefined without positives."""
    order, positive, last = _ranked(targets, p)

    def value(weights: Floats) -> float:
        w = weights[order]
        tp, every = np.cumsum(w * positive)[last], np.cumsum(w)[last]
        if tp[-1] == 0:
            return float("nan")
        precision = np.divide(tp, every, out=np.zeros_like(tp), where=every > 0)
        return float(np.diff(tp, prepend=0) @ precision / tp[-1])

    return value


def _f1(targets: Ints, p: Floats) -> WeightedMetric:
    """F1 of the positive class; for more than two classes the mean over those that occur in rows or
    predictions (macro)."""
    said, n_classes = predicted(p), p.shape[1]

    def value(weights: Floats) -> float:
        hit = np.bincount(targets, weights * (said == targets), n_classes)
        size = np.bincount(targets, weights, n_classes) + np.bincount(said, weights, n_classes)
        if n_classes == 2:
            return float(2 * hit[1] / size[1]) if size[1] else 0.0
        defined = size > 0
        return float((2 * hit[defined] / size[defined]).mean())

    return value


def _balanced_accuracy(targets: Ints, p: Floats) -> WeightedMetric:
    """Mean recall of the classes that occur."""
    hits = (predicted(p) == targets).astype(np.float64)

    def value(weights: Floats) -> float:
        size = np.bincount(targets, weights)
        right = np.bincount(targets, weights * hits, len(size))
        return float((right[size > 0] / size[size > 0]).mean())

    return value


def _brier(targets: Ints, p: Floats) -> WeightedMetric:
    """Mean squared distance of probability and truth: of the positive class, or summed over more than two."""
    if p.shape[1] == 2:
        return mean_of((p[:, 1] - targets) ** 2)
    return mean_of(((p - np.eye(p.shape[1])[targets]) ** 2).sum(axis=1))


def _quadratic_kappa(targets: Ints, p: Floats) -> WeightedMetric:
    """Cohen's kappa with quadratic weights (Cohen 1968): 1 is agreement, 0 what the two marginals give by
    chance. Undefined where one and the same class is all that was seen and said."""
    said, n = median_class(p), p.shape[1]
    cost = (np.arange(n)[:, None] - np.arange(n)[None]).astype(np.float64) ** 2
    cells = targets * n + said

    def value(weights: Floats) -> float:
        seen = np.bincount(cells, weights, n * n).reshape(n, n)
        by_chance = np.outer(seen.sum(1), seen.sum(0)) / seen.sum()
        expected = float((cost * by_chance).sum())
        return 1 - float((cost * seen).sum()) / expected if expected > 0 else float("nan")

    return value


def _rank_error(targets: Ints, p: Floats) -> WeightedMetric:
    """Mean distance of said and true class, in ranks."""
    return mean_of(np.abs(median_class(p) - targets).astype(np.float64))


def confidence_pairs(targets: Ints, p: Floats, decide: Callable[[Floats], Ints]) -> tuple[Floats, Floats]:
    """Confidence [n], the said class's probability, and whether it was right."""
    said = decide(p)
    return p[np.arange(len(p)), said], (said == targets).astype(np.float64)


def bins_of(confidence: Floats) -> Ints:
    """The number of each confidence's bin, of 15 equal ones."""
    return np.minimum((confidence * BINS).astype(np.int64), BINS - 1)


def calibration_error(confidence: Floats, hit: Floats, per_row: int = 1) -> WeightedMetric:
    """Expected calibration error: |confidence - accuracy| over 15 equal bins of the confidence, weighted by
    rows (Guo et al. 2017, arXiv 1706.04599). ``per_row`` pairs after each other belong to one row."""
    gap, bins = confidence - hit, bins_of(confidence)

    def value(weights: Floats) -> float:
        w = np.repeat(weights, per_row) if per_row > 1 else weights
        return float(np.abs(np.bincount(bins, w * gap, BINS)).sum() / w.sum())

    return value


def _ece(decide: Callable[[Floats], Ints]) -> Prepare:
    return lambda targets, p: calibration_error(*confidence_pairs(targets, p, decide))


BINARY: dict[str, Prepare] = {
    "accuracy": _accuracy(predicted),
    "auroc": _auroc,
    "ap": _ap,
    "f1": _f1,
    "brier": _brier,
    "ece": _ece(predicted),
}
MULTICLASS: dict[str, Prepare] = {
    "accuracy": _accuracy(predicted),
    "balanced_accuracy": _balanced_accuracy,
    "macro_f1": _f1,
    "brier": _brier,
    "ece": _ece(predicted),
}
ORDINAL: dict[str, Prepare] = {
    "qwk": _quadratic_kappa,
    "mae_ranks": _rank_error,
    "accuracy": _accuracy(median_class),
    "ece": _ece(median_class),
}
