"""CLIP's symmetric InfoNCE and its gradients, a tile of logits at a time.

With logits ``S = s I T^t``, ``row_i = logsumexp_j S_ij``, ``col_j = logsumexp_i S_ij``, weights w (sum W) and
targets A (A_ij = w_i Q_ij + w_j Q_ji, where a row of Q sums to 1):

    L = (sum_i w_i (row_i + col_i) - sum_ij A_ij S_ij) / 2W
    dL/dS_ij = (w_i exp(S_ij - row_i) + w_j exp(S_ij - col_j) - A_ij) / 2W

Rows and columns come out of a first pass over the tiles, the gradients of a second that computes each tile
again: four products of B x B x D in all (open_clip: six). Where there is a single tile it is kept: three.
Logits are held in base 2, as exp2 is thrice as fast as exp, and every maximum is taken off before.
Log-sums are held less the logit of the pair itself, which leaves small losses at large scales their digits.
"""

import math

import torch
from torch import Tensor

from . import distributed
from .exchange import LOG_SUM_EXP_2, SUM, Exchange
from .pairs import Pairs, Targets, shifted, tiles


class _Tiles:
    """Tiles of logits in base 2 (ignored pairs: -inf), in two buffers that are used again."""

    def __init__(self, image: Tensor, scale: Tensor, pairs: Pairs, tile: int) -> None:
        self.image, self.pairs, self.tile = image, pairs, tile
        self.factor = scale / math.log(2)
        height, width = min(tile, image.shape[0]), min(tile, pairs.total)
        self.buffers = [image.new_empty(height * width) for _ in range(2)]
        self.kept = False  # whether the first buffer holds the only tile there is
        self.alone = image.shape[0] <= tile and pairs.total <= tile

    def fill(self, rows: slice, columns: slice, block: slice, texts: Tensor) -> tuple[Tensor, Tensor]:
        """(logits [r, c], scratch [r, c]) of local rows and of columns of a block; both may be written to."""
        r, c = rows.stop - rows.start, columns.stop - columns.start
        logits, scratch = (buffer[: r * c].view(r, c) for buffer in self.buffers)
        if self.kept and c == self.pairs.total:
            return logits, scratch
        torch.mm(self.image[rows] * self.factor, texts[columns].T, out=logits)
        ignored = self.pairs.ignored(shifted(rows, self.pairs.own.start), shifted(columns, block.start))
        if ignored is not None:
            logits.masked_fill_(ignored, -torch.inf)
        self.kept = self.alone and c == self.pairs.total
        return logits, scratch


def _add_log_sum_exp(found: Tensor, logits: Tensor, scratch: Tensor, dim: int, base: Tensor) -> None:
    """``found = log2(2^found + sum 2^(logits - base))`` over a dimension, in place; found, base [n]."""
    top = logits.amax(dim, keepdim=True).clamp_(min=torch.finfo(logits.dtype).min)
    torch.sub(logits, top, out=scratch)
    sums = scratch.exp2_().sum(dim).log2_().add_(top.squeeze(dim) - base)
    torch.logaddexp2(found, sums, out=found)


def infonce(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    pairs: Pairs,
    targets: Targets,
    exchange: Exchange,
    tile: int,
    gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients by image, text and scale if wanted; image, text [n, D], scale [].

    Gradients are the world size times this rank's share.
    """
    logits_of = _Tiles(image, scale, pairs, tile)
    row = image.new_full((image.shape[0],), -torch.inf)
    own = (image * text).sum(1)
    base = own * logits_of.factor
    d_image = torch.zeros_like(image)

    def log_sums(block: slice, texts: Tensor, bases: Tensor | None, column: Tensor) -> None:
        assert bases is not None
        targets.subtract(d_image, pairs.own, block, texts)
        for rows, columns in tiles(image.shape[0], texts.shape[0], tile):
            logits, scratch = logits_of.fill(rows, columns, block, texts)
            _add_log_sum_exp(row[rows], logits, scratch, 1, base[rows])
            _add_log_sum_exp(column[columns], logits, scratch, 0, bases[columns])

    column = exchange.visit(LOG_SUM_EXP_2, (), base, log_sums)
    sums, pull = row + column, 2 * own
    if pairs.weight is not None:
        weight = pairs.weight[pairs.own].to(image, non_blocking=True)
        sums, pull = sums * weight, pull * weight
        row, column = row - weight.log2(), column - weight.log2()
    share = (math.log(2) * sums + scale * (pull + (image * d_image).sum(1))).sum()
    loss = distributed.all_reduce_sum(share, pairs.group) / (2 * pairs.divisor)
    if not gradients:
        return loss, []

    def probabilities(block: slice, texts: Tensor, known: Tensor | None, d_text: Tensor) -> None:
        assert known is not None
        bases, column = known.unbind(1)
        targets.subtract(d_text, block, pairs.own, image)
        for rows, columns in tiles(image.shape[0], texts.shape[0], tile):
            logits, d_logits = logits_of.fill(rows, columns, block, texts)
            torch.sub(logits, base[rows, None], out=d_logits).sub_(row[rows, None])
            d_logits.exp2_().add_(logits.sub_(bases[columns]).sub_(column[columns]).exp2_())
            d_image[rows].addmm_(d_logits, texts[columns])
            d_text[columns].addmm_(d_logits.T, image[rows])

    d_text = exchange.visit(SUM, (image.shape[1],), torch.stack([base, column], 1), probabilities)
    factor = len(pairs.counts) / (2 * pairs.divisor)
    d_scale = factor * (d_image * image).sum()
    return loss, [d_image.mul_(scale * factor), d_text.mul_(scale * factor), d_scale]
