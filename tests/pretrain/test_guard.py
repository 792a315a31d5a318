"""The ladder as a function of bad steps, spikes, fingerprints, and the optimizers' masked steps."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diptych.configs.errors import UserError
from diptych.pretrain.collapse import ALIKE, at_chance, feature_std
from diptych.pretrain.ema import Ema
from diptych.pretrain.guard import Guard
from diptych.pretrain.guard_config import GuardConfig, SpikeConfig
from diptych.pretrain.ladder import OVERFLOWS, Ladder
from diptych.pretrain.model import clamp_logit_scale
from diptych.pretrain.muon import Muon
from diptych.pretrain.replicas import Difference, fingerprint
from diptych.pretrain.spikes import SpikeWatch

CPU = torch.device("cpu")


@given(
    bad=st.sets(st.integers(1, 60)),
    max_skips=st.integers(0, 4),
    window=st.integers(1, 12),
    max_rollbacks=st.integers(0, 3),
    kill=st.integers(0, 60),
)
def test_the_ladder_is_its_definition_also_after_a_resume(
    bad: set[int], max_skips: int, window: int, max_rollbacks: int, kill: int
) -> None:
    config = GuardConfig(max_skips=max_skips, window_steps=window, max_rollbacks=max_rollbacks)
    ladder = Ladder(config)
    since, times = 0, 0
    for step in range(1, 61):
        if step == kill:
            state, ladder = ladder.state_dict(), Ladder(config)
            ladder.load_state_dict(state)
        if step not in bad:
            continue
        among = [one for one in bad if since < one <= step and one > step - window]
        expected = "skip" if len(among) <= max_skips else "rollback" if times < max_rollbacks else "stop"
        assert ladder.bad(step) == expected
        if expected == "stop":
            break
        if expected == "rollback":
            ladder.went_back()
            since, times = step, times + 1
    assert ladder.rollbacks == times


def test_overflows_are_the_scalers_until_no_scale_helps_also_after_a_resume() -> None:
    ladder, bad = Ladder(GuardConfig()), 0
    for _ in range(3):
        for _ in range(OVERFLOWS):
            state, ladder = ladder.state_dict(), Ladder(GuardConfig())
            ladder.load_state_dict(state)
            bad += ladder.overflowed()
        ladder.in_a_row = 0  # a step whose gradients are finite
    assert (bad, ladder.overflows) == (0, 3 * OVERFLOWS)
    assert [ladder.overflowed() for _ in range(OVERFLOWS + 2)] == [False] * OVERFLOWS + [True] * 2
    ladder.went_back()
    assert not ladder.overflowed()


class Weights(nn.Module):
    """Of one parameter; a guard's whole state."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(1))


@pytest.mark.parametrize("waits", [False, True])
def test_gradients_that_overflow_at_every_scale_count_as_bad_steps(waits: bool, tmp_path: Path) -> None:
    model = Weights()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    state: Any = SimpleNamespace(
        root=model, optimizer=optimizer, scaler=object(), device=CPU, step=0, stream=SimpleNamespace()
    )
    told: list[dict[str, Any]] = []
    config = GuardConfig(max_skips=3, max_rollbacks=0)
    guard = Guard(config, state, tmp_path, peak_lr=0.1, tell=told.append, waits=waits)
    batch = {"sample_id": torch.tensor([7]), "source": torch.tensor([0]), "epoch": 0}

    def step(norm: float) -> None:
        guard.passes(batch, torch.tensor(1.0), torch.tensor(norm))
        state.step += 1
        guard.settle()

    for _ in range(OVERFLOWS):
        step(math.inf)
    step(1.0)
    for _ in range(OVERFLOWS):
        step(math.inf)
    assert (told, guard.ladder.overflows) == ([], 2 * OVERFLOWS)
    for _ in range(3):
        step(math.inf)
    assert "gradients overflow at any scale" in told[0]["text"]
    with pytest.raises(UserError, match="the loss diverged at step"):
        step(math.inf)
    assert [json.loads(line)["sample_ids"] for line in guard.path.read_text().splitlines()] == [[7]] * 4
    guard.close()


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([5, 5, 9, 5], "rank 2 differs from the rest in b (1 of 2 entries differ)"),
        ([5, 9, 8, 5, 5], "ranks 1, 2 differ from the rest in b (1 of 2 entries differ)"),
        ([5, 9], "ranks 0, 1 differ in b (1 of 2 entries differ), and which of them is wrong cannot be told"),
        (
            [5, 5, 9, 9],
            "ranks 0, 1, 2, 3 differ in b (1 of 2 entries differ), and which of them is wrong cannot be told",
        ),
    ],
)
def test_who_differs_is_named_where_most_agree_and_nobody_is_accused_else(
    values: list[int], said: str
) -> None:
    assert str(Difference(["a", "b"], [[1, value] for value in values])) == said


def watch(losses: list[float], norms: list[float] | None = None, **config: Any) -> list[int]:
    """The steps that are spikes; the watch is saved and taken back at every step."""
    spikes = SpikeWatch(SpikeConfig(**config), CPU)
    found: list[int] = []
    for step, (loss, norm) in enumerate(zip(losses, norms or [1.0] * len(losses), strict=True)):
        state, spikes = spikes.state_dict(), SpikeWatch(SpikeConfig(**config), CPU)
        spikes.load_state_dict(state)
        if spikes.look(torch.tensor([loss, norm], dtype=torch.float64)):
            found.append(step)
    return found


def test_spikes_are_found_and_ordinary_training_has_none() -> None:
    rng = np.random.default_rng(0)
    steps = np.arange(400)
    losses = 7 * np.exp(-steps / 150) + 1 + rng.normal(0, 0.1, 400)
    norms = np.exp(rng.normal(0, 0.4, 400))
    assert watch(losses.tolist(), norms.tolist()) == []
    losses[300:303] *= 6
    norms[200] *= 200
    losses[250] = math.nan
    assert watch(losses.tolist(), norms.tolist()) == [200, 300, 301, 302]
    assert watch((losses * 1000).tolist(), norms.tolist()) == [200, 300, 301, 302]


def test_a_new_level_is_a_spike_for_half_a_window_only_and_none_before_the_window_is_full() -> None:
    assert watch([1.0] * 9 + [50.0], window_steps=10) == []
    assert watch([1.0] * 10 + [50.0] * 10, window_steps=10) == [10, 11, 12, 13, 14, 15]


@given(
    bits=st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1, max_size=40),
    where=st.integers(0, 39),
    bit=st.integers(0, 31),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.bool]),
)
def test_every_flipped_bit_shows(bits: list[int], where: int, bit: int, dtype: torch.dtype) -> None:
    if dtype == torch.bool:
        tensor = torch.tensor(bits).remainder(2).bool()
        other = tensor.clone()
        other[where % len(bits)] ^= True
    else:
        raw = {torch.float32: torch.int32, torch.bfloat16: torch.int16}.get(dtype, torch.int64)
        whole = torch.tensor(bits, dtype=torch.int64).to(raw)
        flipped = whole.clone()
        flipped[where % len(bits)] ^= torch.tensor(1 << bit % (8 * raw.itemsize - 1), dtype=raw)
        tensor, other = whole.view(dtype), flipped.view(dtype)
    assert fingerprint(tensor).equal(fingerprint(tensor.clone()))
    assert not fingerprint(tensor).equal(fingerprint(other))


def test_places_matter_to_a_fingerprint_and_layout_does_not() -> None:
    large = torch.randn(1500, 1500, generator=torch.Generator().manual_seed(0))  # three chunks
    swapped = large.clone()
    swapped[0, 0], swapped[1400, 3] = large[1400, 3], large[0, 0]
    assert not fingerprint(large).equal(fingerprint(swapped))
    assert fingerprint(large.T).equal(fingerprint(large.T.contiguous()))
    assert not fingerprint(torch.tensor(0.0)).equal(fingerprint(torch.tensor(-0.0)))


def optimizers(net: nn.Module) -> list[torch.optim.Optimizer]:
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.9, 0.98), "eps": 1e-6}
    weights = {"params": [net.get_parameter("weight")], "weight_decay": 0.2, "stacked": 1}
    biases = {"params": [net.get_parameter("bias")], "weight_decay": 0.0}
    muon = Muon([{**weights}, {**biases}], momentum=0.9, **options)
    adamw = torch.optim.AdamW(net.parameters(), weight_decay=0.2, fused=True, **options)
    return [adamw, muon]


@pytest.mark.parametrize("kind", [0, 1], ids=["adamw", "muon"])
def test_a_masked_step_leaves_everything_and_an_open_mask_changes_nothing(kind: int) -> None:
    """What a GPU does, on a CPU: the same kernels with the same flag."""

    def run(masks: list[float | None]) -> dict[str, Tensor]:
        torch.manual_seed(0)
        net = nn.Linear(6, 4)
        optimizer: Any = optimizers(net)[kind]
        ema = Ema(net, 0.9)
        for step, mask in enumerate(masks):
            generator = torch.Generator().manual_seed(step if mask != 1 else 999)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator) * (torch.nan if mask == 1 else 1)
            optimizer.found_inf = None if mask is None else torch.tensor(mask)
            optimizer.step()
            ema.update(net, None if mask is None else torch.tensor(mask == 0))
        moments = {f"{i}/{k}": v for i, e in optimizer.state_dict()["state"].items() for k, v in e.items()}
        averages = {f"average of {k}": v for k, v in ema.weights().items()}
        assert ema.state_dict()["updates"] == len([mask for mask in masks if mask != 1])
        return {**net.state_dict(), **moments, **averages}

    plain, masked = run([None, None]), run([0.0, 0.0])
    for name, value in plain.items():
        torch.testing.assert_close(masked[name], value, rtol=1e-6, atol=1e-7, msg=name)
    late = run([0.0, 1.0, 1.0])
    for name, value in run([0.0]).items():
        assert late[name].equal(value), name


def test_the_clamp_says_when_it_binds() -> None:
    net = nn.Module()
    net.logit_scale = nn.Parameter(torch.tensor(4.0))
    with torch.no_grad():
        assert not clamp_logit_scale(net)
        net.logit_scale.fill_(5.0)
        assert clamp_logit_scale(net)
        assert not clamp_logit_scale(net)
    assert float(net.logit_scale.detach()) == pytest.approx(math.log(100))


def test_spread_features_are_not_alike_and_equal_ones_are() -> None:
    generator = torch.Generator().manual_seed(0)
    spread = nn.functional.normalize(torch.randn(512, 64, generator=generator), dim=1)
    assert float(feature_std(spread)) == pytest.approx(1 / 8, rel=0.02)
    one = nn.functional.normalize(torch.ones(512, 64) + 1e-3 * spread, dim=1)
    assert float(feature_std(one)) * 8 < ALIKE
    assert float(feature_std(spread[:0])) == 0


def test_chance_is_told_from_learning() -> None:
    guess = {"R@1": 0.012, "R@1_chance": 0.01, "R@10": 0.11, "R@10_chance": 0.1}
    assert at_chance(guess, 1000)
    assert not at_chance({**guess, "R@10": 0.14}, 1000)
    assert not at_chance({**guess, "R@1": 0.03}, 1000)
    assert not at_chance({}, 1000)
