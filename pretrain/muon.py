"""Muon for the matrices inside the blocks, AdamW for everything else, as one optimizer.

A hidden weight matrix is updated by its momentum with all singular values brought near one, which a few
Newton-Schulz steps do without a decomposition (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon).
Embeddings, patch embedding, projections into the joint space, vectors and scalars keep AdamW, as there. The
update is scaled to the root mean square that AdamW's has, 0.2, so that one learning rate and one weight decay
serve both (Liu et al., 2025, arXiv 2502.16982, section 2.2). Query, key and value weights that are stored as
one tensor are three matrices.

An update costs 20 a^2 b + 10 a^3 operations per matrix [a, b], a <= b, whatever the batch: little beside a
batch of thousands, felt beside one of dozens. Every process works out the whole update. Where parameters are
sharded, each matrix is gathered for it, so that the numbers are those of one process.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed
from .units import units

__all__ = ["Muon", "hidden_matrices", "orthogonal"]

_A, _B, _C = 3.4445, -4.7750, 2.0315  # steepest at zero: Jordan's coefficients
_STEPS = 5
_RMS = 0.2


def orthogonal(matrices: Tensor) -> Tensor:
    """Matrices [n, a, b] with singular values between about 0.7 and 1.2 and the singular vectors of the
    argument; zeros stay zeros.

    In bfloat16 on CUDA, which is precise enough for it, and in the argument's dtype on a CPU.
    """
    x = matrices.bfloat16() if matrices.is_cuda and matrices.dtype == torch.float32 else matrices
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(_STEPS):
        gram = x @ x.mT
        x = _A * x + (_B * gram + _C * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def hidden_matrices(model: nn.Module) -> dict[str, int]:
    """Names of the parameters that Muon updates, each with the number of equal matrices stacked in it.

    Weights of linear layers, attention projections and convolutions (flattened to [out, in * kernel]) in the
    blocks; no embeddings, no tables, no depthwise or grouped convolutions, whose rows share no input.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, int] = {}
    for module in (inner for block in units(model) for inner in block.modules()):
        # torch has no public base
        grouped = isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1  # pyright: ignore[reportPrivateUsage]
        if grouped or isinstance(module, nn.Embedding):
            continue
        for own, parameter in module.named_parameters(recurse=False):
            if own.endswith("weight") and parameter.ndim >= 2:
                name = names[id(parameter)]
                fused = own == "in_proj_weight" or name.endswith("qkv.weight")
                found[name] = 3 if fused and parameter.shape[0] % 3 == 0 else 1
    return found


class Muon(torch.optim.AdamW):
    """AdamW, but for groups with a ``stacked`` entry, which are Muon's: the number of matrices stacked along
    the first dimension of each of their parameters.

    State of such a parameter: ``momentum_buffer``, of its shape.
    """

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
    ) -> None:
        super().__init__(list(groups), lr=lr, betas=betas, eps=eps, fused=True)
        self.momentum = momentum
        # the scaler must skip the whole step on an overflow, not leave it to AdamW's kernel
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Called by ``load_state_dict``; AdamW's looks for its own entries in every state."""
        ours = {p: entry for p, entry in state["state"].items() if "momentum_buffer" in entry}
        rest = {p: entry for p, entry in state["state"].items() if p not in ours}
        super().__setstate__({**state, "state": defaultdict(dict, rest)})
        self.state.update(ours)

    @torch.no_grad()
    # torch's own is less exact
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """One update of all parameters that have a gradient; of none where the attribute ``found_inf``, a
        float [] on the device, is 1, as torch's fused optimizers have it."""
        assert closure is None
        every = self.param_groups
        self.param_groups = [group for group in every if "stacked" not in group]
        try:
            super().step()
        finally:
            self.param_groups = every
        for group in every:
            if "stacked" in group:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        gradient, buffer = parameter.grad, state["momentum_buffer"]
        assert gradient is not None
        skip: Tensor | None = getattr(self, "found_inf", None)
        if skip is not None:  # a momentum moved towards itself stays
            own = distributed.local(gradient)
            own.copy_(torch.where(skip == 0, own, distributed.local(buffer)))
        buffer.lerp_(gradient, 1 - self.momentum)
        ahead = distributed.whole(gradient.lerp(buffer, self.momentum))  # Nesterov's
        matrices = ahead.reshape(group["stacked"], ahead.shape[0] // group["stacked"], -1)
        scale = _RMS * max(matrices.shape[1:]) ** 0.5
        update = distributed.like(parameter, orthogonal(matrices).reshape(ahead.shape))
        own = distributed.local(parameter)
        if skip is None:
            own.mul_(1 - group["lr"] * group["weight_decay"])
            own.add_(distributed.local(update), alpha=-group["lr"] * scale)
        else:
            rate = group["lr"] * (1 - skip)
            own.mul_(1 - rate * group["weight_decay"])
            own.addcmul_(distributed.local(update), (-rate * scale).to(own.dtype))
