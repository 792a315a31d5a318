"""timm's ViTs run lean, other image towers as they are, against open_clip's own forward in fp64."""

from typing import Any

import pytest
import timm
import torch
from open_clip.timm_model import TimmModel
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from diptych.pretrain import lean_timm
from diptych.pretrain.lean_timm import LeanTimmBlock, lean_last_block
from diptych.pretrain.lean_vision import encode_image, patch_size, takes_side
from diptych.pretrain.model import ModelConfig, build_model, takes_size

SMALL: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2}
TRUNKS: dict[str, dict[str, Any]] = {
    "token": {},
    "token, registers, layer scale": {"reg_tokens": 2, "init_values": 0.1, "no_embed_class": True},
    "token, norms of queries and keys": {"qk_norm": True, "pre_norm": True, "qkv_bias": False},
    "no positions": {"pos_embed": "none"},
    "avg": {"global_pool": "avg", "class_token": False},
    "max": {"global_pool": "max"},
    "map": {"global_pool": "map", "class_token": False},
    "any side": {"dynamic_img_size": True},
}


def build_tower(**options: Any) -> TimmModel:
    """open_clip's adapter around a trunk that no name of timm's spells."""
    torch.manual_seed(0)
    tower = TimmModel("test_vit", 12, image_size=160, pool="", proj="linear")
    trunk = VisionTransformer(num_classes=0, **{**SMALL, **options})
    tower.trunk = trunk
    tower.head = nn.Sequential(nn.Linear(32, 12))
    for parameter in tower.parameters():
        nn.init.normal_(parameter, std=0.3)
    lean_last_block(trunk)
    return tower.double()


def gradients(tower: nn.Module, features: Tensor) -> dict[str, Tensor]:
    tower.zero_grad()
    (
        features * torch.linspace(-1, 1, features.numel(), dtype=features.dtype).view_as(features)
    ).sum().backward()
    return {name: p.grad.clone() for name, p in tower.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", TRUNKS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_lean_trunk_equals_timms_in_features_and_gradients(name: str, checkpointing: bool) -> None:
    tower = build_tower(**TRUNKS[name])
    image = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    truth = tower(image)
    tower.set_grad_checkpointing(checkpointing)
    features = encode_image(tower, image)
    assert lean_timm.supports(tower.trunk) is None
    torch.testing.assert_close(features, truth, atol=1e-12, rtol=1e-12)
    expected, found = gradients(tower, truth), gradients(tower, features)
    assert expected.keys() == found.keys()
    for parameter, value in expected.items():
        worst = (found[parameter] - value).abs().max() / value.abs().max().clamp_min(1)
        assert worst <= 1e-12, (parameter, worst)


@pytest.mark.parametrize("name", TRUNKS)
def test_only_the_token_pool_cuts_the_last_block(name: str) -> None:
    tower = build_tower(**TRUNKS[name])
    cut = isinstance(tower.trunk.blocks[-1], LeanTimmBlock)
    assert cut == (tower.trunk.global_pool == "token")
    rows: list[tuple[int, ...]] = []
    tower.trunk.blocks[-1].mlp.register_forward_pre_hook(lambda _, args: rows.append(tuple(args[0].shape)))
    encode_image(tower, torch.randn(2, 3, 32, 32, dtype=torch.float64))
    assert (rows[0][1] == 1) == cut


@pytest.mark.parametrize("name", ["token", "token, registers, layer scale", "avg", "map"])
def test_patches_dropped_before_the_embedding_equal_patches_dropped_after(name: str) -> None:
    tower = build_tower(**TRUNKS[name])
    kept = torch.tensor([[0, 3, 15], [1, 2, 4]])
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    features = encode_image(tower, image, kept)

    class Drop(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            prefix = x.shape[1] - 16
            return torch.cat([x[:, :prefix], x[:, prefix:][torch.arange(2)[:, None], kept]], dim=1)

    tower.trunk.patch_drop = Drop()
    torch.testing.assert_close(features, tower(image), atol=1e-12, rtol=0)


@pytest.mark.parametrize("name", ["token", "token, registers, layer scale", "avg", "map"])
@pytest.mark.parametrize("side", [24, 48])
def test_another_side_equals_a_trunk_whose_positions_were_resized(name: str, side: int) -> None:
    tower, other = build_tower(**TRUNKS[name]), build_tower(**TRUNKS[name], img_size=side)
    state = tower.state_dict()
    prefix = other.trunk.pos_embed.shape[1] - (side // 8) ** 2
    state["trunk.pos_embed"] = resample_abs_pos_embed(
        tower.trunk.pos_embed.detach(), [side // 8] * 2, [4, 4], num_prefix_tokens=prefix
    )
    other.load_state_dict(state)
    image = torch.randn(2, 3, side, side, dtype=torch.float64)
    # timm resizes in fp32
    torch.testing.assert_close(encode_image(tower, image), other(image), atol=1e-5, rtol=0)
    assert takes_side(tower, side) is None


TEXT: dict[str, Any] = {"context_length": 8, "width": 16, "heads": 2, "layers": 1, "vocab_size": 64}
OTHERS: dict[str, tuple[dict[str, Any], int, int, bool]] = {
    # config, native side, another side, whether that is taken
    "a ResNet of timm": ({"timm_model_name": "test_resnet", "image_size": 32}, 32, 48, True),
    "a ConvNeXt of timm": ({"timm_model_name": "test_convnext", "image_size": 32}, 32, 64, True),
    "open_clip's ResNet": ({"layers": (1, 1, 1, 1), "width": 16, "image_size": 64}, 64, 96, False),
    "a ViT of timm": ({"timm_model_name": "test_vit", "image_size": 160}, 160, 96, True),
    "rotary positions": (
        {
            "timm_model_name": "test_eva" if timm.is_model("test_eva") else "eva02_tiny_patch14_224",
            "image_size": 224,
        },
        224,
        112,
        False,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_image_tower_equals_open_clips_and_says_which_sides_it_takes(name: str) -> None:
    vision, native, side, taken = OTHERS[name]
    torch.manual_seed(0)
    clip = build_model(ModelConfig(embed_dim=8, vision_cfg=vision, text_cfg=TEXT)).double()
    lean_last_block(getattr(clip.visual, "trunk", nn.Identity()))
    modes = [m.training for m in clip.modules()]
    assert takes_size(clip, native) is None
    reason = takes_size(clip, side)
    assert (reason is None) == taken, reason
    assert taken or str(side) in str(reason)
    assert modes == [m.training for m in clip.modules()]
    assert all(not p.is_meta for p in clip.parameters())
    clip.eval()
    image = torch.randn(2, 3, native, native, dtype=torch.float64)
    torch.testing.assert_close(encode_image(clip.visual, image), clip.visual(image), atol=1e-12, rtol=1e-12)
    if taken:
        assert encode_image(clip.visual, torch.randn(2, 3, side, side, dtype=torch.float64)).shape == (2, 8)
    assert (patch_size(clip.visual) is not None) == (name == "a ViT of timm")
