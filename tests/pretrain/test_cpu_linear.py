"""Linear layers through oneDNN against torch's own."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from timm.layers.mlp import Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from diptych.pretrain import cpu_linear
from diptych.pretrain.cpu_linear import OneDnnLinear, OneDnnMlp, gelu_linear, linear, quick_linears


def results(function: Any, shape: Sequence[int], dtype: torch.dtype, *, bias: bool) -> list[Tensor]:
    """Output and gradients."""
    torch.manual_seed(0)
    x = torch.randn(*shape, 24, dtype=dtype, requires_grad=True)
    weight = torch.randn(40, 24, dtype=dtype, requires_grad=True)
    given = [x, weight, torch.randn(40, dtype=dtype, requires_grad=True) if bias else None]
    y = function(*given)
    direction = torch.randn(y.shape, dtype=dtype)
    return [y, *torch.autograd.grad(y, [t for t in given if t is not None], direction)]


def after_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.gelu(x), weight, bias)


@pytest.fixture(params=["amd", "intel"])
def vendor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to multiply, on whatever machine this is."""
    # its inside is what is tested
    if request.param == "amd" and cpu_linear._onednn is None:  # pyright: ignore[reportPrivateUsage]
        pytest.skip("this torch has no oneDNN product")
    monkeypatch.setattr(cpu_linear, "_onednn_pays", lambda: request.param == "amd")
    return request.param


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 1, 4), (0,)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("ours", "theirs"), [(linear, F.linear), (gelu_linear, after_gelu)])
@pytest.mark.usefixtures("vendor")
def test_outputs_and_gradients_equal_torchs(
    ours: Any, theirs: Any, shape: tuple[int, ...], bias: bool
) -> None:
    truth = results(theirs, shape, torch.float64, bias=bias)
    for dtype, tolerance in ((torch.float64, 0.0), (torch.float32, 2e-5)):
        reference = results(theirs, shape, dtype, bias=bias)
        for found, plain, exact in zip(results(ours, shape, dtype, bias=bias), reference, truth, strict=True):
            assert found.shape == exact.shape
            assert found.dtype == dtype
            assert found.is_contiguous()
            torch.testing.assert_close(found, plain, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("ours", "theirs"), [(linear, F.linear), (gelu_linear, after_gelu)])
@pytest.mark.parametrize("frozen", [0, 1, 2])
@pytest.mark.usefixtures("vendor")
def test_what_is_frozen_gets_no_gradient_and_the_rest_its_own(ours: Any, theirs: Any, frozen: int) -> None:
    given = [torch.randn(4, 8), torch.randn(3, 8), torch.randn(3)]
    for i, tensor in enumerate(given):
        tensor.requires_grad_(i != frozen)
    wanted = [tensor for i, tensor in enumerate(given) if i != frozen]
    direction = torch.randn(4, 3)
    found = torch.autograd.grad(ours(*given), wanted, direction)
    for got, truth in zip(found, torch.autograd.grad(theirs(*given), wanted, direction), strict=True):
        torch.testing.assert_close(got, truth)


def saved_bytes(module: nn.Module, x: Tensor) -> int:
    """Bytes of distinct tensors that the backward of a forward keeps, parameters left out."""
    own = {p.data_ptr() for p in module.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        module(x)
    return sum(size for pointer, size in kept.items() if pointer not in own)


def mlp(kind: str, **options: Any) -> nn.Module:
    if kind == "timm":
        return Mlp(8, 32, **options)
    return nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_an_mlp_keeps_only_its_input_and_what_enters_the_gelu(kind: str) -> None:
    torch.manual_seed(0)
    layers, x = mlp(kind), torch.randn(6, 8, requires_grad=True)
    truth = torch.autograd.grad(layers(x).square().sum(), [x, *layers.parameters()])
    before, names = saved_bytes(layers, x), list(layers.state_dict())
    quick_linears(layers)
    assert list(layers.state_dict()) == names
    assert before == 4 * 6 * (8 + 32 + 32)
    assert saved_bytes(layers, x) == 4 * 6 * (8 + 32)
    found = torch.autograd.grad(layers(x).square().sum(), [x, *layers.parameters()])
    for got, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("kind", ["timm", "open_clip"])
def test_a_layer_that_is_looked_at_is_called(kind: str) -> None:
    layers, seen = mlp(kind), list[tuple[int, ...]]()
    quick_linears(layers)
    last = [m for m in layers.modules() if isinstance(m, OneDnnLinear)][-1]
    last.register_forward_pre_hook(lambda module, given: seen.append(given[0].shape))
    layers(torch.randn(6, 8))
    assert seen == [(6, 32)]


@pytest.mark.parametrize("options", [{"drop": 0.5}, {"norm_layer": nn.LayerNorm}, {"act_layer": nn.SiLU}])
def test_timms_other_mlps_run_as_they_are(options: dict[str, Any]) -> None:
    layers, x = mlp("timm", **options), torch.randn(6, 8)
    torch.manual_seed(1)
    truth = layers(x)
    quick_linears(layers)
    assert isinstance(layers, OneDnnMlp)
    torch.manual_seed(1)
    torch.testing.assert_close(layers(x), truth)


def test_layers_keep_their_parameters_and_half_precision_runs_as_ever() -> None:
    attention = nn.MultiheadAttention(8, 2)
    layers = nn.Sequential(nn.Linear(8, 4), attention.out_proj)
    names = list(layers.state_dict())
    x = torch.randn(3, 8)
    truth = layers[0](x)
    quick_linears(layers)
    assert [type(layer) for layer in layers] == [OneDnnLinear] * 2
    assert list(layers.state_dict()) == names
    torch.testing.assert_close(layers[0](x), truth)
    with torch.autocast("cpu", torch.bfloat16):
        assert layers[0](x).dtype == torch.bfloat16


def test_intels_processors_and_a_torch_without_onednn_run_torchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_linear, "_onednn", None)
    cpu_linear._onednn_pays.cache_clear()  # pyright: ignore[reportPrivateUsage]  its inside is what is tested
    x, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert linear(x, weight, None).equal(F.linear(x, weight))
    assert gelu_linear(x, weight, None).equal(after_gelu(x, weight, None))
    cpu_linear._onednn_pays.cache_clear()  # pyright: ignore[reportPrivateUsage]  its inside is what is tested
