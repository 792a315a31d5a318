"""AdamW with open_clip's decay groups, fused, or Muon and AdamW; rates per tower and per layer.

The fused kernel updates the same values as torch's plain loop, 7 to 9 times faster on a CPU.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from ..configs.load import StrictModel
from .distributed import all_reduce_sum, is_sharded, local
from .layer_decay import layer_scales
from .muon import Muon, hidden_matrices

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimConfig(StrictModel):
    """Optimizer settings; the defaults are open_clip's for ViT towers, with gradient clipping on."""

    name: Literal["adamw", "muon"] = "adamw"
    """``muon`` updates the matrices inside the blocks by Muon and everything else by AdamW, with one rate and
    one decay for both (Jordan et al., 2024; arXiv 2502.16982). Language models need fewer steps with it; for
    contrastive training there is no published comparison."""
    lr: float = Field(default=5e-4, gt=0)
    """Peak learning rate."""
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: float = Field(default=1e-6, gt=0)
    weight_decay: float = Field(default=0.2, ge=0)
    """Decoupled decay of weight matrices; biases, norms, scales and other vectors are not decayed."""
    image_lr_scale: float = Field(default=1.0, ge=0)
    """Factor on the rate of the image tower, for instance 0.1 when it starts from pretrained weights."""
    text_lr_scale: float = Field(default=1.0, ge=0)
    """Factor on the rate of the text tower."""
    image_layer_decay: float = Field(default=1.0, gt=0, le=1)
    """Factor on the rate from each layer of the image tower to the one before it, for instance 0.75 when it
    starts from pretrained weights (arXiv 2106.08254); 1 for one rate."""
    text_layer_decay: float = Field(default=1.0, gt=0, le=1)
    """The same for the text tower."""
    muon_momentum: float = Field(default=0.95, ge=0, lt=1)
    """Only for ``muon``: momentum of its matrices (Nesterov's form)."""
    muon_lr_scale: float = Field(default=1.0, ge=0)
    """Only for ``muon``: factor on the rate of its matrices."""
    clip_grad_norm: float | None = Field(default=1.0, gt=0)
    """Largest global gradient norm, or null."""
    ema_decay: float | None = Field(default=None, gt=0, lt=1)
    """Decay of the exponential moving average of the weights that evaluation and export use, or null for
    none."""


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: matrices yes; vectors, biases, norms and logit_scale no (open_clip's
    rule)."""
    return parameter.ndim >= 2 and not any(word in name for word in ("bn", "ln", "bias", "logit_scale"))


def build_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """The optimizer over the trainable parameters, in groups of one rate, decay and method.

    Each group carries ``lr_scale`` and ``group_name`` (tower, decay or not, and where it applies layer scale
    and method); ``set_lr`` multiplies by the first. Towers are found by their names (``visual``, ``text``),
    under any wrapper. Raises UserError where layer-wise decay does not know a tower's layers.
    """
    stacked = hidden_matrices(model) if config.name == "muon" else {}
    layers = _layer_scales(model, config)
    groups: dict[str, dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        assert parameter.is_contiguous(), (
            f"{name}: the fused update reads weight, gradient and state in one order"
        )
        tower, decay, layer = _tower(name), decays(name, parameter), layers.get(name, 1.0)
        scale = {"image": config.image_lr_scale, "text": config.text_lr_scale, "shared": 1.0}[tower] * layer
        key = f"{tower}/{'decay' if decay else 'no_decay'}"
        key += "" if layer == 1 else f"/{layer:.6g}"
        extra: dict[str, Any] = {}
        if name in stacked:
            extra = {"stacked": stacked[name]}
            scale *= config.muon_lr_scale
            key += f"/muon_{stacked[name]}"
        group = groups.setdefault(
            key,
            {
                "group_name": key,
                "params": [],
                "lr_scale": scale,
                "lr": config.lr * scale,
                "weight_decay": config.weight_decay if decay else 0.0,
                **extra,
            },
        )
        group["params"].append(parameter)
    if config.name == "muon":
        return Muon(
            groups.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            momentum=config.muon_momentum,
        )
    return torch.optim.AdamW(groups.values(), lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def _tower(name: str) -> Literal["image", "text", "shared"]:
    parts = name.split(".")
    return "image" if "visual" in parts else "text" if "text" in parts else "shared"


def _layer_scales(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Factor of layer-wise decay on each parameter that it concerns."""
    scales: dict[str, float] = {}
    for prefix, module in model.named_modules():
        decay = {"visual": config.image_layer_decay, "text": config.text_layer_decay}.get(
            prefix.rpartition(".")[2], 1.0
        )
        if decay != 1:
            scales |= {f"{prefix}.{name}": scale for name, scale in layer_scales(module, decay).items()}
    return scales


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set every group's rate to ``lr`` times its ``lr_scale``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)


def clip_gradients(parameters: Iterable[Tensor], max_norm: float | None) -> Tensor:
    """Global gradient norm (a scalar on the device, no host sync), clipped to ``max_norm`` if that is
    given. With sharded parameters all processes call it and get the same norm."""
    owners = [p for p in parameters if p.grad is not None]
    grads = [p.grad for p in owners if p.grad is not None]
    parts = [local(g) for g in grads]
    if any(is_sharded(g) for g in grads):
        shares = [part for part, g in zip(parts, grads, strict=True) if is_sharded(g)]
        rest = [g for g in grads if not is_sharded(g)]
        square = all_reduce_sum(get_total_norm(shares).square())
        norm = (square + get_total_norm(rest).to(square).square()).sqrt()
    else:
        norm = get_total_norm(parts)
    if max_norm is not None and parts:
        torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage] # one kernel
            parts, (max_norm / (norm + 1e-6)).clamp(max=1.0)
        )
    return norm
