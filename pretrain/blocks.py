"""open_clip's transformer blocks over a flat run of tokens, with the last block cut to what is read from it.

Token-wise layers (norms, projections, MLP) do not care which sequence a token belongs to: they run once over
all tokens, [T, width]. Attention runs per group of sequences of equal length, which lie side by side, so that
a group is a view of the flat tensors and one scaled_dot_product_attention call. A tower that reads one
position per sequence needs only that query in its last block: its keys and values still come from all tokens.

Parameters are open_clip's own, in their own modules, under their own names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from open_clip.transformer import Attention, CustomResidualAttentionBlock, ResidualAttentionBlock
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

try:  # torch >= 2.10
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # pragma: no cover
    varlen_attn = None


@dataclass(frozen=True)
class Group:
    """``count`` sequences of ``length`` tokens side by side; ``mask`` [length, length] is True where a query
    sees a key."""

    count: int
    length: int
    mask: Tensor | None = None


@dataclass(frozen=True)
class Sequences:
    """How T tokens fall into sequences: groups in order, ``causal`` attention or full, and which token each
    one is read at.

    ``pooled`` int64 [n]: index among the T tokens; every key of a sequence is visible from there (but for
    ``mask``).
    """

    groups: tuple[Group, ...]
    causal: bool
    pooled: Tensor

    def to(self, device: torch.device) -> "Sequences":
        """The same on another device."""
        groups = tuple(
            Group(g.count, g.length, None if g.mask is None else g.mask.to(device)) for g in self.groups
        )
        return Sequences(groups, self.causal, self.pooled.to(device, non_blocking=True))

    def varlen(self, device: torch.device) -> tuple[Tensor, int]:
        """Cumulative lengths int32 [n + 1] and the longest length, as variable-length kernels want them."""
        lengths = [g.length for g in self.groups for _ in range(g.count)]
        cumulative = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cumulative.to(device, non_blocking=True), max(lengths, default=0)


def supports_blocks(transformer: Any) -> str | None:
    """None if ``run_blocks`` can run this transformer exactly, else the reason why not."""
    for block in transformer.resblocks:
        if type(block) not in (ResidualAttentionBlock, CustomResidualAttentionBlock):
            return f"its blocks are {type(block).__name__}"
        attention = block.attn
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
    """All blocks of an open_clip ``Transformer`` over x [T, width]; returns the pooled tokens [n, width].

    Equal to the transformer on each sequence by itself, read at ``sequences.pooled``. Honours
    grad_checkpointing.
    """
    attend = _attention(sequences, x)
    blocks = list(transformer.resblocks)
    for i, block in enumerate(blocks):
        pooled = sequences.pooled if i == len(blocks) - 1 else None
        if transformer.grad_checkpointing and torch.is_grad_enabled():
            x = checkpoint(_block, block, x, attend, pooled, use_reentrant=False)
        else:
            x = _block(block, x, attend, pooled)
    return x


Attend = Callable[[Tensor, Tensor, Tensor, bool], Tensor]
"""(q [T or n, H, d], k [T, H, d], v [T, H, d], whether q holds the pooled tokens only) -> like q."""


def _block(block: Any, x: Tensor, attend: Attend, pooled: Tensor | None) -> Tensor:
    """One pre-norm residual block; with ``pooled`` only those tokens come out."""
    attention = block.attn
    heads: int = attention.num_heads
    width = x.shape[1]
    normed = block.ln_1(x)
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    if pooled is None:
        q, k, v = F.linear(normed, weight, bias).view(-1, 3, heads, width // heads).unbind(1)
    else:
        x = x.index_select(0, pooled)
        q_weight, kv_weight = weight.split([width, 2 * width])
        q_bias, kv_bias = (None, None) if bias is None else bias.split([width, 2 * width])
        q = F.linear(normed.index_select(0, pooled), q_weight, q_bias).view(-1, heads, width // heads)
        k, v = F.linear(normed, kv_weight, kv_bias).view(-1, 2, heads, width // heads).unbind(1)
    if isinstance(attention, Attention):
        y = attend(attention.ln_q(q), attention.ln_k(k), v, pooled is not None)
        y = y if attention.head_scale is None else y * attention.head_scale.view(heads, 1)
        y = block.ln_attn(attention.out_proj(attention.ln_inner(y.reshape(-1, width))))
    else:
        y = attention.out_proj(attend(q, k, v, pooled is not None).reshape(-1, width))
    x = x + block.ls_1(y)
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _attention(sequences: Sequences, x: Tensor) -> Attend:
    """The attention for these sequences: torch's variable-length kernel where it runs, grouped calls
    elsewhere."""
    half = x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(x.device.type)
    if varlen_attn is not None and x.is_cuda and half and all(g.mask is None for g in sequences.groups):
        return _varlen(sequences, x.device)
    return _grouped(sequences)


def _grouped(sequences: Sequences) -> Attend:
    groups, causal = sequences.groups, sequences.causal
    tokens = [g.count * g.length for g in groups]
    counts = [g.count for g in groups]

    def attend(q: Tensor, k: Tensor, v: Tensor, pooled: bool) -> Tensor:
        heads, depth = q.shape[1:]
        out: list[Tensor] = []
        # split, not slices: its backward is one concatenation, that of n slices adds n full tensors
        parts = zip(
            groups, q.split(counts if pooled else tokens), k.split(tokens), v.split(tokens), strict=True
        )
        for group, *qkv in parts:
            lengths = (1 if pooled else group.length, group.length, group.length)
            q_, k_, v_ = (
                t.view(group.count, n, heads, depth).transpose(1, 2)
                for t, n in zip(qkv, lengths, strict=True)
            )
            mask = group.mask if group.mask is None or not pooled else group.mask[-1:]
            y = F.scaled_dot_product_attention(
                q_,
                k_,
                v_,
                attn_mask=mask,
                is_causal=causal and mask is None and not pooled and group.length > 1,
            )
            out.append(y.transpose(1, 2).reshape(-1, heads, depth))
        return out[0] if len(out) == 1 else torch.cat(out) if out else q

    return attend


def _varlen(sequences: Sequences, device: torch.device) -> Attend:
    kernel = cast(Any, varlen_attn)
    cumulative, longest = sequences.varlen(device)
    ones = torch.arange(len(cumulative), dtype=torch.int32, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, pooled: bool) -> Tensor:
        if pooled:
            out = kernel(q.contiguous(), k.contiguous(), v.contiguous(), ones, cumulative, 1, longest)
        else:
            window = (-1, 0) if sequences.causal else (-1, -1)
            out = kernel(
                q.contiguous(),
                k.contiguous(),
                v.contiguous(),
                cumulative,
                cumulative,
                longest,
                longest,
                window_size=window,
            )
        assert isinstance(out, Tensor)
        return out

    return attend
