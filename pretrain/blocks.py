"""open_clip's transformer blocks over a flat run of tokens, with the last block cut to what is read from it.

Token-wise layers (norms, projections, MLP) do not care which sequence a token belongs to: they run once over
all tokens, [T, width]. Attention runs within sequences (see ``attention``). A tower that reads one position
per sequence needs only that query in its last block, and there neither keys nor values of the others.

Parameters are open_clip's own, in their own modules, under their own names.
"""

from typing import Any, TypeVar, cast

import torch
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .attention import Group, Sequences, attend, attend_pooled, uses_kernel
from .cpu_linear import linear

__all__ = ["Group", "LeanBlock", "LeanCustomBlock", "Sequences", "lean", "run_blocks", "supports_blocks"]


class LeanBlock(ResidualAttentionBlock):
    """open_clip's block that also runs over a flat run of tokens: same parameters, same names, and its own
    calls as before. ``lean`` puts it in place."""

    def forward(
        self,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
        *,
        sequences: Sequences | None = None,
        pooled: bool = False,
    ) -> Tensor:
        """open_clip's forward, or with ``sequences`` q_x [T, width] -> [T, width], with ``pooled`` [n, width]
        (only the tokens at ``sequences.pooled``)."""
        if sequences is None:
            return super().forward(q_x, k_x, v_x, attn_mask)
        return _block(self, q_x, sequences, pooled)


class LeanCustomBlock(CustomResidualAttentionBlock):
    """The same of open_clip's block with more norms and scales."""

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        *,
        sequences: Sequences | None = None,
        pooled: bool = False,
    ) -> Tensor:
        """As ``LeanBlock``."""
        if sequences is None:
            return super().forward(x, attn_mask)
        return _block(self, x, sequences, pooled)


Module = TypeVar("Module", bound=nn.Module)
_LEAN: dict[type[nn.Module], type[nn.Module]] = {
    ResidualAttentionBlock: LeanBlock,
    CustomResidualAttentionBlock: LeanCustomBlock,
}


def lean(module: Module) -> Module:
    """Give every open_clip transformer block in ``module`` its lean class, in place; other modules stay.

    The work is then done inside ``block(...)``, so that what wraps a block (FSDP's hooks, checkpointing,
    ``compile``) or a layer in it (LoRA) takes part in it.
    """
    for transformer in module.modules():
        if hasattr(transformer, "resblocks") and supports_blocks(transformer) is None:
            for block in cast(Any, transformer).resblocks:
                block.__class__ = _LEAN.get(type(block), type(block))
    return module


def supports_blocks(transformer: Any) -> str | None:
    """None if ``run_blocks`` can run this transformer exactly, else the reason why not."""
    for block in transformer.resblocks:
        if type(block) not in _LEAN and not isinstance(block, LeanBlock | LeanCustomBlock):
            return f"its blocks are {type(block).__name__}"
        attention: Any = block.attn
        if isinstance(attention, Attention):
            if attention.scaled_cosine:
                return "it uses scaled cosine attention"
            dropout = attention.attn_drop.p + attention.out_drop.p
        else:
            dropout = attention.dropout
            if hasattr(block, "ln_1_kv") or not attention._qkv_same_embed_dim or attention.bias_k is not None:
                return "its attention has keys of its own"
        if dropout:
            return "it uses attention dropout"
    return None


def run_blocks(transformer: Any, x: Tensor, sequences: Sequences) -> Tensor:
    """All blocks of an open_clip ``Transformer`` made ``lean`` over x [T, width]; returns the pooled tokens
    [n, width].

    Equal to the transformer on each sequence by itself, read at ``sequences.pooled``. Honours
    grad_checkpointing.
    """
    blocks = list(transformer.resblocks)
    for i, block in enumerate(blocks):
        given: dict[str, Any] = {"sequences": sequences, "pooled": i == len(blocks) - 1}
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(block, x, use_reentrant=False, **given)
        else:
            x = block(x, **given)
    return x


def _block(block: Any, x: Tensor, sequences: Sequences, pooled: bool) -> Tensor:
    """One pre-norm residual block; with ``pooled`` only those tokens come out."""
    attention = block.attn
    width = x.shape[1]
    normed = block.ln_1(x)
    if pooled:
        x = x.index_select(0, sequences.pooled)
        y = _pooled(attention, normed.index_select(0, sequences.pooled), normed, sequences)
    else:
        qkv = linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = qkv.view(-1, 3, attention.num_heads, width // attention.num_heads).unbind(1)
        y = attend(*_normed(attention, q, k), v, sequences)
    if isinstance(attention, Attention):
        y = y if attention.head_scale is None else y * attention.head_scale.view(-1, 1)
        y = block.ln_attn(attention.out_proj(attention.ln_inner(y.reshape(-1, width))))
    else:
        y = attention.out_proj(y.reshape(-1, width))
    x = x + block.ls_1(y)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _pooled(attention: Any, read: Tensor, x: Tensor, sequences: Sequences) -> Tensor:
    """Attention of the tokens that are read, [n, width], to all, [T, width]; returns [n, H, d]."""
    heads, width = attention.num_heads, x.shape[1]
    q_weight, k_weight, v_weight = attention.in_proj_weight.split(width)
    biases = attention.in_proj_bias
    q_bias, k_bias, v_bias = (None, None, None) if biases is None else biases.split(width)
    q = linear(read, q_weight, q_bias).view(-1, heads, width // heads)
    custom = isinstance(attention, Attention) and not isinstance(attention.ln_k, nn.Identity)
    if not custom and not uses_kernel(x, sequences, width // heads):
        return attend_pooled(q, x, k_weight, v_weight, v_bias, sequences)
    k, v = (
        linear(x, weight, bias).view(-1, heads, width // heads)
        for weight, bias in ((k_weight, k_bias), (v_weight, v_bias))
    )
    return attend(*_normed(attention, q, k), v, sequences, pooled=True)


def _normed(attention: Any, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    return (attention.ln_q(q), attention.ln_k(k)) if isinstance(attention, Attention) else (q, k)
