"""Models built from configs: open_clip loads them, mistakes are told, the training root is exact."""

import json
import math
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from diptych.configs.errors import UserError
from diptych.pretrain.manifest import seal
from diptych.pretrain.model import (
    ContrastiveModel,
    ModelConfig,
    build_model,
    clamp_logit_scale,
    open_clip_config,
)
from diptych.pretrain.packing import pad_text

TEXT: dict[str, Any] = {"context_length": 12, "width": 16, "heads": 2, "layers": 2, "vocab_size": 49408}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
    "conv": {"timm_model_name": "test_efficientnet", "image_size": 40},
    "conv with its own head": {
        "timm_model_name": "mobilenetv4_conv_small_035",
        "image_size": 32,
        "timm_proj": "",
    },
}
TOKENS = torch.tensor([49406, 320, 1929, 49407, 49406, 49407], dtype=torch.int32)
LENGTHS = torch.tensor([4, 2], dtype=torch.int32)


def config(vision: str = "vit", **options: Any) -> ModelConfig:
    return ModelConfig(**{"embed_dim": 8, "vision_cfg": VISION[vision], "text_cfg": TEXT, **options})


def write_checkpoint(model: nn.Module, folder: Path) -> Path:
    folder.mkdir(parents=True)
    state = {name: value.contiguous() for name, value in model.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(open_clip_config(model)))
    number = folder.name.removeprefix("step_")
    seal(folder, {"step": int(number) if number.isdigit() else 0}, {})
    return folder


@pytest.mark.parametrize("vision", VISION)
def test_open_clip_loads_the_checkpoint_and_gives_the_same_features(vision: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    ours = build_model(config(vision, image_mean=(0.5, 0.4, 0.3), resize_mode="squash", quick_gelu=True))
    root = ContrastiveModel(ours).eval()
    folder = write_checkpoint(ours, tmp_path / "checkpoint")
    loaded: Any = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs, _, transform = loaded
    theirs.eval()

    size = VISION[vision]["image_size"]
    picture = Image.effect_noise((size, size), 90).convert("RGB")
    pixels = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).view(1, size, size, 3)
    out = root({"image": pixels.permute(0, 3, 1, 2), "token_ids": TOKENS, "seq_lens": LENGTHS})
    image = theirs.encode_image(transform(picture)[None], normalize=True)
    text = theirs.encode_text(pad_text(ours.text, TOKENS, LENGTHS), normalize=True)
    torch.testing.assert_close(out["image_features"], image, atol=1e-5, rtol=0)
    torch.testing.assert_close(out["text_features"], text, atol=1e-5, rtol=0)
    torch.testing.assert_close(out["logit_scale"], theirs.logit_scale.exp())
    assert theirs.visual.preprocess_cfg["mean"] == [0.5, 0.4, 0.3]
    assert theirs.visual.preprocess_cfg["resize_mode"] == "squash"


def test_pixels_are_normalised_as_open_clip_does() -> None:
    root = ContrastiveModel(build_model(config()))
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    mean, std = (
        torch.tensor(t).view(3, 1, 1) for t in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD)
    )
    torch.testing.assert_close(root.pixels(pixels), (pixels / 255 - mean) / std, atol=2e-6, rtol=0)
    assert root.pixels(pixels.float()).equal(pixels.float())
    assert not any("image_mean" in name for name in root.state_dict())


def test_convolutions_run_channels_last_and_transformers_do_not() -> None:
    pixels = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    for vision, expected in (("vit", False), ("conv", True)):
        root = ContrastiveModel(build_model(config(vision)))
        assert root.pixels(pixels).is_contiguous(memory_format=torch.channels_last) == expected


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_initial_temperature_and_bias_are_the_configs(kind: str) -> None:
    siglip: dict[str, Any] = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}
    options: dict[str, Any] = siglip if kind == "siglip" else {}
    root = ContrastiveModel(build_model(config(**options)))
    out = root(
        {"image": torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "token_ids": TOKENS, "seq_lens": LENGTHS}
    )
    assert out["logit_scale"].item() == pytest.approx(1 / 0.07 if kind == "clip" else 10)
    assert ("logit_bias" in out) == (kind == "siglip")
    for name in ("image_features", "text_features"):
        torch.testing.assert_close(out[name].norm(dim=1), torch.ones(2))


@pytest.mark.parametrize(("start", "end"), [(9.0, math.log(100)), (-1.0, 0.0), (2.0, 2.0)])
def test_the_temperature_is_clamped(start: float, end: float) -> None:
    root = ContrastiveModel(build_model(config()))
    nn.init.constant_(root.clip.logit_scale, start)
    clamp_logit_scale(root)
    assert root.clip.logit_scale.item() == pytest.approx(end)


def test_an_arch_by_name_with_keys_of_ones_own() -> None:
    model = build_model(
        ModelConfig(
            arch="ViT-B-32",
            embed_dim=16,
            vision_cfg={"layers": 1, "width": 64, "image_size": 64},
            text_cfg={"layers": 1, "width": 32, "heads": 2, "context_length": 16},
        )
    )
    cfg = open_clip_config(model)["model_cfg"]
    assert cfg["custom_text"] is True
    assert cfg["vision_cfg"]["patch_size"] == 32
    assert model.text.context_length == 16
    assert F.normalize(model.encode_image(torch.zeros(1, 3, 64, 64)), dim=-1).shape == (1, 16)


MISTAKES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "unknown arch": ({"arch": "ViT-B32"}, ["model.arch", "ViT-B32", "did you mean", "ViT-B-32"]),
    "nothing": ({}, ["model", "arch", "embed_dim"]),
    "unknown vision key": (
        {"embed_dim": 8, "vision_cfg": {"patchsize": 16}, "text_cfg": TEXT},
        ["model.vision_cfg.patchsize", "patch_size"],
    ),
    "unknown text key": (
        {"embed_dim": 8, "vision_cfg": VISION["vit"], "text_cfg": {"layer": 2}},
        ["model.text_cfg.layer", "layers"],
    ),
    "unknown timm model": (
        {"embed_dim": 8, "vision_cfg": {"timm_model_name": "resnet5O"}, "text_cfg": TEXT},
        ["timm_model_name", "resnet5O", "resnet50"],
    ),
    "heads": (
        {"embed_dim": 8, "vision_cfg": VISION["vit"], "text_cfg": {**TEXT, "heads": 3}},
        ["model.text_cfg.width", "16", "3"],
    ),
    "head width": (
        {"embed_dim": 8, "vision_cfg": {**VISION["vit"], "head_width": 20}, "text_cfg": TEXT},
        ["model.vision_cfg.width", "32", "20"],
    ),
    "size of a timm transformer": (
        {"embed_dim": 8, "vision_cfg": {"timm_model_name": "test_vit", "image_size": 64}, "text_cfg": TEXT},
        ["model.vision_cfg.image_size", "160", "64"],
    ),
    "a timm head of another width": (
        {
            "embed_dim": 8,
            "vision_cfg": {"timm_model_name": "mobilenetv4_conv_small_035", "image_size": 32},
            "text_cfg": TEXT,
        },
        ["model.vision_cfg.timm_proj", "''"],
    ),
    "a wrong value": (
        {"embed_dim": 8, "vision_cfg": {**VISION["vit"], "pos_embed_type": "round"}, "text_cfg": TEXT},
        ["model", "open_clip cannot build it"],
    ),
    "CoCa": ({"arch": "coca_ViT-B-32"}, ["CoCa"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_config_is_one_sentence_with_the_mend(name: str) -> None:
    options, words = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        build_model(ModelConfig(**options))
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
