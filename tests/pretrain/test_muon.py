"""Muon against torch's own, its choice of parameters, and its state through a checkpoint's form."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.muon import Muon, hidden_matrices, orthogonal
from diptych.pretrain.optim import OptimConfig, build_optimizer, set_lr

TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
    "timm_vit": {"timm_model_name": "test_vit", "image_size": 160},
    "efficientnet": {"timm_model_name": "test_efficientnet", "image_size": 32},
}


def build(vision: str) -> ContrastiveModel:
    torch.manual_seed(0)
    return ContrastiveModel(build_model(ModelConfig(embed_dim=8, vision_cfg=VISION[vision], text_cfg=TEXT)))


@pytest.mark.parametrize("shape", [(3, 20, 50), (1, 50, 20), (2, 16, 16)])
def test_singular_values_come_near_one_and_vectors_stay(shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    y = orthogonal(x)
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    values = u.mT @ y @ v.mT
    diagonal = values.diagonal(dim1=1, dim2=2)
    assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-10
    assert diagonal[s > 0.05 * s.amax()].min() > 0.6
    assert diagonal.max() < 1.25
    assert orthogonal(torch.zeros(1, 3, 4)).equal(torch.zeros(1, 3, 4))


@pytest.mark.parametrize("shape", [(20, 50), (48, 16)])
def test_the_update_is_that_of_torchs_muon_matched_to_adamws_rms(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.zeros(shape)) for _ in range(2))
    group = {"params": [ours], "stacked": 1, "weight_decay": 0.1}
    muon = Muon([group], lr=0.02, betas=(0.9, 0.98), eps=1e-6, momentum=0.95)
    reference = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(4):
        before = ours.detach().clone()
        ours.grad = torch.randn(shape)
        theirs.grad = ours.grad.clone()
        muon.step()
        reference.step()
        change = ours.detach() - before
        assert change.square().mean().sqrt() == pytest.approx(0.2 * 0.02, rel=0.3)
        # torch's works in bfloat16
        assert (ours - theirs).norm() < 0.02 * theirs.norm()


def test_stacked_matrices_are_updated_each_by_itself() -> None:
    torch.manual_seed(0)
    start, gradient = torch.randn(12, 4), torch.randn(12, 4)
    stacked = nn.Parameter(start.clone())
    parts = [nn.Parameter(part.clone()) for part in start.split(4)]
    settings: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6, "momentum": 0.9}
    one = Muon([{"params": [stacked], "stacked": 3}], **settings)
    three = Muon([{"params": parts, "stacked": 1}], **settings)
    for _ in range(2):
        stacked.grad = gradient.clone()
        for part, share in zip(parts, gradient.split(4), strict=True):
            part.grad = share.clone()
        one.step()
        three.step()
    torch.testing.assert_close(stacked.detach(), torch.cat([p.detach() for p in parts]))


def test_muon_takes_the_matrices_in_the_blocks() -> None:
    found = hidden_matrices(build("vit"))
    own = ["attn.in_proj_weight", "attn.out_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight"]
    towers = ("clip.visual", "clip.text")
    expected = {f"{tower}.transformer.resblocks.0.{name}" for tower in towers for name in own}
    assert found.keys() == expected
    assert all(n == (3 if "in_proj" in name else 1) for name, n in found.items())
    timm = hidden_matrices(build("timm_vit"))
    assert timm["clip.visual.trunk.blocks.3.attn.qkv.weight"] == 3
    assert not any("patch_embed" in name or "head" in name for name in timm)


def test_depthwise_convolutions_and_the_stem_stay_with_adamw() -> None:
    model = build("efficientnet")
    found = hidden_matrices(model)
    convolutions = {n: m for n, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    for name, module in convolutions.items():
        assert (f"{name}.weight" in found) == (module.groups == 1 and ".blocks." in name), name


def train(model: ContrastiveModel, optimizer: torch.optim.Optimizer, steps: range) -> list[Tensor]:
    for step in steps:
        torch.manual_seed(step)
        optimizer.zero_grad()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        set_lr(optimizer, 1e-2 / (1 + step))
        optimizer.step()
    return [p.detach().clone() for p in model.parameters()]


def test_a_resumed_muon_goes_on_bit_for_bit() -> None:
    config = OptimConfig(name="muon", lr=1e-2, muon_lr_scale=0.5)
    model = build("vit")
    optimizer = build_optimizer(model, config)
    scales = {group["group_name"]: group["lr_scale"] for group in optimizer.param_groups}
    assert scales["image/decay/muon_3"] == 0.5
    assert scales["image/decay"] == 1
    train(model, optimizer, range(2))
    again = build("vit")
    again.load_state_dict(model.state_dict())
    second = build_optimizer(again, config)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(second.state[p] for p in again.parameters())
    for a, b in zip(train(model, optimizer, range(2, 4)), train(again, second, range(2, 4)), strict=True):
        assert a.equal(b)


def test_an_overflow_skips_the_whole_step() -> None:
    model = build("vit")
    optimizer = build_optimizer(model, OptimConfig(name="muon"))
    before = [p.detach().clone() for p in model.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    scaler.scale(torch.ones(()))
    # of this kind here
    next(iter(model.parameters())).grad.fill_(torch.inf)  # pyright: ignore[reportOptionalMemberAccess]
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert all(p.equal(old) for p, old in zip(model.parameters(), before, strict=True))
