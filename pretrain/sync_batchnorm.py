"""Batch normalisation over the global batch, on CPU (gloo) and CUDA (NCCL) alike.

With it a run of several processes has the losses of one process to rounding; torch's own SyncBatchNorm works
on CUDA only. Each process sends its count, mean and sum of squared deviations; they combine by the parallel
formula of Chan, Golub and LeVeque (1979), weighted by the counts, so local batches may be uneven or empty.
Every process then holds bit-identical statistics. The backward needs one more all-reduce, of the two sums per
channel that couple the samples.

Modules keep their parameters, buffers and names, so that checkpoints are those of the plain layers.
"""

import copy
from typing import Any, cast

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

# torch has no public base
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from ..configs.errors import UserError
from . import distributed


def synchronise_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every batch norm in ``module`` by its synchronised form, in place; in one process nothing
    changes.

    Raises UserError for a kind of batch norm that is unknown here.
    """
    if distributed.world_size() == 1:
        return module
    for name, child in module.named_children():
        if isinstance(child, _BatchNorm):
            setattr(module, name, _synchronised(child, name))
        else:
            synchronise_batchnorm(child)
    return module


def _synchronised(norm: _BatchNorm, name: str) -> nn.Module:
    if isinstance(norm, _Synchronised):
        return norm
    kinds = {
        nn.BatchNorm1d: SyncBatchNorm,
        nn.BatchNorm2d: SyncBatchNorm,
        nn.BatchNorm3d: SyncBatchNorm,
        BatchNormAct2d: SyncBatchNormAct,
    }
    if type(norm) not in kinds:
        raise UserError(
            f"the layer {name} ({type(norm).__name__}) cannot be synchronised between processes; "
            "train with one process or choose another tower"
        )
    twin = copy.copy(norm)  # shares parameters, buffers and sub-modules
    twin.__class__ = kinds[type(norm)]
    return twin


class _Synchronised(_BatchNorm):
    """What the synchronised kinds have in common."""

    def normalise(self, x: Tensor) -> Tensor:
        """x [b, C, *] normalised per channel by the statistics of the global batch (running ones in eval
        mode)."""
        if not self.training:
            here = self.running_mean is None  # without running statistics a layer takes those of its input
            return F.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, here, 0.0, self.eps
            )
        y, mean, variance, count = cast(
            tuple[Tensor, Tensor, Tensor, Tensor], _GlobalNorm.apply(x, self.weight, self.bias, self.eps)
        )
        if self.track_running_stats and self.num_batches_tracked is not None:
            assert self.running_mean is not None
            assert self.running_var is not None
            self.num_batches_tracked.add_(1)
            new = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            unbiased = variance * (count / (count - 1).clamp_min(1))
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), new)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), new)
        return y


class SyncBatchNorm(_Synchronised):
    """nn.BatchNorm1d, 2d or 3d over the global batch."""

    def forward(self, input: Tensor) -> Tensor:
        """[b, C, *] -> [b, C, *]."""
        return self.normalise(input)


class SyncBatchNormAct(_Synchronised):
    """timm's BatchNormAct2d (norm, dropout, activation) over the global batch."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        """[b, C, H, W] -> [b, C, H, W]."""
        return self.act(self.drop(self.normalise(input)))


class _GlobalNorm(torch.autograd.Function):
    """y = (x - mean) / sqrt(variance + eps) * weight + bias; also the statistics [C] and the count, not
    differentiable."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        channels = x.shape[1]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        local = x.new_zeros((2, channels), dtype=dtype)
        if x.numel():
            local = torch.stack(_moments(x)).to(dtype)
        count = local.new_full((1, channels), x.numel() // channels)
        counts, means, variances = distributed.stack(torch.cat([count, local])).unbind(1)  # each [W, C]
        total = counts.sum(0)
        mean = (means * counts).sum(0) / total
        variance = ((variances + (means - mean).square()) * counts).sum(0) / total
        cast_to = [None if t is None else t.to(dtype) for t in (weight, bias)]
        y = F.batch_norm(x, mean, variance, *cast_to, training=False, eps=eps)
        ctx.save_for_backward(x, weight, mean, variance, total)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, total)
        return y, mean, variance, total

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]  torch's own is less exact
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        """With xhat = (x - mean) / std: dx = weight / std * (dy - mean(dy) - xhat * mean(dy * xhat))."""
        x, weight, mean, variance, total = ctx.saved_tensors
        dy = grads[0]
        d_weight = d_bias = torch.zeros_like(mean)
        if x.numel():  # sums of dy xhat and of dy, per channel, without a temporary of the size of x
            _, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                dy, x, torch.ones_like(mean), mean, variance, None, None, False, ctx.eps, [False, True, True]
            )
        over_ranks = distributed.all_reduce_sum(torch.stack([d_weight, d_bias])) / total
        inverse_std = (variance + ctx.eps).rsqrt()
        a = inverse_std if weight is None else inverse_std * weight
        b = -a * inverse_std * over_ranks[0]
        c = -a * over_ranks[1] - b * mean
        a, b, c = (t.to(dy.dtype).view(1, -1, *[1] * (x.ndim - 2)) for t in (a, b, c))
        dx = (dy * a).addcmul_(x, b).add_(c)
        if weight is None:
            return dx, None, None, None
        return dx, d_weight.to(weight.dtype), d_bias.to(weight.dtype), None


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance per channel, each [C], in two passes (no cancellation)."""
    if x.is_cuda:
        variance, mean = torch.var_mean(x.float(), [0, *range(2, x.ndim)], correction=0)
        return mean, variance
    mean, variance = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
    return mean, variance
