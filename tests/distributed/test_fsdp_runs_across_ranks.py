"""Whole runs with sharded parameters on real gloo processes."""

from pathlib import Path

import pytest

from ..pretrain.train_runs import finish, launch, losses, make_data, rows, write_config
from .test_runs_across_ranks import kill_after


@pytest.mark.slow
def test_a_killed_sharded_run_goes_on_with_ddp(tmp_path: Path) -> None:
    exact = ("model.vision_cfg.patch_dropout=0.0", "optim.name=muon", "checkpoint.every_steps=4")
    config = write_config(tmp_path / "run.yaml", make_data(tmp_path / "data"))
    finish(launch(config, tmp_path / "straight", 1, *exact))
    kill_after(7, config, tmp_path / "moved", 2, *exact, "train.parallel=fsdp")
    finish(launch(config, tmp_path / "moved", 2, *exact))
    moved, straight = losses(tmp_path / "moved"), losses(tmp_path / "straight")
    assert [step for step, _ in moved] == [step for step, _ in straight]
    for (step, a), (_, b) in zip(moved, straight, strict=True):
        assert a == pytest.approx(b, rel=2e-3), step
    assert rows(tmp_path / "moved", "eval")


@pytest.mark.slow
def test_a_compiled_sharded_run_equals_a_plain_one(tmp_path: Path) -> None:
    config = write_config(tmp_path / "run.yaml", make_data(tmp_path / "data"))
    exact = ("model.vision_cfg.patch_dropout=0.0",)
    finish(launch(config, tmp_path / "plain", 1, *exact))
    finish(launch(config, tmp_path / "compiled", 2, *exact, "train.parallel=fsdp", "train.compile=true"))
    compiled, plain = losses(tmp_path / "compiled"), losses(tmp_path / "plain")
    assert len(compiled) == len(plain) > 4
    for (step, a), (_, b) in zip(compiled, plain, strict=True):
        assert a == pytest.approx(b, rel=2e-3), step
