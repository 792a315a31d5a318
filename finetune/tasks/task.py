"""Tasks: what a head puts out, its loss, and the metrics of its answers.

Metrics are computed on accumulated float64 answers, never averaged over batches; see ``metrics``.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...configs.errors import UserError
from ..config.head import Link
from ..tables.links import GALLERY
from .losses import ClassWeight, loss_weights, losses_of
from .metrics import (
    BINARY,
    BINS,
    MULTICLASS,
    ORDINAL,
    Floats,
    Ints,
    Prepare,
    WeightedMetric,
    bins_of,
    confidence_pairs,
    higher_is_better,
    median_class,
    predicted,
)
from .metrics_more import MULTILABEL, REGRESSION
from .retrieval_metrics import RETRIEVAL
from .vectors import averaged, cosines, unit, vectors_loss
from .vqa import VQA

__all__ = [
    "BINS",
    "METRICS",
    "Floats",
    "Ints",
    "Task",
    "WeightedMetric",
    "calibrate",
    "higher_is_better",
    "log_loss",
    "metric_value",
    "predicted",
]

TaskType = Literal["binary", "multiclass", "multilabel", "regression", "ordinal", "retrieval", "vqa"]
METRICS_OF: dict[str, dict[str, Prepare]] = {
    "binary": BINARY,
    "multiclass": MULTICLASS,
    "multilabel": MULTILABEL,
    "regression": REGRESSION,
    "ordinal": ORDINAL,
    "retrieval": RETRIEVAL,
    "vqa": VQA,
}
METRICS: dict[str, Prepare] = BINARY | MULTICLASS
"""Metrics of binary and multiclass tasks by name; of any task: ``Task.prepare``."""
LINKS: dict[str, Link] = {
    "binary": "sigmoid",
    "multiclass": "softmax",
    "multilabel": "sigmoid",
    "regression": "identity",
    "ordinal": "cumulative",
    "retrieval": "vectors",
    "vqa": "sigmoid",
}


@dataclass(frozen=True)
class Task:
    """What is predicted. ``classes``: their names in the order of the probabilities (binary: negative,
    positive; ordinal: from low to high; regression: none).

    Targets are class numbers int64 [n], for multilabel 0 and 1 int64 [n, L], for regression float64 [n], for
    retrieval the columns int64 [n, 4] of ``links``, for vqa scores float64 [n, C]. Answers are probabilities;
    of retrieval, whose logits and answers are vectors, see ``vectors``. A matching task is a binary one that
    makes its negatives.
    """

    type: TaskType
    classes: tuple[str, ...]
    class_weight: ClassWeight = "none"
    focal_gamma: float = 0.0
    center: float = 0.0
    """Regression: mean of the training targets, once the task is fitted to them."""
    scale: float = 1.0
    """Regression: standard deviation of the training targets."""
    negatives: Literal["random", "hard"] | None = None
    """Matching: how training makes pairs that do not match; None for tasks whose table has them."""

    @property
    def outputs(self) -> int:
        """Logits per row: 1 for binary and regression tasks, one per threshold for ordinal ones; 0 where
        heads give vectors."""
        if self.type in ("binary", "regression"):
            return 1
        return len(self.classes) - (self.type == "ordinal")

    @property
    def link(self) -> Link:
        """How logits become answers; heads that mix answers need it."""
        return LINKS[self.type]

    @property
    def primary(self) -> str:
        """What early stopping and the choice of a head look at by default."""
        return "auroc" if self.type == "binary" else self.metrics[0]

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the reported metrics, in order; gains are told of the first."""
        return tuple(METRICS_OF[self.type])

    def prepare(self, name: str) -> Prepare:
        """A metric of this task by name."""
        return METRICS_OF[self.type][name]

    def value(self, name: str, targets: Any, p: Floats) -> float:
        """A metric of all rows; NaN where it is undefined."""
        return self.prepare(name)(targets, p)(np.ones(len(targets)))

    def fitted(self, targets: Tensor) -> "Task":
        """The task with what it takes from training targets: for regression their mean and scale."""
        if self.type != "regression":
            return self
        y = targets.double()
        return replace(self, center=float(y.mean()), scale=float(y.std(correction=0).clamp_min(1e-12)))

    def weights(self, targets: Tensor, rows: Sequence[float] | Tensor | None = None) -> Tensor | None:
        """Loss weights of training rows, see ``losses.loss_weights``."""
        return loss_weights(self._loss, self.class_weight, targets, len(self.classes), rows)

    def loss(
        self, logits: Tensor, targets: Tensor, smoothing: float = 0.0, weights: Tensor | None = None
    ) -> Tensor:
        """Mean training loss of logits [b, C], each row times its weight, see ``losses``."""
        losses = losses_of(self._loss, logits, self._standard(targets), smoothing, self.focal_gamma)
        return losses.mean() if weights is None else (losses * weights.to(losses)).mean()

    def plain_loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean loss without weights, smoothing and focus: a proper score, which calibration needs."""
        return losses_of(self._loss, logits, self._standard(targets), 0.0, 0.0).mean()

    @property
    def _loss(self) -> str:
        """The kind of loss: that of soft answers is a multilabel one whose truths lie between 0 and 1."""
        return "multilabel" if self.type == "vqa" else self.type

    def _standard(self, targets: Tensor) -> Tensor:
        return (targets - self.center) / self.scale if self.type == "regression" else targets

    def probabilities(self, logits: Tensor) -> Floats:
        """float64 [n, C], C the number of classes also for binary and ordinal tasks; rows sum to 1, or are
        one probability per label. Regression: the answers [n, 1] in the target's unit."""
        return self.answers(logits.detach().double().cpu()).numpy()

    def answers(self, logits: Tensor) -> Tensor:
        """``probabilities`` of logits, in their dtype and with their gradient."""
        if self.type == "regression":
            return logits * self.scale + self.center
        if self.type == "retrieval":
            return unit(logits)
        if self.type == "multiclass":
            return logits.softmax(dim=1)
        if self.type in ("multilabel", "vqa"):
            return logits.sigmoid()
        greater = logits.sigmoid()
        if self.type == "binary":
            return torch.cat([1 - greater, greater], dim=1)
        one, zero = torch.ones_like(greater[:, :1]), torch.zeros_like(greater[:, :1])
        above = torch.cat([one, greater, zero], dim=1)
        return (above[:, :-1] - above[:, 1:]).clamp_min(0)

    def averaged(self, parts: Sequence[Floats]) -> Floats:
        """Answers of several seeds as one."""
        return averaged(parts) if self.type == "retrieval" else np.mean(parts, axis=0)

    def of_fold(self, targets: Any, number: int) -> Any:
        """Targets of a fold's test rows among those of other folds: retrieval searches in each by itself."""
        if self.type != "retrieval":
            return targets
        return np.concatenate([targets[:, :GALLERY], np.full((len(targets), 1), number)], axis=1)

    def predicted(self, p: Floats) -> Any:
        """Class numbers int64 [n]; multilabel: bool [n, L]; regression: the answers float64 [n]; retrieval:
        the cosine of each row's picture and text, NaN where one is missing."""
        if self.type == "retrieval":
            return cosines(p)
        if self.type == "regression":
            return p[:, 0]
        if self.type == "multilabel":
            return p >= 0.5
        if self.type == "vqa":
            return p.argmax(axis=1)
        return median_class(p) if self.type == "ordinal" else predicted(p)

    def named(self, p: Floats) -> list[Any]:
        """What is predicted per row, in the table's words: a class, a list of labels, or a number."""
        said = self.predicted(p)
        if self.type in ("regression", "retrieval"):
            return [float(value) for value in said]
        if self.type == "multilabel":
            return [[self.classes[c] for c in np.flatnonzero(row)] for row in said]
        return [self.classes[c] for c in said]

    def log_loss(self, targets: Any, p: Floats) -> float:
        """Mean negative log likelihood, for multilabel also over labels; regression: mean squared error;
        retrieval: InfoNCE at a fixed temperature."""
        if self.type == "regression":
            return float(((p[:, 0] - targets) ** 2).mean())
        if self.type == "retrieval":
            return vectors_loss(targets, p)
        if self.type == "vqa":
            sure = np.clip(p, 1e-12, 1 - 1e-12)
            return float(-(targets * np.log(sure) + (1 - targets) * np.log1p(-sure)).mean())
        if self.type == "multilabel":
            return float(-np.log(np.clip(np.where(targets == 1, p, 1 - p), 1e-12, 1)).mean())
        return log_loss(targets, p)

    def reliability(self, targets: Any, p: Floats) -> list[dict[str, float]]:
        """Per bin of the calibration error that holds something: mean ``confidence``, ``accuracy``, and the
        share of rows (multilabel: of rows and labels). Empty for regression and retrieval."""
        if self.type in ("regression", "retrieval"):
            return []
        if self.type == "multilabel":
            confidence, hit = p.ravel(), targets.ravel().astype(np.float64)
        elif self.type == "vqa":
            said = np.arange(len(p)), p.argmax(axis=1)
            confidence, hit = p[said], targets[said]
        else:
            confidence, hit = confidence_pairs(targets, p, self.predicted)
        bins = bins_of(confidence)
        return [
            {
                "confidence": float(confidence[inside].mean()),
                "accuracy": float(hit[inside].mean()),
                "share": float(inside.mean()),
            }
            for inside in (bins == b for b in np.unique(bins))
        ]

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


def metric_value(name: str, targets: Ints, p: Floats) -> float:
    """A metric of all rows: class numbers int64 [n] and probabilities float64 [n, C]."""
    return METRICS[name](targets, p)(np.ones(len(targets)))


def log_loss(targets: Ints, p: Floats) -> float:
    """Mean negative log likelihood, probabilities kept above 1e-12."""
    return float(-np.log(np.clip(p[np.arange(len(p)), targets], 1e-12, 1)).mean())


def calibrate(task: Task, logits: Tensor, targets: Tensor, method: str) -> tuple[float, float]:
    """Scale a and shift c of ``a * logits + c`` that minimise the loss on these rows (temperature, Guo et al.
    2017; with a shift, Platt 1999). ``none`` gives 1 and 0; a is kept positive, so no ranking changes.

    Regression: the scale and mean of the training targets, which turn logits into the target's unit.
    """
    if task.type == "regression":
        return task.scale, task.center
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
        loss = task.plain_loss(log_scale.exp() * logits + shift, targets) + 1e-4 * log_scale.square()
        loss.backward()
        return loss

    optimizer.step(closure)
    return float(log_scale.detach().exp()), float(shift.detach())
