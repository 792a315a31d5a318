"""The engine's settings in whole runs: what leaves the numbers as they are, and what changes them as told."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from diptych.configs.errors import UserError
from diptych.pretrain.checkpoint import newest_checkpoint, read_tensors
from diptych.pretrain.dry_run import dry_run
from diptych.pretrain.sharded import SavedTensors
from diptych.pretrain.train import train

from .train_runs import BATCH, finish, launch, load, losses, make_data, rows, write_config

STAGES = (
    "model.vision_cfg.patch_size=4",
    f"stages=[{{until_samples: {4 * BATCH}, image_size: 8, text_len: 3, patch_dropout: 0.5}}, "
    f"{{until_samples: {7 * BATCH}, patch_dropout: 0.5}}, {{patch_dropout: 0}}]",
)
SHORT = f"train.total_samples={10 * BATCH}"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "run.yaml", data)


def run(config: Path, out: Path, *overrides: str) -> Path:
    assert not train(load(config, out, SHORT, *overrides)).stopped
    return out


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    return run(config, tmp_path_factory.mktemp("plain") / "run")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    newest = newest_checkpoint(folder)
    assert newest is not None
    saved = SavedTensors(newest, averaged=True)  # in one file, or in parts
    return {name: saved.read("weights", name) for name in saved.names["weights"]}


def assert_close(got: Path, expected: Path) -> None:
    for (step, loss), (same_step, other) in zip(losses(got), losses(expected), strict=True):
        assert step == same_step
        assert loss == pytest.approx(other, rel=1e-4)
    for name, value in weights(expected).items():
        torch.testing.assert_close(weights(got)[name], value, atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.micro_batch_size=5"],
        ["train.grad_checkpointing=true"],
        ["train.micro_batch_size=4", "train.grad_checkpointing=true", "loss.tile=3"],
    ],
)
def test_memory_is_saved_without_changing_the_run(
    overrides: list[str], plain: Path, config: Path, tmp_path: Path
) -> None:
    assert_close(run(config, tmp_path / "run", *overrides), plain)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_three_processes_in_micro_batches_are_the_run_of_one(
    parallel: str, plain: Path, config: Path, tmp_path: Path
) -> None:
    extra = [SHORT, "train.micro_batch_size=2", f"train.parallel={parallel}", "loss.exchange=ring"]
    finish(launch(config, tmp_path / "run", 3, *extra))
    assert_close(tmp_path / "run", plain)


def test_stages_are_gone_through_and_resumed_in_the_middle(config: Path, tmp_path: Path) -> None:
    whole = run(config, tmp_path / "whole", *STAGES)
    patches = [row["patches_per_s"] / row["samples_per_s"] for row in rows(whole)]
    assert patches == pytest.approx([2] * 4 + [8] * 3 + [16] * 3, rel=0.01)
    tokens = [row["tokens_per_sample"] for row in rows(whole)]
    assert max(tokens[:4]) <= 3 < min(tokens[4:])
    part = tmp_path / "part"
    train(load(config, part, *STAGES, SHORT, "checkpoint.every_steps=3", "checkpoint.keep=9"))
    for step in ("00000009", "00000010"):
        folder = part / "checkpoints" / f"step_{step}"
        folder.rename(tmp_path / step)
    train(load(config, part, *STAGES, SHORT, "checkpoint.every_steps=3"))
    assert losses(part) == losses(whole)
    for name, value in weights(whole).items():
        assert weights(part)[name].equal(value), name


@pytest.mark.parametrize("micro", [16, 4])
def test_a_locked_tower_stays_as_it_was(micro: int, plain: Path, config: Path, tmp_path: Path) -> None:
    lock = ["lock.image=true", f"model.pretrained={plain}", f"train.micro_batch_size={micro}"]
    before = read_tensors(plain / "checkpoints" / "step_00000010" / "open_clip_model.safetensors")
    for name, value in weights(run(config, tmp_path / "run", *lock)).items():
        assert value.equal(before[name]) == name.startswith("visual."), name


def test_with_both_towers_locked_only_the_scale_is_trained(plain: Path, config: Path, tmp_path: Path) -> None:
    lock = ["lock.image=true", "lock.text=true", f"model.pretrained={plain}", "train.micro_batch_size=4"]
    before = read_tensors(plain / "checkpoints" / "step_00000010" / "open_clip_model.safetensors")
    for name, value in weights(run(config, tmp_path / "run", *lock)).items():
        assert value.equal(before[name]) == (name != "logit_scale"), name


def test_a_bias_that_weights_do_not_have_begins_where_the_config_says(
    plain: Path, config: Path, tmp_path: Path
) -> None:
    overrides = ["loss.kind=siglip", "loss.duplicates=ignore", "model.init_logit_bias=-10"]
    out = run(config, tmp_path / "run", *overrides, f"model.pretrained={plain}", "optim.lr=1e-9")
    assert weights(out)["logit_bias"].item() == pytest.approx(-10, abs=1e-3)


@pytest.mark.slow
def test_compiled_blocks_train_the_same_run(plain: Path, config: Path, tmp_path: Path) -> None:
    finish(launch(config, tmp_path / "run", 1, SHORT, "train.compile=true"))
    assert_close(tmp_path / "run", plain)


def test_muon_trains_and_goes_on_bit_for_bit(config: Path, tmp_path: Path) -> None:
    whole = run(config, tmp_path / "whole", "optim.name=muon", "train.micro_batch_size=8")
    assert losses(whole)[-1][1] < losses(whole)[0][1]
    part = tmp_path / "part"
    train(load(config, part, "optim.name=muon", SHORT, "train.micro_batch_size=8"))
    (part / "checkpoints" / "step_00000010").rename(tmp_path / "gone")
    train(load(config, part, "optim.name=muon", SHORT, "train.micro_batch_size=8"))
    assert losses(part) == losses(whole)
    for name, value in weights(whole).items():
        assert weights(part)[name].equal(value), name


def test_the_log_tells_where_the_time_goes(plain: Path) -> None:
    row = rows(plain)[-1]
    shares = [row[f"share_{part}"] for part in ("forward", "loss", "backward", "update")]
    assert all(share > 0 for share in shares)
    assert sum(shares) < 1
    assert row["tflops_dense"] > row["tflops_computed"] > 0
    assert row["tokens_per_s"] > 0
    assert 0 < row["mfu"] < 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages=[{image_size: 4}]", r"stages.0.image_size: 4: this image tower cannot take"),
        ("stages=[{until_samples: 8}]", "the last must not have it"),
        ("stages=[{text_len: 30}]", "text_len 30 is more than the model's context of 12 tokens"),
        ("stages=[{image_size: 12}]", r"stages.0.image_size: 12 is no multiple .* 8 pixels.*take 8 or 16"),
        (
            f"stages=[{{until_samples: {20 * BATCH}}}, {{}}]",
            r"stages.0.until_samples: 320 is not before the run's end at 320 samples, so stage 1 never comes",
        ),
        ("loss.kind=siglip", "model.init_logit_bias"),
        (
            "lock.image=true",
            "lock.image: the tower has no pretrained weights to keep; set model.pretrained or",
        ),
        ("lock.text=true", "lock.text: the tower has no pretrained weights to keep; set model.pretrained$"),
        ("optim.betas=[0.9, 1.5]", "optim.betas.1"),
        ("data.weight_key=nosuch", "data.weight_key: none of 60 samples of train has 'nosuch' in its JSON"),
    ],
)
def test_settings_that_do_not_fit_are_told_before_training(
    override: str, message: str, config: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        train(load(config, tmp_path / "run", override))
    assert not (tmp_path / "run").exists()


CONV = "{timm_model_name: test_convnext, timm_proj: linear, image_size: 32}"
RESNET = "{layers: [1, 1, 1, 1], width: 8, head_width: 8, image_size: 32, patch_size: null}"


@pytest.mark.parametrize(
    ("vision", "override", "message"),
    [
        (CONV, "stages=[{patch_dropout: 0.5}]", "stages.0.patch_dropout: only ViTs of open_clip and timm"),
        (RESNET, "train.grad_checkpointing=true", "train.grad_checkpointing: open_clip's ResNet has none"),
    ],
)
def test_what_a_tower_cannot_do_is_told_before_training(
    vision: str, override: str, message: str, data: Path, tmp_path: Path
) -> None:
    text = {"context_length": 12, "width": 32, "heads": 2, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": yaml.safe_load(vision), "text_cfg": text}
    file = write_config(tmp_path / "run.yaml", data, model=model)
    with pytest.raises(UserError, match=message):
        train(load(file, tmp_path / "run", override))
    with pytest.raises(UserError, match=message):
        list(dry_run(load(file, tmp_path / "run", override)))


def test_the_dry_run_measures_whole_images_and_tells_the_stages(config: Path, tmp_path: Path) -> None:
    plain, staged = (
        list(dry_run(load(config, tmp_path / "run", *extra)))
        for extra in (["model.vision_cfg.patch_size=4", "model.vision_cfg.patch_dropout=0"], STAGES)
    )

    def line(lines: list[str], start: str) -> str:
        return next(line for line in lines if line.startswith(start))

    assert line(staged, "memory") == line(plain, "memory")
    assert line(staged, "work").replace(" in the dearest stage", "") == line(plain, "work")
    told = (
        f"stage until {4 * BATCH} samples: images of 8 px, captions of at most 3 tokens, 50% of the patches"
    )
    assert told in "\n".join(staged)


def settings(config: Path, tmp_path: Path, *overrides: str) -> Any:
    return load(config, tmp_path, *overrides).train


@pytest.mark.parametrize(
    ("micro", "world", "expected"), [(None, 1, 1), (16, 1, 1), (5, 1, 4), (1, 3, 5), (2, 3, 3), (99, 4, 1)]
)
def test_every_process_cuts_its_share_into_as_many_micro_batches(
    micro: int | None, world: int, expected: int, config: Path, tmp_path: Path
) -> None:
    value = "null" if micro is None else micro
    assert settings(config, tmp_path, f"train.micro_batch_size={value}").micro_batches(world) == expected
