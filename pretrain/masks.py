"""Which patches of an image are kept (FLIP, arXiv 2212.00794): a pure function of the sample.

Masks are hashed from (seed, epoch, source, sample_id, patch), not drawn from a generator, so they are the
same on any number of ranks and micro batches, after a resume, and when a forward is replayed. All arithmetic
is on int64 where the pixels are: no transfer, no wait for the device.
"""

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15


def kept_patches(
    sample_id: Tensor,
    patches: int,
    dropout: float,
    *,
    seed: int = 0,
    epoch: int = 0,
    source: Tensor | None = None,
) -> Tensor:
    """Ascending patch numbers int64 [b, kept] that stay of ``patches`` (as many as open_clip and timm keep:
    the whole part, at least 1) for samples int64 [b] of sources int16 [b]. Every subset of that size is as
    likely as any other."""
    key = _mix(sample_id.long() + _signed(seed * _GOLDEN))
    key = _mix(key + _signed(epoch * _GOLDEN))
    if source is not None:
        key = _mix(key + source.to(key.device, non_blocking=True).long())
    patch = torch.arange(1, patches + 1, device=key.device)
    score = _mix(key[:, None] + patch * _signed(_GOLDEN))
    kept = max(1, int(patches * (1 - dropout)))
    return score.topk(kept, dim=1, sorted=False).indices.sort(dim=1).values


def _mix(z: Tensor) -> Tensor:
    """The finaliser of splitmix64 (Steele, Lea and Flood, 2014) on int64, which wraps as uint64 does."""
    z = (z ^ _shifted(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shifted(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifted right with zeros, where torch would repeat the sign."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    """The int64 with the same 64 bits."""
    return ((value + (1 << 63)) & ((1 << 64) - 1)) - (1 << 63)
