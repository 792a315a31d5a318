"""Training for retrieval: pictures and texts are moved so that each finds the other.

The loss is CLIP's symmetric InfoNCE of a batch's pairs (Radford et al. 2021, arXiv 2103.00020); rows that
belong together, as the table tells, are positives and never negatives of each other. What training starts
from, zero-shot, counts as an epoch: where nothing beats it on the inner rows it stays.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..encoders.live import Part
from ..tables.links import KEY, PICTURE, TEXT, components
from ..tasks.vectors import pair_loss
from .training import Keeper, Training

__all__ = ["PairTraining"]


class PairTraining(Training):
    """The loop of ``Training`` with the loss of pairs. What it starts from counts as an epoch, so nothing
    that does worse on the inner rows is kept."""

    def epochs(
        self,
        train: Part,
        inner: Part,
        groups: list[dict[str, Any]],
        lr: float,
        epochs: int,
        batch_size: int,
        keeper: Keeper | None = None,
    ) -> None:
        """As ``Training.epochs``; without anything to train the weights as they are are the best."""
        if not self.best:
            self.begin_with_best(inner)
        if any(group["params"] for group in groups):
            links = components(*(train.targets[:, c].cpu().numpy() for c in (PICTURE, TEXT, KEY)))
            linked = replace(train, targets=torch.from_numpy(links))
            super().epochs(linked, inner, groups, lr, epochs, batch_size, keeper)

    def loss(
        self,
        features: dict[str, Tensor],
        present: dict[str, Tensor],
        targets: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """InfoNCE of a batch; ``targets`` are the numbers of what belongs together."""
        vectors = self.head(features, present)
        valid = present["image"] & present["text"]
        return pair_loss(vectors, valid, targets, weights, self.adapt.label_smoothing)
