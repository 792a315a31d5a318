"""Fusion on tokens: one transformer over the tokens of all modalities."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import HeadConfig
from .attention import SelfBlock, TokenHead
from .head import Features, Present

__all__ = ["Merged"]


class Merged(TokenHead):
    """X = [cls; P_v V + e_v; P_t T + e_t; ..]; per layer X += SA(X), X += FFN(X); y = W LN(X_cls): merged
    attention (FLAVA's multimodal encoder, Singh et al. 2022, arXiv 2112.04482; METER, Dou et al. 2022,
    arXiv 2111.02387).

    e_k is the bias of P_k. Padding is no key; a missing modality is one learned token.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths, config)
        self.cls = nn.Parameter(0.02 * torch.randn(self.width))
        self.blocks = nn.ModuleList(
            [SelfBlock(self.width, self.heads, self.dropout) for _ in range(self.layers)]
        )
        self.norm = nn.LayerNorm(self.width)
        self.classify = nn.Linear(self.width, outputs)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        parts = [self.tokens(features, present, k) for k in self.modalities]
        rows = parts[0][0].shape[0]  # not len(): torch.export would fix it
        x = torch.cat([self.cls.expand(rows, 1, -1), *(x for x, _ in parts)], dim=1)
        mask = torch.cat([parts[0][1].new_ones(rows, 1), *(mask for _, mask in parts)], dim=1)
        for i, block in enumerate(self.blocks):
            x = block(x, mask, read=1 if i == self.layers - 1 else None)
        return self.classify(self.norm(x[:, 0]))
