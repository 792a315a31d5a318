"""Tasks: what a head puts out, its loss, and the metrics of its probabilities.

Metrics are computed on accumulated float64 probabilities, never averaged over batches. Each one is prepared
once for fixed rows and then evaluated for row weights, which is what makes a bootstrap of thousands of
resamples cheap; with equal weights they are scikit-learn's, as the tests show.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ..configs.errors import UserError

__all__ = ["BINS", "METRICS", "Task", "WeightedMetric", "metric_value"]

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
WeightedMetric = Callable[[Floats], float]
"""Row weights float64 [n] to the metric's value; NaN where it is undefined."""
Prepare = Callable[[Ints, Floats], WeightedMetric]
BINS = 15


@dataclass(frozen=True)
class Task:
    """A classification task. ``classes``: their names in the order of the probabilities; binary: negative,
    positive."""

    type: Literal["binary", "multiclass"]
    classes: tuple[str, ...]

    @property
    def outputs(self) -> int:
        """Logits per row: 1 for binary tasks."""
        return 1 if self.type == "binary" else len(self.classes)

    @property
    def primary(self) -> str:
        """What early stopping and the choice of a head look at by default."""
        return "auroc" if self.type == "binary" else "accuracy"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the reported metrics, in order."""
        return METRIC_NAMES[self.type]

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
        """Mean loss of logits [b, C] and class numbers int64 [b]: binary cross entropy or cross entropy."""
        if self.type == "multiclass":
            return F.cross_entropy(logits, targets, label_smoothing=smoothing)
        wanted = targets.to(logits.dtype) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits[:, 0], wanted)

    def probabilities(self, logits: Tensor) -> Floats:
        """float64 [n, C], C the number of classes also for binary tasks; rows sum to 1."""
        logits = logits.detach().double().cpu()
        if self.type == "multiclass":
            return logits.softmax(dim=1).numpy()
        positive = logits[:, 0].sigmoid().numpy()
        return np.stack([1 - positive, positive], axis=1)

    def check_metric(self, name: str) -> str:
        """The metric that a config's ``early_stopping.metric`` means; UserError if the task has none."""
        if name == "auto":
            return self.primary
        if name not in ("loss", *self.metrics):
            raise UserError(
                f"early_stopping.metric: '{name}' is no metric of {self.type} tasks; use auto, loss, "
                f"{', '.join(self.metrics)}"
            )
        return name


def higher_is_better(name: str) -> bool:
    """Whether more of a metric is better."""
    return name not in ("loss", "brier", "ece")


def _mean(values: NDArray[Any]) -> WeightedMetric:
    return lambda weights: float(weights @ values / weights.sum())


def _accuracy(targets: Ints, p: Floats) -> WeightedMetric:
    """Share of rows whose most probable class is theirs (binary: the positive one from 0.5 on)."""
    return _mean((predicted(p) == targets).astype(np.float64))


def predicted(p: Floats) -> Ints:
    """Class numbers int64 [n] of probabilities [n, C]; of equals the first, of two classes the second."""
    return (p[:, 1] >= 0.5).astype(np.int64) if p.shape[1] == 2 else p.argmax(axis=1)


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
        return _mean((p[:, 1] - targets) ** 2)
    return _mean(((p - np.eye(p.shape[1])[targets]) ** 2).sum(axis=1))


def _ece(targets: Ints, p: Floats) -> WeightedMetric:
    """Expected calibration error: |confidence - accuracy| over 15 equal bins of the confidence, weighted by
    rows (Guo et al. 2017, arXiv 1706.04599)."""
    said = predicted(p)
    confidence = p[np.arange(len(p)), said]
    gap = confidence - (said == targets)
    bins = np.minimum((confidence * BINS).astype(np.int64), BINS - 1)

    def value(weights: Floats) -> float:
        return float(np.abs(np.bincount(bins, weights * gap, BINS)).sum() / weights.sum())

    return value


METRICS: dict[str, Prepare] = {
    "accuracy": _accuracy,
    "auroc": _auroc,
    "ap": _ap,
    "f1": _f1,
    "macro_f1": _f1,
    "balanced_accuracy": _balanced_accuracy,
    "brier": _brier,
    "ece": _ece,
}
METRIC_NAMES: dict[str, tuple[str, ...]] = {
    "binary": ("accuracy", "auroc", "ap", "f1", "brier", "ece"),
    "multiclass": ("accuracy", "balanced_accuracy", "macro_f1", "brier", "ece"),
}


def metric_value(name: str, targets: Ints, p: Floats) -> float:
    """A metric of all rows: class numbers int64 [n] and probabilities float64 [n, C]."""
    return METRICS[name](targets, p)(np.ones(len(targets)))


def log_loss(targets: Ints, p: Floats) -> float:
    """Mean negative log likelihood, probabilities kept above 1e-12."""
    return float(-np.log(np.clip(p[np.arange(len(p)), targets], 1e-12, 1)).mean())


def calibrate(task: Task, logits: Tensor, targets: Tensor, method: str) -> tuple[float, float]:
    """Scale a and shift c of ``a * logits + c`` that minimise the loss on these rows (temperature, Guo et al.
    2017; with a shift, Platt 1999). ``none`` gives 1 and 0; a is kept positive, so no ranking changes."""
    if method == "none":
        return 1.0, 0.0
    logits = logits.detach().double()
    log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=method == "platt")
    free = [t for t in (log_scale, shift) if t.requires_grad]
    optimizer = torch.optim.LBFGS(free, max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        # the weak pull keeps the scale finite where the rows are told apart without error
        loss = task.loss(log_scale.exp() * logits + shift, targets) + 1e-4 * log_scale.square()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_scale.detach().exp()), float(shift.detach())
