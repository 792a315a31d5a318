"""LoRA against W + scale * B A written out in fp64, for every kind of tower, through the lean blocks too."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from open_clip.timm_model import TimmModel
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.func import functional_call

from diptych.configs.errors import UserError
from diptych.finetune.adapt.lora import LowRank, add_lora, lora_weights, merge_lora
from diptych.finetune.runs.saved import write_encoder
from diptych.pretrain.lean_timm import lean_last_block
from diptych.pretrain.lean_vision import encode_image
from diptych.pretrain.model import ContrastiveModel, LoadedModel, ModelConfig, build_model, load_model
from diptych.pretrain.packing import encode_text

from .labelled import squares

VISION: dict[str, Any] = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 60, "width": 24, "heads": 2, "layers": 2}
TIMM: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
TOWERS: dict[str, tuple[dict[str, Any], str]] = {
    "open_clip vision": (VISION, "visual"),
    "open_clip attention of its own": (VISION | {"block_type": "custom", "qk_norm": True}, "visual"),
    "open_clip text": (VISION, "text"),
    "timm": ({"global_pool": "avg", "class_token": False}, "timm"),
    "timm, class token alone": ({}, "timm"),
    "timm, attention pooling": ({"global_pool": "map", "class_token": False}, "timm"),
}
Encode = Callable[[nn.Module], Tensor]


def tower_of(name: str, dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Encode]:
    """A tower with its lean blocks in place, and how it encodes a fixed batch."""
    options, kind = TOWERS[name]
    torch.manual_seed(0)
    image = torch.randn(3, 3, 32, 32, dtype=torch.float64).to(dtype)
    if kind == "timm":  # open_clip's adapter around a trunk that no name of timm's spells
        tower = TimmModel("test_vit", 12, image_size=160, pool="", proj="linear")
        tower.trunk = VisionTransformer(num_classes=0, **{**TIMM, **options})
        tower.head = nn.Sequential(nn.Linear(32, 12))
        lean_last_block(tower.trunk)
        return fill(tower, dtype), lambda tower: encode_image(tower, image)
    clip = build_model(ModelConfig(embed_dim=12, vision_cfg=options, text_cfg=TEXT))
    ContrastiveModel(clip)
    if kind == "visual":
        return fill(clip.visual, dtype), lambda tower: encode_image(tower, image)
    ids = torch.randint(1, 58, (14,), dtype=torch.int32)
    ids[[4, 8, 13]] = 59
    lengths = torch.tensor([5, 4, 5], dtype=torch.int32)
    # as good as one here
    return fill(clip.text, dtype), lambda tower: encode_text(tower, ids, lengths)  # type: ignore[arg-type]


def fill(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Random weights, the same in every precision."""
    for parameter in module.parameters():
        parameter.data = (0.2 * torch.randn(parameter.shape, dtype=torch.float64)).to(dtype)
    return module.to(dtype).eval()


def factors(tower: nn.Module) -> dict[str, LowRank]:
    """The factors by the name of the weight that they adapt."""
    return {
        re.sub(r"parametrizations\.(\w+)\.0$", r"\1", path): module
        for path, module in tower.named_modules()
        if isinstance(module, LowRank)
    }


def written_out(plain: nn.Module, factors: dict[str, LowRank], scale: float) -> dict[str, Tensor]:
    """W + scale * B A of every adapted weight, block of rows by block of rows."""
    weights: dict[str, Tensor] = {}
    for name, own in factors.items():
        rows = [scale * (b @ a) for a, b in zip(own.A, own.B, strict=True)]
        weights[name] = plain.get_parameter(name) + torch.cat(rows)
    return weights


@pytest.mark.parametrize("targets", ["attention", "all"])
@pytest.mark.parametrize("name", TOWERS)
def test_features_and_gradients_are_those_of_the_weights_written_out(name: str, targets: Any) -> None:
    tower, encode = tower_of(name)
    plain, before = copy.deepcopy(tower), encode(tower).detach()
    names = list(tower.state_dict())
    assert add_lora(tower, targets, rank=3, alpha=7.5) == len(factors(tower)) > 0
    assert torch.equal(encode(tower), before)  # B is zero
    encode(tower).square().sum().backward()
    for path, parameter in tower.named_parameters():
        trained = path.endswith((".A", ".B"))
        assert parameter.requires_grad == trained, path
        assert (parameter.grad is not None) == trained, path
    found = factors(tower)
    for own in found.values():
        nn.init.normal_(own.B, std=0.3)
    tower.zero_grad()
    features = encode(tower)
    features.square().sum().backward()
    by_tower = {n: (own.A.grad, own.B.grad) for n, own in found.items()}
    tower.zero_grad(set_to_none=True)
    truth = encode_with(plain, written_out(plain, found, 7.5 / 3), encode)
    truth.square().sum().backward()
    torch.testing.assert_close(features, truth, atol=1e-12, rtol=1e-12)
    assert (features - before).abs().max() > 0.01
    for weight, own in found.items():
        for given, parameter in zip(by_tower[weight], (own.A, own.B), strict=True):
            torch.testing.assert_close(given, parameter.grad, atol=1e-9, rtol=1e-9)
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 0, weight
    merge_lora(tower)
    difference = float((encode(tower) - features).abs().max().detach())
    print(f"{name}, {targets}: {difference:.1e} between before and after the merge")
    assert difference < 1e-12
    assert sorted(tower.state_dict()) == sorted(names)
    assert not factors(tower)


class Encoder(nn.Module):
    """A tower whose forward is the lean one, so that functional_call reaches it."""

    def __init__(self, tower: nn.Module, encode: Encode) -> None:
        super().__init__()
        self.tower, self.encode = tower, encode

    def forward(self) -> Tensor:
        return self.encode(self.tower)


def encode_with(plain: nn.Module, weights: dict[str, Tensor], encode: Encode) -> Tensor:
    named = {f"tower.{name}": weight for name, weight in weights.items()}
    return functional_call(Encoder(plain, encode), named, ())


def test_fp32_gradients_through_onednn_are_those_of_fp64() -> None:
    def gradients(dtype: torch.dtype) -> list[Tensor]:
        tower, encode = tower_of("open_clip vision", dtype)
        torch.manual_seed(1)
        add_lora(tower, "all", rank=2, alpha=2)
        torch.manual_seed(2)
        for own in factors(tower).values():
            fill(own, dtype)
        encode(tower).square().sum().backward()
        return [p.grad for own in factors(tower).values() for p in own.parameters() if p.grad is not None]

    exact, fp32 = gradients(torch.float64), gradients(torch.float32)
    assert len(exact) == len(fp32) == 2 * 8
    for a, b in zip(exact, fp32, strict=True):
        assert (a - b).abs().max() < 2e-5 * a.abs().max()


def names_of(tower: nn.Module, targets: Any) -> dict[str, int]:
    paths = {module: path for path, module in tower.named_modules()}
    return {f"{paths[m]}.{name}": parts for m, name, parts in lora_weights(tower, targets)}


def test_attention_means_queries_keys_values_and_output_of_every_kind_of_tower() -> None:
    block = {"attn.in_proj_weight": 3, "attn.out_proj.weight": 1}
    mlp = {"mlp.c_fc.weight": 1, "mlp.c_proj.weight": 1}
    for name in ("open_clip vision", "open_clip attention of its own", "open_clip text"):
        tower = tower_of(name)[0]
        prefix = [f"transformer.resblocks.{i}" for i in range(2)]
        assert names_of(tower, "attention") == {f"{p}.{k}": n for p in prefix for k, n in block.items()}
        more = {f"{p}.{k}": n for p in prefix for k, n in mlp.items()}
        assert {k: n for k, n in names_of(tower, "all").items() if "mlp" in k} == more
    timm = names_of(tower_of("timm, attention pooling")[0], "attention")
    pool = {"q.weight": 1, "kv.weight": 2, "proj.weight": 1}
    blocks = {
        f"trunk.blocks.{i}.attn.{k}": n for i in range(2) for k, n in (("qkv.weight", 3), ("proj.weight", 1))
    }
    assert timm == blocks | {f"trunk.attn_pool.{k}": n for k, n in pool.items()}


def test_bert_is_adapted_in_its_attention() -> None:
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    tower = transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes), add_pooling_layer=False)
    attention = [f"self.{k}" for k in ("query", "key", "value")] + ["output.dense"]
    expected = {f"encoder.layer.0.attention.{k}.weight": 1 for k in attention}
    assert names_of(tower, "attention") == expected
    assert names_of(tower, "all").keys() - expected.keys() == {
        "encoder.layer.0.intermediate.dense.weight",
        "encoder.layer.0.output.dense.weight",
    }


def test_a_tower_without_attention_is_refused() -> None:
    config = ModelConfig(
        embed_dim=12, vision_cfg={"timm_model_name": "test_efficientnet", "image_size": 32}, text_cfg=TEXT
    )
    tower = build_model(config).visual
    with pytest.raises(UserError, match=r"lora finds no attention in TimmModel; set method: norm_bias or"):
        add_lora(tower, "attention", rank=2, alpha=2)


def test_a_merged_model_is_a_plain_checkpoint_for_open_clip(tmp_path: Path) -> None:
    model = load_model(squares.make_checkpoint(tmp_path / "checkpoint"))
    for tower in (model.clip.visual, model.clip.text):
        add_lora(tower, "all", rank=2, alpha=8)
        for own in factors(tower).values():
            nn.init.normal_(own.B, std=0.3)
    images = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    texts = ["red square", "blue square"]
    before = features_of(model, images, texts)
    merge_lora(model.clip)
    after = features_of(model, images, texts)
    difference = max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True))
    print(f"{difference:.1e} between the features before and after the merge, fp32")
    assert difference < 1e-6
    (tmp_path / "merged").mkdir()
    write_encoder(model, tmp_path / "merged")
    plain: Any = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'merged'}")[0]
    for name, value in model.clip.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value)
    again = features_of(load_model(tmp_path / "merged"), images, texts)
    assert all(torch.equal(a, b) for a, b in zip(after, again, strict=True))


def features_of(model: LoadedModel, images: Tensor, texts: list[str]) -> tuple[Tensor, Tensor]:
    return model.encode_images(images), model.encode_captions(texts)
