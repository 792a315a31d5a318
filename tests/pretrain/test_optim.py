"""Optimizer groups, learning-rate curve and averaged weights."""

import contextlib
import itertools
import math

import open_clip_train.scheduler as reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diptych.pretrain.ema import Ema
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.optim import OptimConfig, build_optimizer, clip_gradients, decays, set_lr
from diptych.pretrain.schedule import ScheduleConfig, lr_at, lr_factor

MODEL = ModelConfig(
    embed_dim=8,
    vision_cfg={"timm_model_name": "test_resnet", "image_size": 32},
    text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
)


def test_decay_groups_are_open_clips() -> None:
    model = build_model(MODEL)
    for name, p in model.named_parameters():
        excluded = p.ndim < 2 or any(word in name for word in ("bn", "ln", "bias", "logit_scale"))
        assert decays(name, p) == (not excluded), name


def test_every_parameter_is_in_one_group_with_its_towers_rate() -> None:
    model = build_model(MODEL)
    model.logit_scale.requires_grad_(False)
    optimizer = build_optimizer(nn.ModuleDict({"module": model}), OptimConfig(lr=1e-3, image_lr_scale=0.1))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    set_lr(optimizer, 2e-3)
    for group in optimizer.param_groups:
        tower, _, decay = group["group_name"].partition("/")
        assert group["lr"] == pytest.approx(2e-4 if tower == "image" else 2e-3)
        assert group["weight_decay"] == (0.2 if decay == "decay" else 0.0)


def test_the_fused_update_equals_torchs_plain_adamw() -> None:
    torch.manual_seed(0)
    ours, plain = (nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5)).double() for _ in range(2))
    plain.load_state_dict(ours.state_dict())
    config = OptimConfig(lr=1e-2)
    fused = build_optimizer(ours, config)
    groups = [
        {"params": [p for p in plain.parameters() if p.ndim > 1], "weight_decay": 0.2},
        {"params": [p for p in plain.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    loop = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, foreach=False)
    for step in range(5):
        x = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        for net, optimizer in ((ours, fused), (plain, loop)):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=0)


def test_weights_and_gradients_of_a_conv_tower_lie_in_one_order() -> None:
    """torch's fused AdamW on a CPU goes through memory without looking at strides."""
    root = ContrastiveModel(build_model(MODEL))
    optimizer = build_optimizer(root, OptimConfig())
    out = root.encode_image(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
    out[0, 0].backward()
    for name, p in root.clip.visual.named_parameters():
        assert p.is_contiguous(), name
        assert p.grad is not None
        assert p.grad.is_contiguous(), name
    optimizer.step()
    assert all(t.is_contiguous() for state in optimizer.state.values() for t in state.values())


@pytest.mark.parametrize("limit", [None, 0.5])
def test_clipping_reports_the_norm_before_it(limit: float | None) -> None:
    p = nn.Parameter(torch.zeros(4))
    p.grad = torch.tensor([0.0, 3.0, 4.0, 0.0])
    assert clip_gradients([p], limit) == pytest.approx(5)
    assert p.grad.norm() == pytest.approx(5 if limit is None else 0.5, rel=1e-4)


@pytest.mark.parametrize("kind", ["cosine", "constant"])
def test_the_curve_is_open_clips(kind: str) -> None:
    batch, warmup, total = 32, 10, 100
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = {"cosine": reference.cosine_lr, "constant": reference.const_lr}[kind](
        optimizer, 3e-4, warmup, total
    )
    config = ScheduleConfig(kind=kind, warmup_samples=warmup * batch)
    for step in range(total):
        ours = lr_at(config, 3e-4, samples_seen=step * batch, total_samples=total * batch, batch=batch)
        assert ours == pytest.approx(theirs(step), rel=1e-12), step


def test_constant_with_cooldown_falls_to_its_end() -> None:
    config = ScheduleConfig(kind="constant", cooldown_samples=100, final_lr_fraction=0.1)
    at = [lr_factor(config, samples_seen=s, total_samples=1000, batch=10) for s in (0, 899, 900, 950, 1000)]
    assert at == pytest.approx([1, 1, 1, 0.55, 0.1])


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.integers(0, 500),
    st.integers(1, 2000),
    st.floats(0, 1),
)
def test_the_factor_stays_between_0_and_1_and_never_rises_after_warmup(
    kind: str, warmup: int, total: int, low: float
) -> None:
    config = ScheduleConfig(kind=kind, warmup_samples=warmup, final_lr_fraction=low)
    curve = [lr_factor(config, samples_seen=s, total_samples=total, batch=7) for s in range(0, total + 50, 7)]
    assert all(0 <= f <= 1 for f in curve)
    after = curve[-(-warmup // 7) :]
    assert all(b <= a + 1e-12 for a, b in itertools.pairwise(after))


def test_the_average_follows_its_formula_and_gives_the_weights_back() -> None:
    net = nn.BatchNorm1d(2)
    ema = Ema(net, 0.5)
    expected = net.weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            net.weight.add_(1)
        net(torch.randn(4, 2))
        ema.update(net)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * net.weight.detach()
    torch.testing.assert_close(ema.weights()["weight"], expected)
    assert ema.weights()["num_batches_tracked"] == 12
    own = net.weight.detach().clone()
    with contextlib.suppress(KeyboardInterrupt), ema.applied(net):
        torch.testing.assert_close(net.weight.detach(), expected)
        raise KeyboardInterrupt
    assert net.weight.detach().equal(own)


def test_the_average_resumes_from_its_state() -> None:
    net = nn.Linear(2, 2)
    first, second = Ema(net, 0.9), Ema(net, 0.9)
    for ema in (first, first):
        with torch.no_grad():
            net.weight.mul_(1.5)
        ema.update(net)
    second.load_state_dict(first.state_dict(), first.weights())
    for ema in (first, second):
        ema.update(net)
    assert first.state_dict() == second.state_dict()
    assert all(first.weights()[k].equal(v) for k, v in second.weights().items())
    assert math.isclose(float(first.state_dict()["updates"]), 3)
