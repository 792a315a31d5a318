"""The whole training step against open_clip's: padded text, dense loss, plain AdamW, in fp64."""

import math
from typing import Any

import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor

from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model, clamp_logit_scale
from diptych.pretrain.optim import OptimConfig, build_optimizer, set_lr
from diptych.pretrain.packing import pad_text

STEPS, BATCH, CONTEXT = 5, 10, 12
TEXT: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32},
    "conv": {"timm_model_name": "test_efficientnet", "image_size": 32},
}


def batch(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    lengths = torch.randint(2, CONTEXT + 1, (BATCH,), generator=generator)
    captions = [torch.randint(1, 58, (int(n),), generator=generator) for n in lengths]
    for caption in captions:
        caption[-1] = 59
    image = torch.randint(0, 256, (BATCH, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return {"image": image, "token_ids": torch.cat(captions).int(), "seq_lens": lengths.int()}


def build(vision: str) -> ContrastiveModel:
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=16, vision_cfg=VISION[vision], text_cfg=TEXT)
    return ContrastiveModel(build_model(config).double())


def our_parameters(vision: str) -> dict[str, Tensor]:
    model = build(vision)
    optimizer = build_optimizer(model, OptimConfig(lr=1e-2, eps=1e-3))
    for step in range(STEPS):
        set_lr(optimizer, 1e-2 / (1 + step))
        optimizer.zero_grad()
        contrastive_loss(**model(batch(step)), tile=4).backward()
        optimizer.step()
        clamp_logit_scale(model)
    return dict(model.clip.state_dict())


def open_clips_parameters(vision: str) -> dict[str, Tensor]:
    root = build(vision)
    clip = root.clip
    groups: list[dict[str, Any]] = [{"params": [], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.2}]
    for name, parameter in clip.named_parameters():  # the rule of open_clip_train/main.py
        excluded = parameter.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
        groups[not excluded]["params"].append(parameter)
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), eps=1e-3, foreach=False)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        data = batch(step)
        text = pad_text(clip.text, data["token_ids"], data["seq_lens"])
        optimizer.zero_grad()
        ClipLoss()(*clip(root.pixels(data["image"]).contiguous(), text)).backward()
        optimizer.step()
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))
    return dict(clip.state_dict())


@pytest.mark.parametrize("vision", VISION)
def test_five_steps_leave_open_clips_parameters(vision: str) -> None:
    ours, theirs = our_parameters(vision), open_clips_parameters(vision)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=1e-12, rtol=1e-12, msg=name)


@pytest.mark.parametrize("vision", VISION)
def test_the_step_runs_in_bfloat16_autocast_with_fp32_features_and_loss(vision: str) -> None:
    model = build(vision).float()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(batch(0))
        loss = contrastive_loss(**out)
    loss.backward()
    assert {value.dtype for value in out.values()} == {torch.float32}
    assert loss.dtype == torch.float32
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
