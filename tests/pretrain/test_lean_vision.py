"""The lean ViT against open_clip's own, in fp64."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.model import resize_pos_embed
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from diptych.pretrain.blocks import lean
from diptych.pretrain.lean_vision import embed_patches, encode_image, takes_side

TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norm after pooling": {"final_ln_after_pool": True},
    "layer scale, no first norm": {"ls_init_value": 0.1, "no_ln_pre": True},
    "sine positions": {"pos_embed_type": "sin_cos_2d"},
    "mean of patches": {"pool_type": "avg"},
    "attention pooling": {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4},
    "custom blocks": {"qk_norm": True, "scale_heads": True, "scale_attn_inner": True, "scale_fc": True},
    "pixels left over": {"image_size": 36},
    "patches that are not square": {"patch_size": (8, 16)},
}


def build_tower(**options: Any) -> VisionTransformer:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "image_size": 32,
        "patch_size": 8,
        "width": 32,
        "layers": 3,
        "heads": 2,
        "mlp_ratio": 4.0,
        "output_dim": 12,
    }
    tower = VisionTransformer(**{**defaults, **options}).double()
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3)
    return lean(tower)


def gradients(tower: nn.Module, features: Tensor) -> dict[str, Tensor]:
    tower.zero_grad()
    direction = torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    (features * direction).sum().backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TOWERS)
def test_the_lean_tower_equals_open_clips_in_features_and_gradients(name: str) -> None:
    tower = build_tower(**TOWERS[name])
    size = TOWERS[name].get("image_size", 32)
    image = torch.randn(5, 3, size, size, dtype=torch.float64)
    truth, features = tower(image), encode_image(tower, image)
    torch.testing.assert_close(features, truth, atol=1e-12, rtol=1e-12)
    expected, found = gradients(tower, truth), gradients(tower, features)
    assert expected.keys() == found.keys()
    for parameter, value in expected.items():
        worst = (found[parameter] - value).abs().max() / value.abs().max().clamp_min(1)
        assert worst <= 1e-12, (parameter, worst)


def test_patches_as_a_matrix_product_equal_the_convolution() -> None:
    tower = build_tower()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    truth = tower._embeds(image)  # pyright: ignore[reportPrivateUsage]  open_clip has no public one
    torch.testing.assert_close(embed_patches(tower, image), truth, atol=1e-13, rtol=0)


def kept_by(tower: Any, count: int, kept: Tensor) -> Tensor:
    """The tower's own features of images of which it sees some patches: the dropping layer put in place."""

    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            first = x.shape[1] - count
            rows = torch.arange(len(x))[:, None]
            return torch.cat([x[:, :first], x[:, first:][rows, kept]], dim=1)

    name = "patch_drop" if hasattr(tower, "trunk") else "patch_dropout"
    setattr(getattr(tower, "trunk", tower), name, Drop())
    return tower(torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))


KEPT = torch.tensor([[0, 3, 15], [1, 2, 4], [13, 14, 15]])


@pytest.mark.parametrize("name", ["plain", "mean of patches", "attention pooling"])
def test_dropped_patches_are_left_out_as_if_dropped_after_the_embedding(name: str) -> None:
    tower = build_tower(**TOWERS[name])
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    features = encode_image(tower, image, KEPT)
    torch.testing.assert_close(features, kept_by(tower, 16, KEPT), atol=1e-12, rtol=0)


@pytest.mark.parametrize("side", [24, 48])
def test_another_side_equals_a_tower_whose_positions_were_resized(side: int) -> None:
    tower, other = build_tower(), build_tower(image_size=side)
    state, before = tower.state_dict(), tower.positional_embedding
    positions = {"visual.positional_embedding": tower.positional_embedding.detach().clone()}
    # a stand-in
    resize_pos_embed(positions, SimpleNamespace(visual=other))  # pyright: ignore[reportArgumentType]
    state["positional_embedding"] = positions["visual.positional_embedding"]
    other.load_state_dict(state)
    image = torch.randn(2, 3, side, side, dtype=torch.float64)
    features = encode_image(tower, image)
    torch.testing.assert_close(features, other(image), atol=1e-12, rtol=0)
    features.sum().backward()
    assert tower.positional_embedding is before
    assert before.grad is not None
    assert before.grad.shape == before.shape
    assert before.grad[1:].abs().min() > 0
    assert takes_side(tower, side) is None
    assert "patches" in str(takes_side(tower, 7))


def test_other_towers_run_as_they_are() -> None:
    tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    image = torch.randn(2, 3, 2, 2)
    assert encode_image(tower, image).equal(tower(image))
