"""Tiled losses against dense ones and open_clip's, in one process; several ranks are in tests/distributed."""

from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from diptych.pretrain.contrastive import contrastive_loss

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


def dense_clip(image: Tensor, text: Tensor, scale: Tensor, same: Tensor, duplicates: str) -> Tensor:
    """InfoNCE written down naively; ``same`` [n, n] marks pairs with one caption."""
    logits = scale * image @ text.T
    own = torch.eye(len(image), dtype=torch.bool)
    target = own if duplicates != "positives" else same
    if duplicates == "ignore":
        logits = logits.masked_fill(same & ~own, -torch.inf)
    total = torch.zeros((), dtype=logits.dtype)
    for matrix in (logits, logits.T):
        log_probability = matrix.log_softmax(1)
        for i in range(len(image)):
            total = total - log_probability[i][target[i]].mean()
    return total / (2 * len(image))


def dense_siglip(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, same: Tensor, duplicates: str
) -> Tensor:
    logits = scale * image @ text.T + bias
    own = torch.eye(len(image), dtype=torch.bool)
    match = same if duplicates == "positives" else own
    loss = -F.logsigmoid(torch.where(match, logits, -logits))
    if duplicates == "ignore":
        loss = loss.masked_fill(same & ~own, 0)
    return loss.sum() / len(image)


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
