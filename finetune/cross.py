"""Fusion on tokens: text tokens read image tokens by masked cross attention."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .config import HeadConfig
from .fusion import Features, Head, Present

__all__ = ["Cross"]


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


class Block(nn.Module):
    """x += self-attention(x); x += cross-attention(x, v); x += FFN(x), each after a layer norm."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(3)])
        self.itself = Attention(width, heads, dropout)
        self.other = Attention(width, heads, dropout)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, v: Tensor, v_mask: Tensor) -> Tensor:
        """[b, L, H]."""
        y = self.norms[0](x)
        x = x + self.drop(self.itself(y, y, mask))
        x = x + self.drop(self.other(self.norms[1](x), v, v_mask))
        return x + self.drop(self.feed(self.norms[2](x)))


class Cross(Head):
    """X = P_t T; per layer X += SA(X), X += CA(X, P_v V), X += FFN(X); y = W mean(LN X) over real tokens (the
    multimodal encoder of ALBEF, Li et al. 2021, arXiv 2107.07651).

    T [b, L, W'] are the text tower's tokens and V [b, P, W] the image tower's, each standardised. A missing
    text is one learned query, a missing image one learned key.
    """

    reads_tokens: ClassVar[bool] = True

    def __init__(self, token_widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        assert config.width
        assert config.heads
        assert config.layers
        super().__init__(token_widths)
        dropout = config.dropout or 0.0
        self.project = nn.ModuleDict({k: nn.Linear(w, config.width) for k, w in token_widths.items()})
        self.blocks = nn.ModuleList(
            [Block(config.width, config.heads, dropout) for _ in range(config.layers)]
        )
        self.norm = nn.LayerNorm(config.width)
        self.classify = nn.Linear(config.width, outputs)

    @staticmethod
    def token_mask(features: Features, k: str) -> Tensor:
        """bool [b, L], True for real tokens; all of them where the tower has no padding."""
        tokens = features[f"{k}_tokens"]
        mask = features.get(f"{k}_mask")
        return (
            mask if mask is not None else torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        )

    def fit_standard(self, features: Features, present: Present) -> None:
        """Take means and scales from the real tokens of the training rows."""
        for k in self.modalities:
            mask = self.token_mask(features, k) & present[k][:, None]
            # a ModuleDict forgets what its modules are
            self.standard[k].fit(features[f"{k}_tokens"][mask].float())  # type: ignore[operator]

    def tokens(self, features: Features, present: Present, k: str) -> tuple[Tensor, Tensor]:
        """Projected tokens [b, L, H] and their mask; a missing modality is its null vector in the first
        place."""
        mask = self.token_mask(features, k) & present[k][:, None]
        x = self.standard[k](features[f"{k}_tokens"].float())
        x = torch.where(mask[..., None], x, self.null[k])  # also: nothing masked may hold NaN
        mask = mask.clone()
        mask[:, 0] |= ~present[k]
        return self.project[k](x), mask

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        image, image_mask = self.tokens(features, present, "image")
        x, mask = self.tokens(features, present, "text")
        for block in self.blocks:
            x = block(x, mask, image, image_mask)
        weight = mask[..., None].to(x.dtype)
        return self.classify((self.norm(x) * weight).sum(1) / weight.sum(1))
