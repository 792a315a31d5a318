"""What all fusion heads share: standardised embeddings, null vectors, presence.

Notation: b rows, M modalities, D the embedding width, H the head's width, C outputs (1 for binary tasks);
z_k [b, D] the embedding of modality k, standardised (see ``Standard``); m_k [b] its presence; n_k [D] a
learned null vector. Where a modality is missing, z~_k = n_k, so whatever stands in that slot changes nothing.

Every head is a module ``(features, present) -> logits [b, C]``. ``features`` maps a modality to its
L2-normalised embeddings [b, D]; for heads that read tokens also ``image_tokens`` [b, P, W], ``text_tokens``
[b, L, W'] and ``text_mask`` bool [b, L]. ``present`` maps a modality to bool [b]. Modalities are whatever
names the widths have, two or more: a third one is a key, not a class.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Features", "Head", "Present", "Standard", "alike", "masked_softmax", "mlp"]

Features = Mapping[str, Tensor]
Present = Mapping[str, Tensor]


class Standard(nn.Module):
    """x -> (x - mean) / s with the mean vector and one scale s of the training rows.

    Contrastive embeddings of the two modalities lie in two narrow cones (Liang et al. 2022, arXiv
    2203.02053); without their means the products of elements carry signs. One scale for all elements keeps
    angles, so an inner product stays one.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take mean and scale from rows [n, width]; without rows nothing changes."""
        if len(x):
            self.mean.copy_(x.mean(0))
            self.scale.copy_((x - self.mean).square().mean().sqrt().clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised x, the same shape."""
        return (x - self.mean) / self.scale


class Head(nn.Module):
    """Base of the heads: standardises embeddings and puts null vectors where a modality is missing."""

    reads_tokens: ClassVar[bool] = False
    reads_inputs: ClassVar[bool] = False

    def __init__(self, widths: Mapping[str, int]) -> None:
        """``widths``: the modalities that the head reads, with their embedding widths."""
        super().__init__()
        self.modalities = tuple(widths)
        self.standard = nn.ModuleDict({k: Standard(width) for k, width in widths.items()})
        self.null = nn.ParameterDict({k: nn.Parameter(torch.zeros(width)) for k, width in widths.items()})

    def fit_standard(self, features: Features, present: Present) -> None:
        """Take means and scales from the training rows."""
        for k in self.modalities:
            standard = self.standard[k]
            assert isinstance(standard, Standard)
            standard.fit(features[k][present[k]])

    def filled(self, features: Features, present: Present) -> list[Tensor]:
        """z~_k [b, D] per modality; zeros for a missing one where the head has no null vectors."""
        out: list[Tensor] = []
        for k in self.modalities:
            z = self.standard[k](features[k])
            null = self.null[k] if k in self.null else z.new_zeros(())
            out.append(torch.where(present[k][:, None], z, null))
        return out

    def masks(self, present: Present) -> Tensor:
        """m, bool [b, M]."""
        return torch.stack([present[k] for k in self.modalities], dim=1)

    def parts(self, features: Features, present: Present) -> list[tuple[Tensor, Tensor]]:
        """Logits [b, C] that have a loss of their own, each with the rows bool [b] that count for it."""
        return [(self(features, present), torch.ones_like(present[self.modalities[0]]))]


def mlp(inputs: int, width: int, outputs: int, dropout: float) -> nn.Sequential:
    """One hidden layer, or for width 0 a linear map."""
    if width == 0:
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, outputs))
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, outputs))


def alike(widths: Mapping[str, int]) -> tuple[int, nn.ModuleDict]:
    """The widest modality's width, and linear maps to it for those that are narrower."""
    widest = max(widths.values())
    return widest, nn.ModuleDict({k: nn.Linear(w, widest) for k, w in widths.items() if w != widest})


def masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over dim 1 of scores [b, M, ..] where mask is True, 0 elsewhere; without a True all 0."""
    least = torch.finfo(scores.dtype).min
    return torch.where(mask, scores, least).softmax(dim=1) * mask
