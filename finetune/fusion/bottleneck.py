"""Fusion on tokens: a transformer per modality, which hear of each other through a few shared tokens."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..config import HeadConfig
from .attention import SelfBlock, TokenHead
from .head import Features, Present

__all__ = ["Bottleneck"]


class Bottleneck(TokenHead):
    """[X_k; b_k] = Block_k([X_k; b]) per modality and layer, then b = mean of b_k over those present,
    X_k = [cls_k; P_k T_k], b [B, H] learned at first; y = W mean_k LN(X_k,cls) over those present (MBT,
    Nagrani et al. 2021, arXiv 2107.00135).

    A missing modality adds nothing to b or to y. In the first layer the bottlenecks only listen, so there
    must be two.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths, config)
        assert config.bottlenecks
        self.null = nn.ParameterDict()  # what is missing is left out
        self.shared = nn.Parameter(0.02 * torch.randn(config.bottlenecks, self.width))
        self.cls = nn.ParameterDict({k: nn.Parameter(0.02 * torch.randn(self.width)) for k in widths})
        self.blocks = nn.ModuleDict(
            {
                k: nn.ModuleList(
                    [SelfBlock(self.width, self.heads, self.dropout) for _ in range(self.layers)]
                )
                for k in widths
            }
        )
        self.norm = nn.LayerNorm(self.width)
        self.classify = nn.Linear(self.width, outputs)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        weights = self.masks(present).to(self.shared.dtype)
        weights = weights / weights.sum(1, keepdim=True).clamp_min(1.0)  # [b, M]
        streams: dict[str, Tensor] = {}
        masks: dict[str, Tensor] = {}
        for k in self.modalities:
            x, mask = self.tokens(features, present, k)
            rows = x.shape[0]  # not len(): torch.export would fix it
            real = mask.new_ones(rows, 1)
            streams[k] = torch.cat([self.cls[k].expand(rows, 1, -1), x], dim=1)
            masks[k] = torch.cat([real, mask, real.expand(-1, len(self.shared))], dim=1)
        shared, n = self.shared.expand(weights.shape[0], -1, -1), len(self.shared)
        for layer in range(self.layers - 1):
            heard: list[Tensor] = []
            for k in self.modalities:
                x = self._block(k, layer)(torch.cat([streams[k], shared], dim=1), masks[k])
                streams[k] = x[:, :-n]
                heard.append(x[:, -n:])
            shared = (weights[..., None, None] * torch.stack(heard, dim=1)).sum(1)
        cls = [
            self._block(k, -1)(torch.cat([streams[k], shared], dim=1), masks[k], read=1)[:, 0]
            for k in self.modalities
        ]
        return self.classify((weights[..., None] * self.norm(torch.stack(cls, dim=1))).sum(1))

    def _block(self, k: str, layer: int) -> nn.Module:
        blocks = self.blocks[k]
        assert isinstance(blocks, nn.ModuleList)
        return blocks[layer]
