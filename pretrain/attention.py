"""Attention over a flat run of tokens that falls into sequences of several lengths.

On a CPU one scaled_dot_product_attention call per length, whose sequences lie side by side, so that its
inputs are views. On LAION's caption lengths (64 captions, 24 lengths) nothing else was as fast, forward and
backward: plain softmax per length takes 1.5 times as long, block-diagonal runs of about 64 tokens 1.1 times,
6 groups padded to their longest 1.9 times. On CUDA torch's variable-length kernel does all at once.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional as F

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
        """The same on another device; a GPU's copies are not waited for."""
        groups = tuple(
            Group(g.count, g.length, None if g.mask is None else g.mask.to(device, non_blocking=True))
            for g in self.groups
        )
        return Sequences(groups, self.causal, self.pooled.to(device, non_blocking=True))

    @cached_property
    def cumulative(self) -> Tensor:
        """Where each sequence begins and the last one ends, int32 [n + 1], as variable-length kernels want
        them; made on the host once and used by every block."""
        counts = torch.tensor([g.count for g in self.groups])
        lengths = torch.tensor([g.length for g in self.groups], dtype=torch.int32).repeat_interleave(counts)
        total = F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        return total.to(self.pooled.device, non_blocking=True)

    def split(self, x: Tensor, *, pooled: bool = False) -> list[Tensor]:
        """x [T or n, ..] by group, each [count, length or 1, ..].

        Not by slices: the backward of a split is one concatenation, that of k slices adds k full tensors.
        """
        shapes = [(g.count, 1 if pooled else g.length) for g in self.groups]
        parts = x.split([count * length for count, length in shapes])
        return [part.view(*shape, *x.shape[1:]) for part, shape in zip(parts, shapes, strict=True)]


def attend(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, *, pooled: bool = False) -> Tensor:
    """Attention within each sequence; k, v [T, H, d], q [T, H, d] or with ``pooled`` [n, H, d] -> like q."""
    if uses_kernel(k, sequences, k.shape[-1]):
        return _varlen(q, k, v, sequences, pooled)
    out: list[Tensor] = []
    parts = (sequences.split(q, pooled=pooled), sequences.split(k), sequences.split(v))
    for group, *qkv in zip(sequences.groups, *parts, strict=True):
        mask = group.mask if group.mask is None or not pooled else group.mask[-1:]
        causal = sequences.causal and mask is None and not pooled and group.length > 1
        q_, k_, v_ = (t.transpose(1, 2) for t in qkv)
        y = F.scaled_dot_product_attention(q_, k_, v_, attn_mask=mask, is_causal=causal)
        out.append(y.transpose(1, 2).flatten(0, 1))
    return _joined(out, q)


def attend_pooled(
    q: Tensor, x: Tensor, k_weight: Tensor, v_weight: Tensor, v_bias: Tensor | None, sequences: Sequences
) -> Tensor:
    """Attention of one query per sequence, q [n, H, d], to keys and values that are never formed, [n, H, d].

    With keys K x and values V x of the tokens x [T, width] (weights [H d, width]), q K x is (q K) x, and the
    sum of a V x is V of the sum of a x: the projections act on one vector per head and sequence instead of on
    every token (the absorption of DeepSeek-V2, arXiv 2405.04434, section 2.1.2). A key bias adds the same to
    all scores of a query and so changes nothing.
    """
    heads, depth = q.shape[1:]
    by_head = k_weight.view(heads, depth, -1)
    queries = torch.einsum("nhd,hdw->nhw", q * depth**-0.5, by_head)
    out: list[Tensor] = []
    parts = (sequences.split(queries, pooled=True), sequences.split(x))
    for group, q_, x_ in zip(sequences.groups, *parts, strict=True):
        scores = q_.squeeze(1) @ x_.transpose(1, 2)  # [count, H, length]
        if group.mask is not None:
            scores = scores.masked_fill(~group.mask[-1], -torch.inf)
        out.append(scores.softmax(-1) @ x_)
    y = torch.einsum("nhw,hdw->nhd", _joined(out, queries), v_weight.view(heads, depth, -1))
    return y if v_bias is None else y + v_bias.view(heads, depth)


def _joined(parts: list[Tensor], empty: Tensor) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts) if parts else empty


def uses_kernel(x: Tensor, sequences: Sequences, depth: int) -> bool:
    """Whether torch's variable-length kernel runs heads of ``depth`` made of x in these sequences: half
    precision on an Ampere GPU or newer, a depth that it takes, several lengths, no mask."""
    if varlen_attn is None or not x.is_cuda or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    half = x.dtype in (torch.float16, torch.bfloat16) or torch.is_autocast_enabled(x.device.type)
    fits = depth % 8 == 0 and depth <= 256  # FlashAttention's
    return half and fits and len(sequences.groups) > 1 and all(g.mask is None for g in sequences.groups)


def _varlen(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, pooled: bool) -> Tensor:
    cumulative, longest = sequences.cumulative, max(g.length for g in sequences.groups)
    window = (-1, 0) if sequences.causal and not pooled else (-1, -1)
    of_queries, most = cumulative, longest
    if pooled:
        of_queries, most = torch.arange(len(cumulative), dtype=torch.int32, device=k.device), 1
    out = cast(Any, varlen_attn)(
        *(t.contiguous() for t in (q, k, v)), of_queries, cumulative, most, longest, window_size=window
    )
    assert isinstance(out, Tensor)
    return out
