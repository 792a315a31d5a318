"""The lean ViT against open_clip's own, in fp64."""

from typing import Any

import pytest
import torch
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from diptych.pretrain.lean_vision import embed_patches, encode_image

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
    return tower


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
    truth = tower._embeds(image)  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(embed_patches(tower, image), truth, atol=1e-13, rtol=0)


def test_patch_dropout_draws_what_open_clip_draws() -> None:
    tower = build_tower(patch_dropout=0.5).train()
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    torch.manual_seed(7)
    truth = tower(image)
    torch.manual_seed(7)
    torch.testing.assert_close(encode_image(tower, image), truth, atol=1e-12, rtol=0)


def test_other_towers_run_as_they_are() -> None:
    tower = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    image = torch.randn(2, 3, 2, 2)
    assert encode_image(tower, image).equal(tower(image))
