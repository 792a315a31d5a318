"""Attention that can be looked at: its weights kept while a model runs, and rolled out over the layers.

The rule is that of Chefer, Gur and Wolf 2021 (arXiv 2103.15679, eq. 5 and 6; 2012.09838): A [h, n, n] are the
attention weights of a layer and v the value that is explained,

    E = mean over heads of (dv/dA * A)^+,        R <- R + E R,        R = 1 at first,

and row i of R says how much of token i comes from each token of the input. Only the row of what is read is
needed, so it is carried backwards as a vector: r <- r + r E from the last layer to the first.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..fusion.bottleneck import Bottleneck
from ..fusion.cross import Cross
from ..fusion.head import Features, Head, Present
from ..fusion.joint import Joint
from ..fusion.merged import Merged

__all__ = ["Attended", "NoAttention", "evidence", "head_starts", "unrolled"]


class NoAttention(Exception):
    """Relevance cannot be had of a tower or head; the message says why."""


class Attended(TorchFunctionMode):
    """While it is on, attention is computed step by step, and the weights [b, h, n, m] of each call are kept
    in ``maps``, with their gradient. Results are those of torch's fused attention to rounding. Attention with
    keys of its own or dropout runs as ever and is not kept."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        made = None
        if func is F.scaled_dot_product_attention:
            made = self._attend(*args, **given)
        elif func is F.multi_head_attention_forward:
            y = self._multi_head(*args, **given)
            made = None if y is None else (y, None)
        return func(*args, **given) if made is None else made

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        """``F.scaled_dot_product_attention`` of [b, h, n, d]; None for what is not kept: shared keys,
        dropout."""
        if q.ndim != 4 or enable_gqa or dropout_p:
            return None
        scores = (q @ k.transpose(-2, -1)) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if attn_mask is not None:
            bias = torch.zeros_like(scores)
            if attn_mask.dtype == torch.bool:
                bias = bias.masked_fill(~attn_mask, torch.finfo(scores.dtype).min)
            else:
                bias = bias + attn_mask
            scores = scores + bias
        weights = scores.softmax(-1)
        if not weights.requires_grad:
            weights.requires_grad_()
        self.maps.append(weights)
        return weights @ v

    def _multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        width: int,
        heads: int,
        in_weight: Tensor | None,
        in_bias: Tensor | None,
        bias_k: Tensor | None,
        bias_v: Tensor | None,
        add_zero_attn: bool,
        dropout: float,
        out_weight: Tensor,
        out_bias: Tensor | None,
        **more: Any,
    ) -> Tensor | None:
        """``F.multi_head_attention_forward`` of [n, b, width]; None for what is not kept: keys of its own,
        dropout."""
        mask: Tensor | None = more.get("attn_mask")
        plain = in_weight is not None and bias_k is None and bias_v is None and not add_zero_attn
        if not plain or more.get("key_padding_mask") is not None or (dropout and more.get("training")):
            return None
        assert in_weight is not None
        biases = (None, None, None) if in_bias is None else in_bias.chunk(3)
        parts = zip((query, key, value), in_weight.chunk(3), biases, strict=True)
        q, k, v = (
            F.linear(x, w, b).unflatten(2, (heads, width // heads)).permute(1, 2, 0, 3) for x, w, b in parts
        )
        if mask is not None and mask.dtype == torch.bool:
            mask = ~mask  # True hides there, and shows here
        if mask is not None and mask.ndim == 3:
            mask = mask.unflatten(0, (-1, heads))
        y = self._attend(q, k, v, mask)
        assert y is not None
        return F.linear(y.permute(2, 0, 1, 3).flatten(2), out_weight, out_bias)


def evidence(value: Tensor, maps: Sequence[Tensor]) -> list[Tensor]:
    """E [b, n, m] of every map, given v [b], whose rows do not look at each other."""
    if not maps:
        return []
    grads: Any = torch.autograd.grad(value.sum(), list(maps), allow_unused=True, retain_graph=True)
    return [
        torch.zeros_like(a[:, 0]) if g is None else (g * a).clamp_min(0).mean(1).detach()
        for a, g in zip(maps, grads, strict=True)
    ]


def unrolled(start: Tensor, layers: Sequence[Tensor]) -> Tensor:
    """r [b, n] over the tokens that enter the first layer, from weights [b, m] of those that leave the last;
    ``layers``: E [b, m, n] in the order of the layers, where m < n if only the first m tokens go on."""
    r = start
    for e in reversed(layers):
        r = F.pad(r, (0, e.shape[2] - e.shape[1])) + (r[:, None] @ e)[:, 0]
    return r


def head_starts(
    head: Head, features: Features, present: Present, layers: Sequence[Tensor]
) -> dict[str, Tensor]:
    """How much a head on tokens takes of each token [b, n_k] of every modality, ``layers`` being E of its own
    attention. Attention between modalities counts as attention over all their tokens together."""
    masks: dict[str, Tensor] = {}
    for k in head.modalities:
        assert isinstance(head, Merged | Cross | Bottleneck | Joint)
        tokens, mask = head.read(features, k)
        masks[k] = mask & present[k][:, None]
        del tokens
    sizes = {k: mask.shape[1] for k, mask in masks.items()}
    if isinstance(head, Cross):
        return _of_cross(head, masks, sizes, layers)
    if isinstance(head, Bottleneck):
        return _of_bottleneck(head, present, sizes, layers)
    start = layers[-1].new_ones(len(layers[-1]), 1)  # the cls token
    parts = unrolled(start, layers)[:, 1:].split(list(sizes.values()), dim=1)
    return dict(zip(sizes, parts, strict=True))


def _of_cross(
    head: Cross, masks: dict[str, Tensor], sizes: dict[str, int], layers: Sequence[Tensor]
) -> dict[str, Tensor]:
    others = [k for k in head.modalities if k != head.asks]
    mask = masks[head.asks].to(layers[0].dtype)
    u = mask / mask.sum(1, keepdim=True).clamp_min(1)
    w = layers[0].new_zeros(len(mask), sum(sizes[k] for k in others))
    for i in range(len(layers) - 2, -1, -2):
        itself, other = layers[i], layers[i + 1]
        w = w + (u[:, None] @ other)[:, 0]
        u = u + (u[:, None] @ itself)[:, 0]
    parts = w.split([sizes[k] for k in others], dim=1)
    return {head.asks: u} | dict(zip(others, parts, strict=True))


def _of_bottleneck(
    head: Bottleneck, present: Present, sizes: dict[str, int], layers: Sequence[Tensor]
) -> dict[str, Tensor]:
    share = head.masks(present).to(layers[0].dtype)
    share = share / share.sum(1, keepdim=True).clamp_min(1)  # [b, M]
    rows, names = len(share), head.modalities
    own = {k: share[:, j : j + 1] for j, k in enumerate(names)}  # the cls tokens
    shared = layers[0].new_zeros(rows, 0)  # of the last layer no bottlenecks are read
    for layer in range(head.layers - 1, -1, -1):
        before = layers[0].new_zeros(rows, len(head.shared))
        for j, k in enumerate(names):
            e = layers[layer * len(names) + j]
            whole = unrolled(torch.cat([own[k], share[:, j : j + 1] * shared], dim=1), [e])
            own[k], heard = whole.split([1 + sizes[k], len(head.shared)], dim=1)
            before = before + heard
        shared = before
    return {k: r[:, 1:] for k, r in own.items()}
