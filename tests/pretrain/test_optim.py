"""Optimizer groups, learning-rate curve and averaged weights."""

import contextlib
import itertools
import math
from typing import Any

import open_clip_train.scheduler as reference
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from diptych.configs.errors import UserError
from diptych.pretrain.ema import Ema
from diptych.pretrain.engine import set_threads
from diptych.pretrain.layer_decay import layer_numbers, layer_scales
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.optim import OptimConfig, build_optimizer, clip_gradients, decays, set_lr
from diptych.pretrain.schedule import ScheduleConfig, lr_at, lr_factor

MODEL = ModelConfig(
    embed_dim=8,
    vision_cfg={"timm_model_name": "test_resnet", "image_size": 32},
    text_cfg={"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 1},
)


TOWERS: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": ("visual", {"layers": 3, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}),
    "timm_vit": ("visual", {"timm_model_name": "test_vit", "image_size": 160}),
    "timm_resnet": ("visual", {"timm_model_name": "test_resnet", "image_size": 32}),
    "resnet": ("visual", {"layers": [1, 1, 1, 1], "width": 16, "image_size": 64}),
    "text": ("text", {"timm_model_name": "test_resnet", "image_size": 32}),
}


@pytest.mark.parametrize("kind", ["vit", "timm_vit", "timm_resnet", "resnet"])
def test_decay_groups_are_open_clips(kind: str) -> None:
    towers: dict[str, Any] = {"vision_cfg": TOWERS[kind][1], "text_cfg": MODEL.text_cfg}
    model = build_model(ModelConfig(embed_dim=8, init_logit_bias=-10.0, **towers))
    assert not decays("logit_bias", model.logit_bias)
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


FIRST_AND_LAST = {
    "vit": ("conv1.weight", "transformer.resblocks.2.ln_1.weight", 3, "proj", 4),
    "timm_vit": ("trunk.patch_embed.proj.weight", "trunk.blocks.5.norm1.weight", 6, "head.proj.weight", 7),
    "timm_resnet": ("trunk.conv1.0.weight", "trunk.layer4.0.conv1.weight", 4, "head.proj.weight", 5),
    "resnet": ("conv1.weight", "layer4.0.conv1.weight", 4, "attnpool.q_proj.weight", 5),
    "text": ("token_embedding.weight", "transformer.resblocks.0.ln_1.weight", 1, "text_projection", 2),
}


@pytest.mark.parametrize("kind", TOWERS)
def test_layers_count_from_the_input_to_the_projection(kind: str) -> None:
    attribute, vision = TOWERS[kind]
    model = build_model(ModelConfig(embed_dim=8, vision_cfg=vision, text_cfg=MODEL.text_cfg))
    tower = getattr(model, attribute)
    numbers = layer_numbers(tower)
    assert numbers.keys() == {name for name, _ in tower.named_parameters()}
    stem, block, block_number, projection, last = FIRST_AND_LAST[kind]
    assert (numbers[stem], numbers[block], numbers[projection]) == (0, block_number, last)
    assert set(numbers.values()) <= set(range(last + 1))
    scales = layer_scales(tower, 0.5)
    assert scales[projection] == 1
    assert scales[stem] == 0.5**last


def test_layers_of_an_open_clip_vit_are_the_groups_that_it_locks() -> None:
    vision = TOWERS["vit"][1]
    for groups in range(1, 5):
        tower = build_model(ModelConfig(embed_dim=8, vision_cfg=vision, text_cfg=MODEL.text_cfg)).visual
        tower.lock(groups)
        numbers = layer_numbers(tower)
        for name, p in tower.named_parameters():
            assert p.requires_grad == (numbers[name] > max(numbers.values()) - groups), name


def test_rates_fall_towards_the_input_of_each_tower() -> None:
    model = ContrastiveModel(build_model(MODEL))
    config = OptimConfig(lr=1.0, image_lr_scale=0.1, image_layer_decay=0.5, text_layer_decay=0.8)
    rates = {
        id(p): group["lr"] for group in build_optimizer(model, config).param_groups for p in group["params"]
    }
    clip = model.clip
    assert rates[id(clip.logit_scale)] == 1
    assert rates[id(clip.text.token_embedding.weight)] == pytest.approx(0.8**2)
    assert rates[id(clip.text.text_projection)] == 1
    first = next(clip.visual.trunk.parameters())
    assert rates[id(first)] == pytest.approx(0.1 * 0.5**5)


def test_layers_of_a_strange_tower_are_a_user_error() -> None:
    with pytest.raises(UserError, match="layers of Linear are unknown"):
        layer_scales(nn.Linear(2, 2), 0.5)


def test_a_constant_course_does_not_depend_on_the_end_before_it_cools_down() -> None:
    """So a run can be made longer from any checkpoint of the plateau."""
    config = ScheduleConfig(kind="constant", warmup_samples=50, cooldown_samples=200)
    for seen in range(0, 800, 10):
        short, long = (lr_factor(config, samples_seen=seen, total_samples=t, batch=10) for t in (1000, 5000))
        assert short == long


@pytest.mark.parametrize(
    ("threads", "asked", "processes", "expected"),
    [
        (3, "2", 1, 3),
        (None, "2", 1, 2),
        (None, "1", 1, 1),
        (None, "2,1", 1, 2),
        (None, None, 1, 8),
        (None, "1", 2, 4),  # torchrun's own
        (None, "3", 2, 3),
        (None, "", 16, 1),
    ],
)
def test_threads_are_those_asked_for_or_a_share_of_the_cores(
    threads: int | None, asked: str | None, processes: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    got: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", got.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if asked is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", asked)
    set_threads(threads)
    assert got == [expected]
