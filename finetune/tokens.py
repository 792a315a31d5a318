"""Token features in the joint space: what the towers' own projections make of every token.

The last layer's tokens live in each tower's own space. The projection that makes the pooled feature also
maps single tokens where it is linear; then an image token and a text token can be compared from the start (as
FILIP does, Yao et al. 2022, arXiv 2111.07783). Other projections leave the tokens as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from ..pretrain.model import LoadedModel

__all__ = ["image_tokens", "text_tokens"]


@torch.inference_mode()
def image_tokens(model: LoadedModel, images: Tensor) -> Tensor:
    """float32 [n, P, D] (or [n, P, W] where the projection is not linear) of uint8 [n, 3, S, S]."""
    tokens = model.image_tokens(images)
    visual: Any = model.clip.visual
    if isinstance(visual, VisionTransformer):
        return tokens if visual.proj is None or visual.attn_pool is not None else tokens @ visual.proj
    head = getattr(visual, "head", None)
    if head is None or not _token_wise(head):
        return tokens
    return head(tokens)


@torch.inference_mode()
def text_tokens(model: LoadedModel, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """float32 [n, L, D] (or [n, L, W]) and bool [n, L], True for real tokens."""
    tokens, mask = model.text_tokens(captions)
    text: Any = model.clip.text
    projection = text.text_projection if isinstance(text, TextTransformer) else getattr(text, "proj", None)
    if isinstance(projection, Tensor):
        return tokens @ projection, mask
    if isinstance(projection, nn.Module) and _token_wise(projection):
        return projection(tokens), mask
    return tokens, mask


def _token_wise(module: nn.Module) -> bool:
    """Whether a projection is made of layers that treat every token by itself."""
    kinds = (nn.Linear, nn.Dropout, nn.Identity, nn.GELU)
    leaves = [m for m in module.modules() if not list(m.children())]
    return any(isinstance(m, nn.Linear) for m in leaves) and all(isinstance(m, kinds) for m in leaves)
