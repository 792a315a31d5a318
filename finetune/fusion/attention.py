"""What heads on tokens share: masked attention, a pre-norm block, and tokens with their masks."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import HeadConfig
from .head import Features, Head, Present, Standard

__all__ = ["Attention", "SelfBlock", "TokenHead", "feed_forward"]


class Attention(nn.Module):
    """Multi-head attention of queries [b, L, H] over keys [b, P, H], with a mask bool [b, P] of real keys."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
        """[b, L, H]; keys that the mask leaves out have no influence."""
        q = rearrange(self.query(x), "b l (h d) -> b h l d", h=self.heads)
        k, v = rearrange(self.key_value(keys), "b p (two h d) -> two b h p d", two=2, h=self.heads)
        dropout = self.dropout if self.training else 0.0
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :], dropout_p=dropout)
        return self.out(rearrange(out, "b h l d -> b l (h d)"))


def feed_forward(width: int, hidden: int | None = None, act: type[nn.Module] = nn.GELU) -> nn.Sequential:
    """The usual MLP of a transformer block, by default four times as wide inside."""
    hidden = hidden or 4 * width
    return nn.Sequential(nn.Linear(width, hidden), act(), nn.Linear(hidden, width))


class SelfBlock(nn.Module):
    """x += self-attention(x); x += FFN(x), each after a layer norm."""

    def __init__(
        self,
        width: int,
        heads: int,
        dropout: float,
        *,
        hidden: int | None = None,
        act: type[nn.Module] = nn.GELU,
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.itself = Attention(width, heads, dropout)
        self.feed = feed_forward(width, hidden, act)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, read: int | None = None) -> Tensor:
        """[b, L, H] of x [b, L, H] with a mask bool [b, L] of real tokens; of the first ``read`` tokens
        alone where no others are read (the last block of a head), which costs their keys and values only."""
        y = self.norms[0](x)
        x = x[:, :read] + self.drop(self.itself(y[:, :read], y, mask))
        return x + self.drop(self.feed(self.norms[1](x)))


class TokenHead(Head):
    """Base of the heads that read tokens T_k [b, L, W], standardised and mapped to the head's width H.

    Of a modality without ``<k>_tokens`` the embedding is its only token.
    """

    reads_tokens: ClassVar[bool] = True

    def __init__(self, widths: Mapping[str, int], config: HeadConfig) -> None:
        """``widths``: token width per modality."""
        assert config.width
        assert config.heads
        assert config.layers
        super().__init__(widths)
        self.width, self.heads, self.layers = config.width, config.heads, config.layers
        self.dropout = config.dropout or 0.0
        self.project = nn.ModuleDict({k: nn.Linear(w, config.width) for k, w in widths.items()})

    @staticmethod
    def read(features: Features, k: str) -> tuple[Tensor, Tensor]:
        """Tokens [b, L, W] as they come and bool [b, L], True for real ones; all of them where the tower has
        no padding."""
        tokens = features.get(f"{k}_tokens")
        tokens = features[k][:, None] if tokens is None else tokens
        mask = features.get(f"{k}_mask")
        return tokens, torch.ones_like(tokens[..., 0], dtype=torch.bool) if mask is None else mask

    def fit_standard(self, features: Features, present: Present) -> None:
        """Take means and scales from the real tokens of the training rows."""
        for k in self.modalities:
            tokens, mask = self.read(features, k)
            standard = self.standard[k]
            assert isinstance(standard, Standard)
            standard.fit(tokens[mask & present[k][:, None]].to(standard.mean.dtype))

    def tokens(self, features: Features, present: Present, k: str) -> tuple[Tensor, Tensor]:
        """Projected tokens [b, L, H] and their mask; a missing modality is its null vector in the first
        place, or where the head has none, no token at all."""
        tokens, mask = self.read(features, k)
        mask = mask & present[k][:, None]
        standard = self.standard[k]
        assert isinstance(standard, Standard)
        x = standard(tokens.to(standard.mean.dtype))
        null = self.null[k] if k in self.null else x.new_zeros(())
        x = torch.where(mask[..., None], x, null)  # also: nothing masked may hold NaN
        if k in self.null:
            mask = torch.cat([mask[:, :1] | ~present[k][:, None], mask[:, 1:]], dim=1)
        return self.project[k](x), mask
