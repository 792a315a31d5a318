"""Contrastive losses over the global batch, computed a tile of logits at a time.

``contrastive_loss`` gives CLIP's symmetric InfoNCE (Radford et al., 2021, arXiv 2103.00020; in infonce.py) or
SigLIP's pairwise sigmoid loss (Zhai et al., 2023, arXiv 2303.15343; in sigmoid.py). Neither ever holds the
[B, B] logits, so that memory is O(B D) where a dense loss needs O(B^2). The gradients by the features are
worked out together with the loss; the backward pass only scales them.

Across ranks every process takes its local images against all texts (exchange.py). Only the texts travel, the
column sums are combined by their owners, and the gradient of a text comes home as one sum.

Everything runs in fp32 (fp64 for fp64 inputs), inside autocast too, and every exponential has its maximum
taken off first, so that a scale of 100 does not overflow.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..configs.load import StrictModel
from . import distributed
from .exchange import ExchangeName, open_exchange
from .infonce import infonce
from .pairs import Duplicates, gather_pairs, targets
from .sigmoid import sigmoid_loss

_NO_SMOOTHING = "label_smoothing: siglip has no distribution over candidates to smooth; set it to 0"


class LossConfig(StrictModel):
    """Which contrastive loss, and how it is computed; the fields are keywords of ``contrastive_loss``."""

    kind: Literal["clip", "siglip"] = "clip"
    duplicates: Duplicates = "ignore"
    """``negatives``: as open_clip. ``positives``: all pairs with one caption are matches (the target is
    uniform over them). ``ignore``: pairs that are not a row's own but carry its caption are left out of the
    sums."""
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    """Share of the target that goes evenly to all candidates of a row that are not ignored; ``clip`` only."""
    exchange: ExchangeName = "gather"
    """How texts meet the images of other processes. ``gather``: every process holds all texts. ``ring``: the
    texts go round, two blocks at a time, while the tiles are computed; memory depends on the local batch
    alone. The result is the same."""
    tile: int = Field(default=1024, ge=1)
    """Side of the square tiles of logits, in samples; memory beyond the features is about 3 tile^2 floats."""

    @model_validator(mode="after")
    def _smoothing_needs_a_softmax(self) -> "LossConfig":
        if self.kind == "siglip" and self.label_smoothing:
            raise ValueError(_NO_SMOOTHING)
        return self


def contrastive_loss(
    image_features: Tensor,
    text_features: Tensor,
    logit_scale: Tensor,
    *,
    logit_bias: Tensor | None = None,
    valid: Tensor | None = None,
    caption_hash: Tensor | None = None,
    weight: Tensor | None = None,
    kind: Literal["clip", "siglip"] = "clip",
    duplicates: Duplicates = "negatives",
    label_smoothing: float = 0.0,
    exchange: ExchangeName = "gather",
    group: distributed.Group = None,
    tile: int = 1024,
) -> Tensor:
    """Contrastive loss of the global batch: the same value on every rank, differentiable by its local inputs.

    image_features, text_features: [b, D] of this rank's pairs, normalised; b may differ between ranks and be
    0. logit_scale, logit_bias: one-element tensors, the scale already exponentiated. ``siglip`` needs the
    bias; ``clip`` does not depend on it and gives it a zero gradient (so DDP finds no unused parameter).

    These three lie best on the CPU, where they are needed; on a GPU the step waits for them. valid: bool [b];
    the others are left out on both axes. caption_hash: int64 [b], needed unless ``duplicates`` is
    ``negatives``. weight: floats [b], not negative; all ranks give it or none does. The loss is the mean over
    valid pairs of a pair's loss as an image and as a text, weighted so: sum of weight x loss over sum of
    weights, over all ranks; 0 with zero gradients where that sum is 0. A pair of weight 0 is still a negative
    of the others. (``siglip``: the loss of image i and text j counts (w_i + w_j) / 2.)

    label_smoothing: see ``LossConfig``; as in torch's cross_entropy where nothing is ignored.

    Gradients are the world size times this rank's share of the global gradient: DDP's average over the ranks
    is then exactly what one process with the whole batch would get, for the towers and for ``logit_scale``.
    """
    dtype = torch.float64 if image_features.dtype == torch.float64 else torch.float32
    with torch.autocast(image_features.device.type, enabled=False):
        image, text = image_features.to(dtype), text_features.to(dtype)
        caption_hash = None if caption_hash is None else caption_hash.cpu()
        weight = None if weight is None else weight.cpu()
        if valid is not None and not bool(valid.all()):
            kept = valid.cpu().nonzero().squeeze(1)
            rows = kept.to(image.device, non_blocking=True)
            image, text = image[rows], text[rows]
            caption_hash = None if caption_hash is None else caption_hash[kept]
            weight = None if weight is None else weight[kept]
        pairs = gather_pairs(
            image.shape[0], caption_hash, weight, duplicates=duplicates, device=image.device, group=group
        )
        aims = targets(pairs, label_smoothing, uniform=kind == "clip", like=image)
        inputs = [image, text, logit_scale.to(dtype).reshape(())]
        if kind == "siglip":
            assert logit_bias is not None, "siglip needs a logit_bias: set model.init_logit_bias"
            assert not label_smoothing, _NO_SMOOTHING
            inputs.append(logit_bias.to(dtype).reshape(()))
        gradients = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)

        def compute(image: Tensor, text: Tensor, *scalars: Tensor) -> tuple[Tensor, list[Tensor]]:
            texts = open_exchange(exchange, text, pairs)
            if kind == "siglip":
                return sigmoid_loss(image, scalars[0], scalars[1], pairs, aims, texts, tile, gradients)
            return infonce(image, text, scalars[0], pairs, aims, texts, tile, gradients)

        loss = _WithGradients.apply(compute, *inputs)
        assert isinstance(loss, Tensor)
        return loss if logit_bias is None or kind == "siglip" else loss + 0.0 * logit_bias.sum()


class _WithGradients(torch.autograd.Function):
    """A value that is computed together with its gradients by ``inputs``."""

    @staticmethod
    def forward(ctx: Any, compute: Callable[..., tuple[Tensor, list[Tensor]]], *inputs: Tensor) -> Tensor:
        value, gradients = compute(*inputs)
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch's own is less exact
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        return None, *(gradient * grad_outputs[0] for gradient in ctx.saved_tensors)
