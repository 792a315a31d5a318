"""Token features for heads that attend: several per picture, and where it is possible in the joint space.

The last layer's tokens live in each tower's own space. The projection that makes the pooled feature also maps
single tokens where it is token-wise; then a cell of the picture and a word can be compared from the start (as
FILIP does, Yao et al. 2022, arXiv 2111.07783). Other projections leave the tokens as they are.

A convolutional tower on small pictures may end in a map of one cell. Attention over one key is no attention,
so the deepest map with at least four cells is taken instead.
"""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from open_clip.transformer import TextTransformer, VisionTransformer
from torch import Tensor, nn

from ...pretrain.model import Encoders
from ...pretrain.packing import pad_text

__all__ = [
    "image_inputs",
    "image_tokens",
    "project_image",
    "project_text",
    "text_inputs",
    "text_tokens",
]

LEAST_CELLS = 4


@torch.inference_mode()
def image_tokens(model: Encoders, images: Tensor) -> Tensor:
    """float32 [n, P, D], or [n, P, W] where the projection is not token-wise, of uint8 [n, 3, S, S]."""
    visual: Any = model.clip.visual
    trunk: Any = getattr(visual, "trunk", None)
    tokens = model.image_tokens(images)
    if trunk is not None and tokens.shape[1] < LEAST_CELLS and hasattr(trunk, "forward_intermediates"):
        maps = trunk.forward_intermediates(model.model.pixels(images), intermediates_only=True)
        large = [m for m in maps if m.ndim == 4 and m.shape[2] * m.shape[3] >= LEAST_CELLS]
        return rearrange(large[-1], "n c h w -> n (h w) c").float() if large else tokens
    return project_image(model, tokens)


def project_image(model: Encoders, tokens: Tensor) -> Tensor:
    """[n, P, D], or the tokens [n, P, W] of an image tower as they are."""
    visual: Any = model.clip.visual
    if isinstance(visual, VisionTransformer):
        return tokens if visual.proj is None or visual.attn_pool is not None else tokens @ visual.proj
    trunk: Any = getattr(visual, "trunk", None)
    head = getattr(visual, "head", None)
    if isinstance(head, nn.Module) and _token_wise(head):
        return head(tokens)
    if trunk is None or not isinstance(head, nn.Sequential) or len(head) or not _averages(trunk):
        return tokens
    # the projection is the convolutional trunk's own classifier: what it makes of a map of one cell
    cells = trunk.forward_head(rearrange(tokens, "n p c -> (n p) c 1 1"))
    return rearrange(cells, "(n p) d -> n p d", n=len(tokens))


@torch.inference_mode()
def text_tokens(model: Encoders, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
    """float32 [n, L, D] (or [n, L, W]) and bool [n, L], True for real tokens."""
    tokens, mask = model.text_tokens(captions)
    return project_text(model.clip.text, tokens), mask


def project_text(text: Any, tokens: Tensor) -> Tensor:
    """[n, L, D], or the tokens [n, L, W] of a text tower as they are."""
    projection = text.text_projection if isinstance(text, TextTransformer) else getattr(text, "proj", None)
    if isinstance(projection, Tensor):
        return tokens @ projection
    if isinstance(projection, nn.Module) and _token_wise(projection):
        return projection(tokens)
    return tokens


@torch.inference_mode()
def image_inputs(model: Encoders, images: Tensor) -> Tensor:
    """float32 [n, P, W], what the first block of open_clip's ViT reads of uint8 [n, 3, S, S], without its
    class token."""
    visual: Any = model.clip.visual
    return visual._embeds(model.model.pixels(images))[:, 1:].float()


@torch.inference_mode()
def text_inputs(model: Encoders, captions: Sequence[str]) -> Tensor:
    """float32 [n, L, W'], word embeddings with their positions; L and the real tokens are those of
    ``text_tokens``."""
    token_ids, seq_lens = model.tokenizer.pack(captions)
    text: Any = model.clip.text
    padded = pad_text(text, token_ids, seq_lens).to(model.device)
    return text._embeds(padded)[0][:, : int(seq_lens.max())].float()


def _averages(trunk: Any) -> bool:
    """Whether a timm trunk pools a feature map [n, C, H, W] by its mean before its classifier."""
    return getattr(getattr(trunk, "global_pool", None), "pool_type", None) in ("avg", "fast", "fastavg")


def _token_wise(module: nn.Module) -> bool:
    """Whether a projection is made of layers that treat every token by itself."""
    kinds = (nn.Linear, nn.Dropout, nn.Identity, nn.GELU)
    leaves = [m for m in module.modules() if not list(m.children())]
    return any(isinstance(m, nn.Linear) for m in leaves) and all(isinstance(m, kinds) for m in leaves)
