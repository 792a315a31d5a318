"""fp32 losses beside fp64: how many digits are left of a small loss at a scale of 100."""

from collections.abc import Callable

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn import functional as F

from diptych.pretrain.contrastive import contrastive_loss

N, D = 700, 64


def errors(loss: Callable[..., Tensor], scale: float, noise: float) -> list[float]:
    """Relative errors of the loss and of its gradients by image, text and scale, of fp32 against fp64."""
    generator = torch.Generator().manual_seed(0)
    image, other = (torch.randn(N, D, generator=generator, dtype=torch.float64) for _ in range(2))
    image = F.normalize(image, dim=1)
    text = F.normalize(image + noise * other, dim=1)

    def run(function: Callable[..., Tensor], dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (image, text, torch.tensor(scale))]
        value = function(*leaves)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    pairs = zip(run(loss, torch.float32), run(ClipLoss(), torch.float64), strict=True)
    return [float((found.double() - true).norm() / true.norm()) for found, true in pairs]


@pytest.mark.parametrize(("scale", "noise"), [(14.3, 0.3), (100.0, 0.15), (100.0, 0.2)])
@pytest.mark.parametrize("tile", [100, 1024])
def test_fp32_gradients_are_as_close_to_fp64_as_open_clips(scale: float, noise: float, tile: int) -> None:
    ours = errors(lambda *inputs: contrastive_loss(*inputs, tile=tile), scale, noise)
    theirs = errors(ClipLoss(), scale, noise)
    assert ours[0] < 5e-4
    for mine, other in zip(ours[1:], theirs[1:], strict=True):
        assert mine < 1.5 * other + 1e-7
