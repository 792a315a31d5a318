"""SigLIP's pairwise sigmoid loss and its gradients, a tile of logits at a time.

With logits ``x = s I T^t + b`` and weights w that sum to W (all 1: W = M valid pairs), over all that is not
ignored:

    L = sum_ij (w_i + w_j) / 2 (softplus(x_ij) - match_ij x_ij) / W
    dL/dx_ij = (w_i + w_j) / 2 (sigmoid(x_ij) - match_ij) / W

which is -log sigmoid(x) for matches and -log sigmoid(-x) for the others. Nothing is normalised over a row, so
one pass gives both: three products of B x B x D.
"""

import torch
from torch import Tensor

from . import distributed
from .exchange import SUM, Exchange
from .pairs import Pairs, Targets, shifted, tiles


def softplus(logits: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """log(1 + exp(logits)) in ``one``; ``two`` is scratch, all of one shape.

    log1p takes most of the time of torch's own, as it is not vectorised. With ``w = fl(1 + u)`` the rounding
    ``u - (w - 1)`` is exact, and added to ``log w`` it gives log1p(u) to the last digit for u in [0, 1].
    """
    u = torch.abs(logits, out=one).neg_().exp_()
    w = torch.add(u, 1, out=two)
    u.sub_(w.sub_(1))
    u.add_(w.add_(1).log_())
    return u.add_(torch.clamp(logits, min=0, out=two))


def sigmoid_loss(
    image: Tensor,
    scale: Tensor,
    bias: Tensor,
    pairs: Pairs,
    targets: Targets,
    exchange: Exchange,
    tile: int,
    gradients: bool,
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and its gradients by image, text, scale and bias if wanted; image [n, D], scale and bias [].

    Gradients are the world size times this rank's share.
    """
    weight = None if pairs.weight is None else (pairs.weight / 2).to(image, non_blocking=True)
    size = min(tile, image.shape[0]) * min(tile, pairs.total)
    buffers = [image.new_empty(size) for _ in range(3)]
    d_image = torch.zeros_like(image)
    share, d_bias = image.new_zeros(()), image.new_zeros(())

    def matches(block: slice, texts: Tensor, d_text: Tensor) -> None:
        pull = torch.zeros_like(image)
        targets.subtract(pull, pairs.own, block, texts)
        count = image.new_zeros((image.shape[0], 1))
        targets.subtract(count, pairs.own, block, texts.new_ones((texts.shape[0], 1)))
        share.add_(scale * (image * pull).sum() + bias * count.sum())
        d_bias.add_(count.sum())
        d_image.add_(pull)
        targets.subtract(d_text, block, pairs.own, image)

    def work(block: slice, texts: Tensor, _: Tensor | None, d_text: Tensor) -> None:
        matches(block, texts, d_text)
        for rows, columns in tiles(image.shape[0], texts.shape[0], tile):
            shape = (rows.stop - rows.start, columns.stop - columns.start)
            logits, one, two = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            here, there = shifted(rows, pairs.own.start), shifted(columns, block.start)
            torch.addmm(bias, image[rows] * scale, texts[columns].T, out=logits)
            ignored = pairs.ignored(here, there)
            if ignored is not None:
                logits.masked_fill_(ignored, -torch.inf)
            losses = softplus(logits, one, two)
            if weight is not None:
                losses.mul_(torch.add(weight[here, None], weight[there], out=two))
            share.add_(losses.sum())
            if not gradients:
                continue
            d_logits = logits.sigmoid_()
            if weight is not None:
                d_logits.mul_(two)
            d_bias.add_(d_logits.sum())
            d_image[rows].addmm_(d_logits, texts[columns])
            d_text[columns].addmm_(d_logits.T, image[rows])

    d_text = exchange.visit(SUM, (image.shape[1],), None, work)
    loss = distributed.all_reduce_sum(share, pairs.group) / pairs.divisor
    factor = len(pairs.counts) / pairs.divisor
    d_scale = factor * (d_image * image).sum()
    return loss, [d_image.mul_(scale * factor), d_text.mul_(scale * factor), d_scale, d_bias * factor]
