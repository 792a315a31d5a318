"""Contrastive losses over the global batch, computed a tile of logits at a time.

``contrastive_loss`` gives CLIP's symmetric InfoNCE (Radford et al., 2021, arXiv 2103.00020) or SigLIP's
pairwise sigmoid loss (Zhai et al., 2023, arXiv 2303.15343). Neither ever holds the [B, B] logits: the forward
keeps the log-sum-exps of rows and columns, the backward computes each tile again, so that memory is O(B D)
where a dense loss needs O(B^2).

Across ranks every process takes its local images against all texts. Only the texts are gathered, the column
log-sum-exps are all-reduced (maximum, then sum), and the text gradient is reduce-scattered. With ``S =
logit_scale * I T^t``, ``row_i = logsumexp_j S_ij`` and ``col_j = logsumexp_i S_ij`` the loss over M valid
pairs is

    L = sum_i (row_i + col_i - 2 sum_j P_ij S_ij) / 2M        P: targets, rows sum to 1, symmetric
    dL/dS = (exp(S - row) + exp(S - col) - 2 P) / 2M

Everything runs in fp32 (fp64 for fp64 inputs), inside autocast too, and every exponential has its maximum
taken off first, so that a scale of 100 does not overflow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..configs.load import StrictModel
from . import distributed

Duplicates = Literal["negatives", "positives", "ignore"]


class LossConfig(StrictModel):
    """Which contrastive loss, and what becomes of captions that occur twice in a global batch."""

    kind: Literal["clip", "siglip"] = "clip"
    duplicates: Duplicates = "ignore"
    """``negatives``: as open_clip. ``positives``: all pairs with one caption are matches (the target is
    uniform over them). ``ignore``: pairs that are not a row's own but carry its caption are left out of the
    sums."""
    tile: int = Field(default=1024, ge=1)
    """Side of the square tiles of logits, in samples; memory beyond the features is about 3 tile^2 floats."""


@dataclass(frozen=True)
class _Layout:
    """Where this rank's valid pairs lie in the global batch of valid pairs, and which of them share a
    caption."""

    counts: list[int]  # valid pairs by rank
    offset: int  # of this rank's first pair
    world: int
    group: distributed.Group
    tile: int
    duplicates: Duplicates
    caption: Tensor | None  # int64 [N]: captions numbered; None where duplicates do not matter
    caption_size: Tensor | None  # floats [N]: pairs that share the caption

    @property
    def total(self) -> int:
        return max(1, sum(self.counts))

    def tiles(self, rows: int) -> Iterator[tuple[slice, slice]]:
        """(local rows, global columns) of every tile."""
        for r in range(0, rows, self.tile):
            for c in range(0, sum(self.counts), self.tile):
                yield slice(r, min(r + self.tile, rows)), slice(c, min(c + self.tile, sum(self.counts)))

    def own(self) -> slice:
        """The columns of this rank's own texts."""
        return slice(self.offset, self.offset + self.counts[distributed.rank(self.group)])

    def same_caption(self, rows: slice, columns: slice) -> Tensor | None:
        """bool [r, c]: pairs with one caption, a row's own pair included; None where duplicates do not
        matter."""
        if self.caption is None:
            return None
        local = self.caption[self.offset + rows.start : self.offset + rows.stop]
        return local[:, None] == self.caption[None, columns]

    def diagonal(self, tile: Tensor, rows: slice, columns: slice) -> Tensor:
        """View of the tile's elements that are a row's own pair; empty where the tile has none."""
        return tile.diagonal(self.offset + rows.start - columns.start)


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    logit_bias: Tensor | None = None,
    valid: Tensor | None = None,
    caption_hash: Tensor | None = None,
    kind: Literal["clip", "siglip"] = "clip",
    duplicates: Duplicates = "negatives",
    group: distributed.Group = None,
    tile: int = 1024,
) -> Tensor:
    """Contrastive loss of the global batch: the same value on every rank, differentiable by its local inputs.

    image_features, text_features: [b, D] of this rank's pairs, normalised; b may differ between ranks and be
    0. logit_scale, logit_bias: one-element tensors, the scale already exponentiated. ``siglip`` needs the
    bias; ``clip`` does not depend on it and gives it a zero gradient (so DDP finds no unused parameter).
    valid: bool [b]; the others are left out on both axes. Sums are divided by the global number of valid
    pairs (at least 1). caption_hash: int64 [b], needed unless ``duplicates`` is ``negatives``.

    Gradients are the world size times this rank's share of the global gradient: DDP's average over the ranks
    is then exactly what one process with the whole batch would get, for the towers and for ``logit_scale``.
    """
    dtype = torch.float64 if image_features.dtype == torch.float64 else torch.float32
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = image_features.to(dtype), text_features.to(dtype)
        if valid is not None and not bool(valid.all()):
            rows = valid.nonzero().squeeze(1).to(image.device)
            image, text = image[rows], text[rows]
            caption_hash = None if caption_hash is None else caption_hash.to(image.device)[rows]
        layout = _layout(image, caption_hash, duplicates, group, tile)
        scale = logit_scale.to(dtype).reshape(())
        if kind == "siglip":
            assert logit_bias is not None, "siglip needs a logit_bias: set model.init_logit_bias"
            loss = _Sigmoid.apply(image, text, scale, logit_bias.to(dtype).reshape(()), layout)
        else:
            loss = _Softmax.apply(image, text, scale, layout)
            if logit_bias is not None:
                loss = loss + 0.0 * logit_bias.sum()
    assert isinstance(loss, Tensor)
    return loss


def _layout(
    image: Tensor, caption_hash: Tensor | None, duplicates: Duplicates, group: distributed.Group, tile: int
) -> _Layout:
    counts = distributed.row_counts(image.shape[0], image.device, group)
    caption = size = None
    if duplicates != "negatives":
        assert caption_hash is not None, "duplicates other than negatives need caption_hash"
        everyone = distributed.all_gather_rows(caption_hash.to(image.device), counts, group)
        _, caption, sizes = everyone.unique(return_inverse=True, return_counts=True)
        size = sizes[caption].to(image.dtype)
        if everyone.numel() == 0 or int(sizes.max()) == 1:
            caption = size = None
    rank = distributed.rank(group)
    world = distributed.world_size(group)
    return _Layout(counts, sum(counts[:rank]), world, group, tile, duplicates, caption, size)


def _logits(
    scaled: Tensor, text: Tensor, layout: _Layout, rows: slice, columns: slice
) -> tuple[Tensor, Tensor | None]:
    """One tile of softmax logits [r, c], ignored pairs at -inf, and which of its pairs share a caption."""
    logits = scaled[rows] @ text[columns].T
    same = layout.same_caption(rows, columns)
    if same is not None and layout.duplicates == "ignore":
        layout.diagonal(same, rows, columns).fill_(False)
        logits.masked_fill_(same, -torch.inf)
    return logits, same


class _Softmax(torch.autograd.Function):
    """InfoNCE in both directions; see the head of the file for the formulae."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, text: Tensor, scale: Tensor, layout: _Layout) -> Tensor:
        everyone = distributed.all_gather_rows(text, layout.counts, layout.group)
        scaled = image * scale
        row = image.new_full((image.shape[0],), -torch.inf)
        column = image.new_full((everyone.shape[0],), -torch.inf)
        positive = (scaled * everyone[layout.own()]).sum(1)
        if spread := layout.duplicates == "positives" and layout.caption is not None:
            positive = torch.zeros_like(positive)
        for rows, columns in layout.tiles(image.shape[0]):
            logits, same = _logits(scaled, everyone, layout, rows, columns)
            row[rows] = torch.logaddexp(row[rows], logits.logsumexp(1))
            column[columns] = torch.logaddexp(column[columns], logits.logsumexp(0))
            if spread:
                assert same is not None
                assert layout.caption_size is not None
                positive[rows] += (logits * same / layout.caption_size[columns]).sum(1)
        column = _combine(column, layout)
        share = (row + column[layout.own()] - 2 * positive).sum()
        ctx.save_for_backward(image, everyone, scale, row, column)
        ctx.layout = layout
        return distributed.all_reduce_sum(share, layout.group) / (2 * layout.total)

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None]:
        image, everyone, scale, row, column = ctx.saved_tensors
        layout: _Layout = ctx.layout
        spread = layout.duplicates == "positives" and layout.caption is not None
        with torch.autocast(image.device.type, enabled=False):
            scaled = image * scale
            d_image, d_text = torch.zeros_like(image), torch.zeros_like(everyone)
            for rows, columns in layout.tiles(image.shape[0]):
                logits, same = _logits(scaled, everyone, layout, rows, columns)
                d_logits = (logits - row[rows, None]).exp_()
                d_logits += logits.sub_(column[columns]).exp_()
                if spread:
                    assert same is not None
                    assert layout.caption_size is not None
                    d_logits -= same * (2 / layout.caption_size[columns])
                else:
                    layout.diagonal(d_logits, rows, columns).sub_(2)
                d_image[rows].addmm_(d_logits, everyone[columns])
                d_text[columns].addmm_(d_logits.T, image[rows])
            d_text = distributed.reduce_scatter_rows(d_text, layout.counts, layout.group)
            factor = grad_outputs[0] * (layout.world / (2 * layout.total))
            d_scale = factor * (d_image * image).sum()
            return d_image * (factor * scale), d_text * (factor * scale), d_scale, None


def _combine(column: Tensor, layout: _Layout) -> Tensor:
    """Column log-sum-exps over all ranks from those over the local rows, [N]."""
    if layout.world == 1:
        return column
    top = distributed.all_reduce_max(column, layout.group)
    return top + distributed.all_reduce_sum((column - top).exp_(), layout.group).log_()


class _Sigmoid(torch.autograd.Function):
    """SigLIP: L = -sum_ij log sigmoid(z_ij (s I_i T_j + b)) / M, z = 1 for matches, -1 otherwise."""

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, layout: _Layout
    ) -> Tensor:
        everyone = distributed.all_gather_rows(text, layout.counts, layout.group)
        share = image.new_zeros(())
        for rows, columns in layout.tiles(image.shape[0]):
            signed, _, _ = _signed_logits(image * scale, everyone, bias, layout, rows, columns)
            share = share - F.logsigmoid(signed).sum()
        ctx.save_for_backward(image, everyone, scale, bias)
        ctx.layout = layout
        return distributed.all_reduce_sum(share, layout.group) / layout.total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        image, everyone, scale, bias = ctx.saved_tensors
        layout: _Layout = ctx.layout
        with torch.autocast(image.device.type, enabled=False):
            d_image, d_text, d_bias = (
                torch.zeros_like(image),
                torch.zeros_like(everyone),
                torch.zeros_like(bias),
            )
            for rows, columns in layout.tiles(image.shape[0]):
                signed, sign, ignored = _signed_logits(image * scale, everyone, bias, layout, rows, columns)
                d_logits = signed.neg_().sigmoid_().mul_(sign).neg_()
                if ignored is not None:
                    d_logits.masked_fill_(ignored, 0)
                d_image[rows].addmm_(d_logits, everyone[columns])
                d_text[columns].addmm_(d_logits.T, image[rows])
                d_bias += d_logits.sum()
            d_text = distributed.reduce_scatter_rows(d_text, layout.counts, layout.group)
            factor = grad_outputs[0] * (layout.world / layout.total)
            d_scale = factor * (d_image * image).sum()
            return d_image * (factor * scale), d_text * (factor * scale), d_scale, d_bias * factor, None


def _signed_logits(
    scaled: Tensor, text: Tensor, bias: Tensor, layout: _Layout, rows: slice, columns: slice
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One tile of z * logits (+inf where ignored), of the signs z, and of what is ignored."""
    logits = (scaled[rows] @ text[columns].T).add_(bias)
    sign = torch.full_like(logits, -1)
    same = layout.same_caption(rows, columns)
    if same is not None and layout.duplicates == "positives":
        sign.masked_fill_(same, 1)
    layout.diagonal(sign, rows, columns).fill_(1)
    logits.mul_(sign)
    if same is None or layout.duplicates != "ignore":
        return logits, sign, None
    layout.diagonal(same, rows, columns).fill_(False)
    return logits.masked_fill_(same, torch.inf), sign, same
