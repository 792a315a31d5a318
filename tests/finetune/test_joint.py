"""The joint head: it starts as the image tower, is saved with its shape, and refuses other towers."""

from typing import Any

import pytest
import torch
from torch import nn

from diptych.configs.errors import UserError
from diptych.data.text import tokenizer_for
from diptych.finetune.config import HeadConfig
from diptych.finetune.encoders.tokens import image_inputs, text_inputs
from diptych.finetune.fusion.joint import Joint, check_joint, start_joint
from diptych.finetune.fusion.operators import build_head
from diptych.pretrain.config import ModelConfig
from diptych.pretrain.model import LoadedModel, build_model, open_clip_config

TEXT = {"context_length": 12, "width": 20, "heads": 2, "layers": 1}
VIT = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 24}


def loaded(vision: dict[str, Any], **options: Any) -> LoadedModel:
    torch.manual_seed(0)
    clip = build_model(ModelConfig(embed_dim=24, vision_cfg=vision, text_cfg=TEXT, **options))
    for parameter in clip.parameters():  # norms and layer scales that are not one
        parameter.data += 0.05 * torch.randn_like(parameter)
    return LoadedModel(clip, tokenizer_for(open_clip_config(clip)["model_cfg"]["text_cfg"], None))


def joint(model: LoadedModel, outputs: int = 24, **options: Any) -> Joint:
    head = build_head(HeadConfig(op="joint", **options), {"image": 24, "text": 24}, outputs)
    assert isinstance(head, Joint)
    start_joint(nn.ModuleList([head]), model)
    return head.eval()


def features(model: LoadedModel, n: int = 5) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    pixels = torch.randint(0, 256, (n, 3, 24, 24), dtype=torch.uint8)
    captions = [" ".join(["red"] * (1 + i)) for i in range(n)]
    words, mask = text_inputs(model, captions), model.text_tokens(captions)[1]
    assert words.shape == (n, mask.shape[1], 20)
    return {"image_inputs": image_inputs(model, pixels), "text_inputs": words, "text_mask": mask}, pixels


@pytest.mark.parametrize("more", [{}, {"ls_init_value": 0.5}, {"mlp_ratio": 2.0}])
@pytest.mark.parametrize("quick", [False, True])
def test_without_words_it_starts_as_the_image_tower(more: dict[str, Any], quick: bool) -> None:
    model = loaded(VIT | more, **({"quick_gelu": True} if quick else {}))
    head, (given, pixels) = joint(model), features(model)
    assert int(head.shape[-1]) == int(quick)
    visual: Any = model.clip.visual
    with torch.no_grad():
        head.classify.weight.copy_(visual.proj.T)
        head.classify.bias.zero_()
        present = {"image": torch.ones(5, dtype=torch.bool), "text": torch.zeros(5, dtype=torch.bool)}
        got = head(given, present)
        torch.testing.assert_close(got, visual(model.model.pixels(pixels)), atol=1e-5, rtol=1e-5)
        words = head(given, present | {"text": present["image"]})
    assert (words - got).abs().max() > 1e-3


def test_a_state_dict_brings_its_own_layers() -> None:
    model = loaded(VIT)
    head, (given, _) = joint(model, 1, layers=2), features(model)
    assert len(head.blocks) == 2
    again = build_head(HeadConfig(op="joint", layers=2), {"image": 24, "text": 24}, 1).eval()
    nn.ModuleDict({"inner": again}).load_state_dict(nn.ModuleDict({"inner": head}).state_dict())
    present = {k: torch.ones(5, dtype=torch.bool) for k in ("image", "text")}
    assert torch.equal(again(given, present), head(given, present))


def test_pretrained_blocks_learn_slowly_unless_told_otherwise() -> None:
    assert HeadConfig(op="joint").adapt == {"lr": 1e-4}
    assert HeadConfig(op="joint", adapt={"lr": 1e-3, "epochs": 2}).adapt == {"lr": 1e-3, "epochs": 2}


def test_other_towers_are_refused() -> None:
    model = loaded({"timm_model_name": "resnet10t", "timm_proj": "linear", "image_size": 32})
    with pytest.raises(UserError, match=r"open_clip's own ViT .* these towers are TimmModel and TextTrans"):
        check_joint(model)
    check_joint(LoadedModel(loaded(VIT).clip, model.tokenizer))
