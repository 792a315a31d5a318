"""Fusion on tokens: text tokens read the other modalities' tokens by masked cross attention."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import HeadConfig
from .attention import Attention, TokenHead, feed_forward
from .head import Features, Present

__all__ = ["Cross"]


class Block(nn.Module):
    """x += self-attention(x); x += cross-attention(x, v); x += FFN(x), each after a layer norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.itself = Attention(width, heads, dropout)
        self.other = Attention(width, heads, dropout)
        self.feed = feed_forward(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, v: Tensor, v_mask: Tensor) -> Tensor:
        """[b, L, H]."""
        y = self.norms[0](x)
        x = x + self.drop(self.itself(y, y, mask))
        x = x + self.drop(self.other(self.norms[1](x), v, v_mask))
        return x + self.drop(self.feed(self.norms[2](x)))


class Cross(TokenHead):
    """X = P_t T; per layer X += SA(X), X += CA(X, P_v V), X += FFN(X); y = W mean(LN X) over real tokens (the
    multimodal encoder of ALBEF, Li et al. 2021, arXiv 2107.07651).

    T [b, L, W'] are the text tower's tokens and V [b, P, W] the image tower's, each standardised; further
    modalities stand beside V. Without a text the first modality asks. A missing text is one learned query,
    a missing image one learned key.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths, config)
        self.asks = "text" if "text" in widths else self.modalities[0]
        self.blocks = nn.ModuleList([Block(self.width, self.heads, self.dropout) for _ in range(self.layers)])
        self.norm = nn.LayerNorm(self.width)
        self.classify = nn.Linear(self.width, outputs)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        others = [self.tokens(features, present, k) for k in self.modalities if k != self.asks]
        keys, key_mask = (torch.cat(part, dim=1) for part in zip(*others, strict=True))
        x, mask = self.tokens(features, present, self.asks)
        for block in self.blocks:
            x = block(x, mask, keys, key_mask)
        weight = mask[..., None].to(x.dtype)
        return self.classify((self.norm(x) * weight).sum(1) / weight.sum(1))
