"""What heads of retrieval tasks put out: per row a vector of its picture and one of its text, [n, 2 W].

Vectors stand in the place of logits, sqrt(s) times unit vectors, s the inverse temperature: their inner
products are the logits of InfoNCE. As answers they have length 1, and inner products are cosines. A missing
modality is a vector of zeros.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ...pretrain import distributed
from ...pretrain.contrastive import contrastive_loss
from ..tables.links import KEY, MISSING, PICTURE, TEXT, components
from .metrics import Floats

__all__ = ["averaged", "cosines", "halves", "pair_loss", "unit", "vectors_loss"]

SCALE = 1 / 0.07
"""Inverse temperature of the loss of answers: CLIP's own at its start."""


def halves(vectors: Any) -> tuple[Any, Any]:
    """The vectors [n, W] of pictures and of texts in rows [n, 2 W]."""
    width = vectors.shape[1] // 2
    return vectors[:, :width], vectors[:, width:]


def unit(vectors: Tensor) -> Tensor:
    """Vectors [n, 2 W] of length 1; zeros stay."""
    return torch.cat([F.normalize(half, dim=1) for half in halves(vectors)], dim=1)


def averaged(parts: Sequence[Floats]) -> Floats:
    """Answers [n, 2 S W] of S answers [n, 2 W]: their cosine is the mean of the S cosines. The vectors
    themselves have no sensible mean, as models of different seeds need not share a space."""
    stacked = [np.concatenate(half, axis=1) for half in zip(*map(halves, parts), strict=True)]
    return np.concatenate(stacked, axis=1) / np.sqrt(len(parts))


def cosines(p: Floats) -> Floats:
    """Cosine float64 [n] of each row's own picture and text; NaN where one is missing."""
    image, text = halves(p)
    whole = image.any(axis=1) & text.any(axis=1)
    return np.where(whole, (image * text).sum(axis=1), np.nan)


def pair_loss(
    vectors: Tensor,
    valid: Tensor,
    links: Tensor,
    weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Symmetric InfoNCE of the valid rows of vectors [b, 2 W] whose inner products are logits; rows with
    equal ``links`` int64 [b] match each other (the target is uniform over them)."""
    image, text = halves(vectors)
    return contrastive_loss(
        image,
        text,
        torch.ones(()),
        valid=valid,
        caption_hash=links,
        weight=weights,
        duplicates="positives",
        label_smoothing=label_smoothing,
        group=distributed.alone(),  # this process has all rows
    )


def vectors_loss(targets: NDArray[np.int64], p: Floats) -> float:
    """InfoNCE at ``SCALE`` of answers to all rows that have both modalities, each against all others."""
    valid = (targets[:, PICTURE] != MISSING) & (targets[:, TEXT] != MISSING)
    links = components(*(targets[:, column] for column in (PICTURE, TEXT, KEY)))
    vectors = torch.from_numpy(p) * SCALE**0.5
    return float(pair_loss(vectors, torch.from_numpy(valid), torch.from_numpy(links)))
