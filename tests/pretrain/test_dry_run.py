"""What --dry-run tells is what the run would be."""

import re
from pathlib import Path

import pytest

from diptych.configs.errors import UserError
from diptych.pretrain.dry_run import dry_run
from diptych.pretrain.model import build_model
from diptych.pretrain.train import train

from .train_runs import BATCH, load, make_data, write_config


def test_sizes_steps_and_work_are_those_of_the_run(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", make_data(tmp_path / "data"))
    config = load(path, tmp_path / "run")
    text = "\n".join(dry_run(config))
    clip = build_model(config.model)
    images = sum(p.numel() for p in clip.visual.parameters())
    texts = sum(p.numel() for p in clip.text.parameters())
    assert "60 samples, 3 steps an epoch" in text
    assert f"20 steps of {BATCH} samples, {20 * BATCH} in all" in text
    assert f"image tower: {images / 1e6:.1f} M" in text
    assert f"text tower: {texts / 1e6:.1f} M" in text
    assert f"image uint8 [{BATCH}, 3, 16, 16]" in text
    assert f"{16 * (images + texts) / 2**30:.2f} GiB for weights" in text
    assert not (tmp_path / "run").exists()
    run = train(load(path, tmp_path / "run", f"train.total_samples={BATCH}")).folder
    tensors = run.glob("checkpoints/*/[!r]*.safetensors")  # all but the random states
    size = sum(file.stat().st_size for file in tensors)
    told = re.search(r"disk: ([\d.]+) MB a checkpoint, up to 3 at a time: ([\d.]+) MB", text)
    assert told is not None
    assert float(told[1]) == pytest.approx(size / 1e6, rel=0.02)
    assert float(told[2]) == pytest.approx(3 * size / 1e6, rel=0.02)


def test_more_work_and_memory_are_told_for_a_larger_model(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", make_data(tmp_path / "data"))

    def work(*overrides: str) -> float:
        lines = list(dry_run(load(path, tmp_path / "run", *overrides)))
        return float(next(line for line in lines if line.startswith("work: ")).split()[1])

    wide = ["model.vision_cfg.width=512", "model.vision_cfg.patch_dropout=0.0"]
    assert work(*wide, "model.vision_cfg.layers=8") > 3 * work(*wide)


def test_a_mistake_is_told_before_training(tmp_path: Path) -> None:
    path = write_config(tmp_path / "run.yaml", make_data(tmp_path / "data"))
    with pytest.raises(UserError, match="61"):
        list(dry_run(load(path, tmp_path / "run", "train.global_batch_size=61")))
