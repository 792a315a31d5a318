"""Losses per row, and the weights that rows get by their class or by a column of the table."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...configs.errors import UserError

__all__ = ["ClassWeight", "loss_weights", "losses_of"]

ClassWeight = Literal["none", "balanced"] | tuple[float, ...]


def losses_of(kind: str, logits: Tensor, targets: Tensor, smoothing: float, gamma: float) -> Tensor:
    """Losses [b], or [b, L] for multilabel tasks, of logits [b, C].

    binary, multilabel: binary cross entropy; multiclass: cross entropy; both times (1 - p_t)^gamma, p_t the
    probability of the truth (focal loss, Lin et al. 2017, arXiv 1708.02002). regression: Huber's, with its
    bend at 1, of targets float [b] in the unit of the logits. ordinal: the sum of binary cross entropies of
    "greater than class k" (CORAL, Cao et al. 2020, arXiv 1901.07884).
    """
    if kind == "regression":
        return F.huber_loss(logits[:, 0], targets.to(logits.dtype), reduction="none")
    if kind == "multiclass":
        losses = F.cross_entropy(logits, targets, label_smoothing=smoothing, reduction="none")
        if not gamma:
            return losses
        truth = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
        return losses * (1 - truth.exp()).clamp_min(0) ** gamma
    if kind == "ordinal":
        steps = torch.arange(logits.shape[1], device=logits.device)
        greater = (targets[:, None] > steps).to(logits.dtype) * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, greater, reduction="none").sum(dim=1)
    logits = logits if kind == "multilabel" else logits[:, 0]
    truth = targets.to(logits.dtype)
    wanted = truth * (1 - smoothing) + smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return losses * torch.sigmoid((1 - 2 * truth) * logits) ** gamma if gamma else losses


def loss_weights(
    kind: str,
    class_weight: ClassWeight,
    targets: Tensor,
    n_classes: int,
    rows: Sequence[float] | Tensor | None,
) -> Tensor | None:
    """Weights float32 [n] (multilabel: [n, L] or [n, 1]) of training rows, or None if all are equal.

    They have mean 1, so that batches stay unbiased and the learning rate keeps its meaning. ``balanced``
    gives all classes the same sum, and positives and negatives of a label the same; numbers weigh the rows of
    a class, for multilabel tasks the positives of a label. ``rows``: the table's weights [n].
    """
    weights: NDArray[Any] | None = None
    y = targets.cpu().numpy()
    if class_weight != "none" and kind == "multilabel":
        share = y.mean(axis=0)
        ends = np.stack([1 - share, share])
        factors = (
            np.divide(0.5, ends, out=np.zeros_like(ends), where=ends > 0)
            if class_weight == "balanced"
            else np.stack([np.ones(n_classes), np.array(class_weight)])
        )
        weights = np.where(y == 1, factors[1], factors[0])
    elif class_weight != "none":
        counts = np.bincount(y, minlength=n_classes)
        factors = 1 / np.maximum(counts, 1) if class_weight == "balanced" else np.array(class_weight)
        weights = factors[y]
    if rows is not None:
        own = np.asarray(rows, dtype=np.float64)
        own = own[:, None] if kind == "multilabel" else own
        weights = own if weights is None else weights * own
    if weights is None:
        return None
    if not weights.any():
        raise UserError("the weights of all training rows are 0; mend data.weight or task.class_weight")
    return torch.from_numpy((weights / weights.mean()).astype(np.float32))
