"""fp32 linear layers on a CPU: through oneDNN on AMD's processors, and GELU without its output kept.

torch gives fp32 products to MKL, which on AMD's processors leaves part of the machine idle: on the layers of
ViT-S/16 and ViT-B/32 (EPYC, AVX-512, one thread) oneDNN runs the forward and the gradient by the input 5 to
18 % faster. The gradient by the weight, whose sum runs over the tokens, stays with MKL. On Intel's (Xeon,
AVX-512) MKL is as fast forward and up to 2.5 times faster backward, so all stays with it. Same sums in
another order; fp64, half precision and other devices run as ever.
"""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

_onednn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def _onednn_pays() -> bool:
    """Whether this is one of AMD's processors and torch has oneDNN."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return False
    return amd and _onednn is not None and torch.backends.mkldnn.is_available()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear``: x [.., in], weight [out, in], bias [out] -> [.., out]."""
    if torch.compiler.is_compiling() or not _onednn_pays() or not _suits(x, weight):
        return F.linear(x, weight, bias)
    y = _Linear.apply(x, weight, bias)
    assert isinstance(y, Tensor)
    return y


def _suits(x: Tensor, weight: Tensor) -> bool:
    plain = type(weight) in (Tensor, nn.Parameter) and x.device.type == weight.device.type == "cpu"
    fp32 = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and fp32 and x.numel() > 0


def gelu_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear(F.gelu(x), weight, bias)``: x [.., in] -> [.., out].

    gelu(x) is not kept but computed again for the gradient by the weight, which saves the widest of a block's
    activations: ViT-S/16's step is 1 % faster for it, as less fresh memory is touched.
    """
    if torch.compiler.is_compiling() or not _suits(x, weight):
        return F.linear(F.gelu(x), weight, bias)
    y = _GeluLinear.apply(x, weight, bias)
    assert isinstance(y, Tensor)
    return y


Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _forward(x, weight, bias)

    @staticmethod
    @once_differentiable
    # torch's own is less exact
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        d_x = _by_input(grads[0], weight) if ctx.needs_input_grad[0] else None
        return d_x, *_by_parameters(ctx, grads[0], x)


class _GeluLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.biased = bias is not None
        return _forward(F.gelu(x), weight, bias)

    @staticmethod
    @once_differentiable
    # torch's own is less exact
    def backward(ctx: Any, *grads: Tensor) -> Gradients:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = ctx.saved_tensors
        by_parameters = _by_parameters(ctx, grads[0], F.gelu(x) if ctx.needs_input_grad[1] else x)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = _by_input(grads[0], weight)
            torch.ops.aten.gelu_backward.grad_input(d_x, x, grad_input=d_x)
        return d_x, *by_parameters


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _onednn(x, weight, bias, "none", [], "") if _onednn_pays() else F.linear(x, weight, bias)


def _by_input(d_y: Tensor, weight: Tensor) -> Tensor:
    return _onednn(d_y, weight.t(), None, "none", [], "") if _onednn_pays() else d_y @ weight


def _by_parameters(ctx: Any, d_y: Tensor, x: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of weight and bias, where they are wanted."""
    rows = d_y.flatten(0, -2)
    d_weight = rows.t() @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None
    return d_weight, rows.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None


class OneDnnLinear(nn.Linear):
    """nn.Linear by ``linear``; same parameters and names."""

    def forward(self, input: Tensor) -> Tensor:
        """[.., in] -> [.., out]."""
        return linear(input, self.weight, self.bias)


class OneDnnSequential(nn.Sequential):
    """nn.Sequential, as open_clip's MLP is one, that runs a GELU and the linear layer after it as
    ``gelu_linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """As ever."""
        layers = [*self]
        while layers:
            layer = layers.pop(0)
            after = layers[0] if layers else None
            if isinstance(after, OneDnnLinear) and _joins(layer, after):
                input = gelu_linear(input, after.weight, after.bias)
                layers.pop(0)
            else:
                input = layer(input)
        return input


class OneDnnMlp(Mlp):
    """timm's MLP, the same way."""

    def forward(self, x: Tensor) -> Tensor:
        """As ever."""
        between = isinstance(self.norm, nn.Identity) and (self.drop1.p == 0 or not self.training)
        if not between or not isinstance(self.fc2, OneDnnLinear) or not _joins(self.act, self.fc2):
            return super().forward(x)
        return self.drop2(gelu_linear(self.fc1(x), self.fc2.weight, self.fc2.bias))


def _joins(gelu: nn.Module, layer: OneDnnLinear) -> bool:
    """Whether both are torch's plain ones, and nobody looks at what passes between them."""
    exact = type(gelu) is nn.GELU and gelu.approximate == "none" and type(layer) is OneDnnLinear
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return exact and not any(getattr(module, name) for module in (gelu, layer) for name in hooks)


_QUICK: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: OneDnnLinear,
    NonDynamicallyQuantizableLinear: OneDnnLinear,
    nn.Sequential: OneDnnSequential,
    Mlp: OneDnnMlp,
}


def quick_linears(module: nn.Module) -> None:
    """Give every nn.Linear in ``module``, and what holds one after a GELU, the classes above, in place."""
    for layer in module.modules():
        kind = type(layer)
        if kind is not nn.Sequential or any(isinstance(child, nn.GELU) for child in layer.children()):
            layer.__class__ = _QUICK.get(kind, kind)
