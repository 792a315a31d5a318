"""Signs that a dual encoder is of no use: weights or features that are not finite, features that are all
alike, held-out retrieval at the level of guessing."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from . import distributed
from .encode import evaluating
from .model import ContrastiveModel, image_size

__all__ = ["ALIKE", "at_chance", "feature_std", "works"]

ALIKE = 0.01
"""Of the standard deviation of features spread evenly over the sphere: below it, any two of a batch have a
cosine of more than 0.9999."""


@torch.no_grad()
def works(root: ContrastiveModel) -> bool:
    """Whether weights are finite and give finite features, tried on a white image, a noisy one and captions
    of a token; weights that are finite may be too large for that. All processes call it and get the same."""
    largest = get_total_norm([distributed.local(p) for p in root.parameters()], torch.inf)
    side = image_size(root.clip)
    image = torch.full((2, 3, side, side), 255, dtype=torch.uint8)
    image[1].random_(0, 256, generator=torch.Generator().manual_seed(0))
    batch = {"image": image, "token_ids": torch.tensor([1, 2]).int(), "seq_lens": torch.tensor([1, 1]).int()}
    with evaluating(root):
        out = root(batch | {"image": image.to(largest.device)})
    features = torch.cat([out["image_features"], out["text_features"]])
    broken = ~(largest.isfinite() & features.isfinite().all())
    return not distributed.all_reduce_max(broken.int().cpu())  # sync point


def feature_std(features: Tensor) -> Tensor:
    """Mean over the dimensions of the standard deviation over the rows of L2-normalised features [b, D], a
    scalar on their device: 1 / sqrt(D) where they are spread evenly, 0 where they are all alike or b is 0
    (Chen and He, 2021, arXiv 2011.10566, section 4.1)."""
    return features.float().std(0, correction=0).mean() if len(features) else features.new_zeros(())


def at_chance(scores: Mapping[str, float], images: int) -> bool:
    """Whether no recall of ``quick_retrieval`` over so many images stands above guessing by more than three
    standard deviations of guessing itself."""
    names = [name for name in scores if f"{name}_chance" in scores]
    return bool(names) and not any(
        scores[name] > chance + 3 * math.sqrt(chance * (1 - chance) / images)
        for name in names
        if (chance := scores[f"{name}_chance"]) < 1
    )
