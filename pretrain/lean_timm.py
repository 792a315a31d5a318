"""timm's VisionTransformer with the cuts of ``lean_vision``: everything else runs exactly as timm runs it.

Blocks are timm's own. Only where the class token alone is read (``global_pool: token``), the last one
computes that query alone.
"""

from typing import Any, cast

import torch
from timm.layers.attention import Attention
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import Group, Sequences, attend_pooled
from .cpu_linear import OneDnnLinear, linear
from .patches import add_positions, patch_grid, project_patches, resample_positions


class LeanTimmBlock(Block):
    """timm's block that can also compute its first token alone; same parameters, names and own calls."""

    def forward(self, x: Tensor, *args: Any, first: bool = False, **kwargs: Any) -> Tensor:
        """[b, L, width] -> the same, or with ``first`` [b, 1, width]."""
        if not first:
            return super().forward(x, *args, **kwargs)
        normed = self.norm1(x)
        x = x[:, :1] + self.drop_path1(self.ls1(_attend_first(self.attn, normed)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def lean_last_block(trunk: nn.Module) -> None:
    """Give the last block of a timm ViT that is read at its class token the class above, in place."""
    if not isinstance(trunk, VisionTransformer) or supports(trunk) is not None:
        return
    block = cast(Any, trunk).blocks[-1]
    if trunk.global_pool == "token" and type(block) is Block and type(block.attn) is Attention:
        attention: Any = block.attn
        plain = type(attention.qkv) in (nn.Linear, OneDnnLinear) and getattr(attention, "gate", None) is None
        if plain and attention.attn_drop.p == 0 and attention.proj_drop.p == 0:
            block.__class__ = LeanTimmBlock


def _attend_first(attention: Any, x: Tensor) -> Tensor:
    """timm's ``Attention`` for the first token of x [b, L, width] alone, [b, 1, width]."""
    b, length, _ = x.shape
    heads: int = attention.num_heads
    weights = attention.qkv.weight.chunk(3)
    biases = (None, None, None) if attention.qkv.bias is None else attention.qkv.bias.chunk(3)
    q = linear(x[:, 0], weights[0], biases[0]).view(b, heads, -1)
    if isinstance(attention.k_norm, nn.Identity):
        whole = Sequences((Group(b, length),), False, torch.empty(0))
        y = attend_pooled(attention.q_norm(q), x.flatten(0, 1), weights[1], weights[2], biases[2], whole)
    else:
        k, v = (linear(x, weights[i], biases[i]).view(b, length, heads, -1).transpose(1, 2) for i in (1, 2))
        q = attention.q_norm(q).unsqueeze(2)
        y = F.scaled_dot_product_attention(q, attention.k_norm(k), v)
    y = y.reshape(b, 1, -1)
    return attention.proj(attention.norm(y) if hasattr(attention, "norm") else y)


def supports(trunk: Any) -> str | None:
    """None if ``encode`` can run this timm model, else the reason why not."""
    if type(trunk).forward_features is not VisionTransformer.forward_features:
        return f"{type(trunk).__name__} is not timm's VisionTransformer"
    if type(trunk.patch_embed) is not PatchEmbed or trunk.patch_embed.dynamic_img_pad:
        return f"its patches come from {type(trunk.patch_embed).__name__}"
    if getattr(trunk.attn_pool, "pos_embed", None) is not None:
        return "its attention pooling has positions of its own"
    return None


def encode(trunk: Any, image: Tensor, kept: Tensor | None) -> Tensor:
    """``trunk(image)`` for normalised images [b, 3, H, W] of any side; ``kept`` as in ``lean_vision``."""
    x = trunk.norm_pre(_embed(trunk, image, kept))
    blocks = list(trunk.blocks)
    for i, block in enumerate(blocks):
        first: dict[str, Any] = (
            {"first": True} if i == len(blocks) - 1 and isinstance(block, LeanTimmBlock) else {}
        )
        if trunk.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False, **first)
        else:
            x = block(x, **first)
    return trunk.forward_head(trunk.norm(x))


def _embed(trunk: Any, image: Tensor, kept: Tensor | None) -> Tensor:
    """Tokens [b, prefix + patches, width]: timm's ``patch_embed`` and ``_pos_embed``."""
    x = trunk.patch_embed.norm(project_patches(image, trunk.patch_embed.proj, kept))
    given = [token for token in (trunk.cls_token, trunk.reg_token) if token is not None]
    prefix = torch.cat(given, dim=1) if given else None
    if trunk.pos_embed is not None:
        own = 0 if trunk.no_embed_class else trunk.num_prefix_tokens
        new = patch_grid(image, trunk.patch_embed.patch_size)
        positions = resample_positions(trunk.pos_embed[0, own:], trunk.patch_embed.grid_size, new)
        x = add_positions(x, positions, kept)
        if prefix is not None and own:
            prefix = prefix + trunk.pos_embed[:, :own]
    if prefix is not None:
        x = torch.cat([prefix.to(x.dtype).expand(len(x), -1, -1), x], dim=1)
    return x if trunk.pos_embed is None else trunk.pos_drop(x)
