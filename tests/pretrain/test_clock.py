"""Speeds between two logs: rates of arithmetic, parts, pauses."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diptych.pretrain import clock as clock_module
from diptych.pretrain.clock import Clock
from diptych.pretrain.flops import Costs
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.peaks import peak_flops

BATCH: dict[str, Any] = {
    "image": torch.zeros(3, 3, 32, 32, dtype=torch.uint8),
    "token_ids": torch.zeros(12, dtype=torch.int32),
    "seq_lens": torch.tensor([3, 4, 5]),
    "cut_captions": 1,
}


@pytest.fixture(scope="module")
def root() -> ContrastiveModel:
    vision = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}
    text = {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
    return ContrastiveModel(build_model(ModelConfig(embed_dim=16, vision_cfg=vision, text_cfg=text)))


def test_a_row_counts_what_was_done_since_the_last(root: ContrastiveModel) -> None:
    clock = Clock(300, costs=Costs(root))
    for _ in range(4):
        time.sleep(0.005)
        clock.count(BATCH)
    row = clock.row(300 + 24, world_size=2)
    seconds = 4 * row["step_s"]
    assert row["samples_per_s"] == pytest.approx(24 / seconds, rel=1e-3)
    assert row["samples_per_s_per_device"] == pytest.approx(12 / seconds, rel=1e-3)
    assert row["tokens_per_s"] == pytest.approx(48 / seconds, rel=1e-3)
    assert row["patches_per_s"] == pytest.approx(4 * 3 * 16 / seconds, rel=1e-3)
    assert row["tokens_per_sample"] == 4
    assert row["cut_captions_fraction"] == pytest.approx(1 / 3, rel=1e-3)
    assert clock.row(324, world_size=2)["samples_per_s"] == 0


def test_arithmetic_is_held_against_the_peak(root: ContrastiveModel) -> None:
    costs = Costs(root)
    clock = Clock(0, costs=costs)
    time.sleep(0.01)
    clock.count(BATCH, recomputed=True)
    row = clock.row(3, world_size=1)
    work = costs.step(BATCH, recomputed=True)
    peak = peak_flops(torch.device("cpu"), torch.float32)
    assert peak is not None
    assert row["tflops_computed"] == pytest.approx(work.computed / row["step_s"] / 1e12, rel=1e-3)
    assert row["tflops_dense"] == pytest.approx(work.dense / row["step_s"] / 1e12, rel=1e-3)
    assert row["mfu"] == pytest.approx(work.needed / row["step_s"] / peak, rel=1e-3)
    assert "mfu" not in Clock(0, costs=costs, precision="bf16").row(0, world_size=1)


def test_parts_and_waits_are_shares_of_the_time_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(clock_module, "time", SimpleNamespace(perf_counter=lambda: now))
    clock = Clock(0)
    for _ in range(2):
        with clock.waiting():
            now += 1
        with clock.part("forward"):
            now += 2
        with clock.part("backward"):
            now += 5
        with clock.paused():
            now += 100
        now += 2
        clock.count(BATCH)
    row = clock.row(6, world_size=1)
    assert (row["step_s"], row["data_wait_fraction"]) == (10, 0.1)
    assert (row["share_forward"], row["share_backward"]) == (0.2, 0.5)
    assert not any(key.startswith(("share", "tflops", "mfu")) for key in clock.row(6, world_size=1))
