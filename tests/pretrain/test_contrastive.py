"""Tiled losses against dense ones and open_clip's, in one process; several ranks are in tests/distributed."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.pretrain.contrastive import LossConfig, contrastive_loss
from diptych.pretrain.sigmoid import softplus

N, D = 37, 8


def batch(
    seed: int = 0, n: int = N, scale: float = 20.0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    image, text = (
        F.normalize(torch.randn(n, D, generator=generator, dtype=torch.float64), dim=-1)
        .to(dtype)
        .requires_grad_()
        for _ in range(2)
    )
    return image, text, torch.tensor(scale, dtype=dtype, requires_grad=True)


def hashes(n: int = N) -> Tensor:
    """Captions of which some occur two, three or many times."""
    return torch.arange(n) * (torch.arange(n) % 3 > 0) + 10**12


def dense_clip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    same: Tensor,
    duplicates: str,
    weight: Tensor | None = None,
    smoothing: float = 0.0,
) -> Tensor:
    """InfoNCE written down naively; ``same`` [n, n] marks pairs with one caption."""
    logits = scale * image @ text.T
    own = torch.eye(len(image), dtype=torch.bool)
    target = own if duplicates != "positives" else same
    candidates = ~(same & ~own) if duplicates == "ignore" else torch.ones_like(own)
    weight = torch.ones(len(image), dtype=logits.dtype) if weight is None else weight
    total = torch.zeros((), dtype=logits.dtype)
    for matrix in (logits, logits.T):
        log_probability = matrix.masked_fill(~candidates, -torch.inf).log_softmax(1)
        for i in range(len(image)):
            hard = log_probability[i][target[i]].mean()
            even = log_probability[i][candidates[i]].mean()
            total = total - weight[i] * ((1 - smoothing) * hard + smoothing * even)
    return total / (2 * weight.sum())


def dense_siglip(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    same: Tensor,
    duplicates: str,
    weight: Tensor | None = None,
) -> Tensor:
    logits = scale * image @ text.T + bias
    own = torch.eye(len(image), dtype=torch.bool)
    match = same if duplicates == "positives" else own
    loss = -F.logsigmoid(torch.where(match, logits, -logits))
    if duplicates == "ignore":
        loss = loss.masked_fill(same & ~own, 0)
    weight = torch.ones(len(image), dtype=logits.dtype) if weight is None else weight
    return (loss * (weight[:, None] + weight) / 2).sum() / weight.sum()


def check(found: Tensor, truth: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-12) -> None:
    torch.testing.assert_close(found, truth, atol=tolerance, rtol=0)
    got, expected = torch.autograd.grad(found, inputs), torch.autograd.grad(truth, inputs)
    for g, e in zip(got, expected, strict=True):
        torch.testing.assert_close(g, e, atol=tolerance, rtol=0)


@pytest.mark.parametrize("tile", [1, 7, 36, 37, 1024])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_clip_loss_equals_open_clips(tile: int, scale: float) -> None:
    inputs = batch(scale=scale)
    check(contrastive_loss(*inputs, tile=tile), ClipLoss()(*inputs), inputs)


@pytest.mark.parametrize("tile", [5, 1024])
def test_siglip_loss_equals_open_clips(tile: int) -> None:
    inputs = (*batch(), torch.tensor(-3.0, dtype=torch.float64, requires_grad=True))
    found = contrastive_loss(*inputs[:3], logit_bias=inputs[3], kind="siglip", tile=tile)
    check(found, SigLipLoss()(*inputs), inputs)


@pytest.mark.parametrize("tile", [5, 1024])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignore"])
def test_duplicate_captions_and_invalid_rows_equal_the_dense_loss(
    kind: Any, duplicates: Any, tile: int
) -> None:
    inputs = (*batch(1), torch.tensor(-3.0, dtype=torch.float64, requires_grad=True))
    image, text, scale, bias = inputs
    caption = hashes()
    valid = torch.arange(N) % 5 != 2
    found = contrastive_loss(
        image,
        text,
        scale,
        logit_bias=bias,
        valid=valid,
        caption_hash=caption,
        kind=kind,
        duplicates=duplicates,
        tile=tile,
    )
    same = (caption[:, None] == caption[None])[valid][:, valid]
    if kind == "clip":
        truth = dense_clip(image[valid], text[valid], scale, same, duplicates) + 0 * bias
    else:
        truth = dense_siglip(image[valid], text[valid], scale, bias, same, duplicates)
    check(found, truth, inputs)


@settings(max_examples=30, deadline=None)
@given(
    n=st.integers(1, 12),
    captions=st.lists(st.integers(0, 5), min_size=12, max_size=12),
    weights=st.none() | st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=12, max_size=12),
    valid=st.lists(st.booleans(), min_size=12, max_size=12),
    smoothing=st.sampled_from([0.0, 0.1, 0.9]),
    scale=st.sampled_from([0.5, 10.0, 100.0]),
    duplicates=st.sampled_from(["negatives", "positives", "ignore"]),
    kind=st.sampled_from(["clip", "siglip"]),
    tile=st.sampled_from([1, 3, 64]),
)
def test_every_combination_of_options_equals_the_dense_loss(
    n: int,
    captions: list[int],
    weights: list[float] | None,
    valid: list[bool],
    smoothing: float,
    scale: float,
    duplicates: Any,
    kind: Any,
    tile: int,
) -> None:
    inputs = (*batch(n, n, scale), torch.tensor(-3.0, dtype=torch.float64, requires_grad=True))
    image, text, factor, bias = inputs
    caption, kept = torch.tensor(captions[:n]), torch.tensor(valid[:n])
    weight = None if weights is None else torch.tensor(weights[:n], dtype=torch.float64)
    found = contrastive_loss(
        image,
        text,
        factor,
        logit_bias=bias,
        valid=kept,
        caption_hash=caption,
        weight=weight,
        kind=kind,
        duplicates=duplicates,
        label_smoothing=smoothing if kind == "clip" else 0.0,
        tile=tile,
    )
    weight = None if weight is None else weight[kept]
    same = (caption[:, None] == caption)[kept][:, kept]
    if not kept.any() or (weight is not None and weight.sum() == 0):
        truth = sum(0 * t.sum() for t in inputs)
    elif kind == "clip":
        truth = dense_clip(image[kept], text[kept], factor, same, duplicates, weight, smoothing) + 0 * bias
    else:
        truth = dense_siglip(image[kept], text[kept], factor, bias, same, duplicates, weight)
    assert isinstance(truth, Tensor)
    check(found, truth, inputs, 1e-11)


@pytest.mark.parametrize("smoothing", [0.1, 0.5])
def test_label_smoothing_is_torchs_on_both_axes(smoothing: float) -> None:
    inputs = batch(6)
    image, text, scale = inputs
    logits, label = scale * image @ text.T, torch.arange(N)
    both = [F.cross_entropy(matrix, label, label_smoothing=smoothing) for matrix in (logits, logits.T)]
    check(contrastive_loss(*inputs, label_smoothing=smoothing, tile=8), (both[0] + both[1]) / 2, inputs)


def test_siglip_has_no_label_smoothing() -> None:
    with pytest.raises(ValueError, match="siglip has no distribution"):
        LossConfig(kind="siglip", label_smoothing=0.1)


def test_the_config_names_keywords_of_the_loss() -> None:
    inputs = batch(7)
    found = contrastive_loss(*inputs, caption_hash=torch.arange(N), **LossConfig().model_dump())
    check(found, ClipLoss()(*inputs), inputs)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pairs_of_equal_weight_give_the_plain_loss(kind: Any) -> None:
    inputs = (*batch(8), torch.tensor(-3.0, dtype=torch.float64, requires_grad=True))
    found, plain = (
        contrastive_loss(*inputs[:3], logit_bias=inputs[3], weight=weight, kind=kind, tile=16)
        for weight in (torch.full((N,), 0.25), None)
    )
    check(found, plain, inputs)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_weights_of_zero_give_zero_and_zero_gradients(kind: Any) -> None:
    inputs = (*batch(), torch.tensor(-3.0, dtype=torch.float64, requires_grad=True))
    loss = contrastive_loss(*inputs[:3], logit_bias=inputs[3], weight=torch.zeros(N), kind=kind)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, inputs))


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_loss_is_the_same_where_no_gradient_is_asked_for(kind: Any) -> None:
    inputs = batch(9)
    options: dict[str, Any] = {"logit_bias": torch.tensor(-3.0).double(), "kind": kind, "tile": 9}
    with torch.no_grad():
        alone = contrastive_loss(*inputs, **options)
    assert not alone.requires_grad
    assert alone.equal(contrastive_loss(*inputs, **options))


def test_the_sigmoid_loss_keeps_its_digits_where_negatives_hardly_count() -> None:
    logits = torch.linspace(-80, 80, 10001)
    found = softplus(logits, torch.empty_like(logits), torch.empty_like(logits))
    truth = F.softplus(logits.double(), threshold=1000)
    torch.testing.assert_close(found.double(), truth, rtol=3e-7, atol=0)


@pytest.mark.parametrize("duplicates", ["positives", "ignore"])
def test_without_duplicates_every_mode_is_the_plain_loss(duplicates: Any) -> None:
    inputs = batch(2)
    found = contrastive_loss(*inputs, caption_hash=torch.arange(N), duplicates=duplicates)
    check(found, ClipLoss()(*inputs), inputs)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignore"])
def test_gradients_agree_with_finite_differences(kind: Any, duplicates: Any) -> None:
    image, text, scale = batch(3, n=7, scale=3.0)
    bias = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)

    def loss(i: Tensor, t: Tensor, s: Tensor, b: Tensor) -> Tensor:
        caption = torch.tensor([1, 2, 1, 3, 1, 2, 4])
        options: dict[str, Any] = {"kind": kind, "duplicates": duplicates, "caption_hash": caption, "tile": 3}
        return contrastive_loss(i, t, s, logit_bias=b, **options)

    assert torch.autograd.gradcheck(loss, (image, text, scale, bias))


def test_no_valid_row_gives_zero_and_zero_gradients() -> None:
    inputs = batch()
    loss = contrastive_loss(*inputs, valid=torch.zeros(N, dtype=torch.bool))
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, inputs))


def test_the_gradient_flows_only_into_valid_rows() -> None:
    inputs = batch()
    valid = torch.arange(N) % 2 == 0
    image_gradient, text_gradient, _ = torch.autograd.grad(contrastive_loss(*inputs, valid=valid), inputs)
    for gradient in (image_gradient, text_gradient):
        assert gradient[valid].any(1).all()
        assert not gradient[~valid].any()


def test_a_scale_of_100_on_opposite_features_does_not_overflow() -> None:
    image, _, _ = batch(dtype=torch.float32)
    loss = contrastive_loss(image, -image.detach(), torch.tensor(100.0))
    assert loss.isfinite()
    assert torch.autograd.grad(loss, image)[0].isfinite().all()


def test_inside_autocast_the_loss_is_computed_in_fp32() -> None:
    inputs = batch(4, dtype=torch.float32)
    truth = contrastive_loss(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        loss = contrastive_loss(*inputs)
        gradient = torch.autograd.grad(loss, inputs)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, truth, atol=0, rtol=0)
    for found, expected in zip(gradient, torch.autograd.grad(truth, inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=0, rtol=0)


def test_half_precision_features_get_gradients_of_their_own_dtype() -> None:
    image, text, scale = batch(5, dtype=torch.bfloat16)
    loss = contrastive_loss(image, text, scale.detach().float())
    assert loss.dtype == torch.float32
    assert torch.autograd.grad(loss, image)[0].dtype == torch.bfloat16


class LargestTensor(TorchDispatchMode):
    """Largest tensor that any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return out


@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignore"])
def test_no_tensor_of_the_size_of_the_logits_is_made_or_kept(kind: Any, duplicates: Any) -> None:
    n, tile = 1000, 100
    image, text, scale = batch(n=n, dtype=torch.float32)
    kept: list[int] = []

    def pack(value: Tensor) -> Tensor:
        kept.append(value.numel())
        return value

    with LargestTensor() as largest, torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        loss = contrastive_loss(
            image,
            text,
            scale,
            logit_bias=torch.tensor(-1.0),
            caption_hash=hashes(n),
            kind=kind,
            duplicates=duplicates,
            tile=tile,
        )
        loss.backward()
    assert largest.elements <= max(tile * tile, n * D)
    assert sum(kept) <= 4 * n * D  # the features and their log-sum-exps
