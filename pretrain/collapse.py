"""Signs that a dual encoder learns nothing, though its loss may look well: features that are all alike,
held-out retrieval at the level of guessing."""

import math
from collections.abc import Mapping

from torch import Tensor

__all__ = ["ALIKE", "at_chance", "feature_std"]

ALIKE = 0.01
"""Of the standard deviation of features spread evenly over the sphere: below it, any two of a batch have a
cosine of more than 0.9999."""


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
