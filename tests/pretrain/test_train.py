"""Whole runs: the same numbers again, exact resume, open_clip-readable results, one-sentence mistakes."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import open_clip
import psutil
import pytest
import torch
from PIL import Image

from diptych.configs.errors import UserError
from diptych.pretrain.checkpoint import newest_checkpoint, read_tensors, verify
from diptych.pretrain.model import load_model
from diptych.pretrain.tracking import TrackingConfig, track_evaluation
from diptych.pretrain.train import train

from .train_runs import BATCH, finish, launch, load, losses, make_data, rows, write_config
from .wandb_file import history


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    return write_config(tmp_path_factory.mktemp("config") / "run.yaml", data)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, config: Path) -> Path:
    """A run from start to end without a break."""
    out = tmp_path_factory.mktemp("straight") / "run"
    outcome = train(load(config, out))
    assert (outcome.step, outcome.stopped) == (20, False)
    return out


def state(run: Path) -> dict[str, torch.Tensor]:
    """Weights, averages and moments of the last checkpoint."""
    folder = newest_checkpoint(run)
    assert folder is not None
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 4
    return {f"{f.name}/{k}": v for f in files for k, v in read_tensors(f).items()}


def assert_same(run: Path, other: Path) -> None:
    assert losses(run) == losses(other)
    got, expected = state(run), state(other)
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].equal(value), name


class StopAt:
    """Sends this process SIGTERM after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def start(self, facts: dict[str, Any]) -> None:
        assert facts["parameters"] > 1000

    def row(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_learns_and_leaves_what_its_users_need(straight: Path, data: Path) -> None:
    got = losses(straight)
    assert [step for step, _ in got] == list(range(1, 21))
    assert got[-1][1] < got[0][1] - 0.3
    last = rows(straight)[-1]
    assert last["samples_seen"] == 20 * BATCH
    assert {"lr", "logit_scale", "grad_norm", "samples_per_s", "data_wait_fraction", "bad_samples"} <= set(
        last
    )
    assert [row["step"] for row in rows(straight, "eval")] == [10, 20]
    names = sorted(p.name for p in (straight / "checkpoints").iterdir())
    assert names == ["step_00000018", "step_00000020"]
    for name in names:
        assert verify(straight / "checkpoints" / name) is None


def test_one_seed_gives_the_same_run_and_another_seed_another(
    straight: Path, config: Path, tmp_path: Path
) -> None:
    train(load(config, tmp_path / "again"))
    assert_same(tmp_path / "again", straight)
    train(load(config, tmp_path / "other", "seed=1", "train.total_samples=16"))
    assert losses(tmp_path / "other")[0] != losses(straight)[0]


@pytest.mark.parametrize("stops", [(1,), (9,), (6, 13)])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(
    stops: tuple[int, ...], straight: Path, config: Path, tmp_path: Path
) -> None:
    for stop in stops:
        outcome = train(load(config, tmp_path / "run"), StopAt(stop))
        assert outcome.stopped
        assert stop <= outcome.step <= stop + 1
    outcome = train(load(config, tmp_path / "run"))
    assert not outcome.stopped
    assert_same(tmp_path / "run", straight)


def test_a_finished_run_is_left_as_it_is(straight: Path, config: Path) -> None:
    before = {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*")}
    assert train(load(config, straight)).step == 20
    assert {p: p.stat().st_mtime_ns for p in (straight / "checkpoints").rglob("*")} == before


def test_a_damaged_newest_checkpoint_costs_one_interval_and_nothing_else(
    straight: Path, config: Path, tmp_path: Path
) -> None:
    train(load(config, tmp_path / "run"), StopAt(14))
    newest = newest_checkpoint(tmp_path / "run")
    assert newest is not None
    weights = newest / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-7])
    train(load(config, tmp_path / "run"))
    assert_same(tmp_path / "run", straight)


def test_the_checkpoint_is_open_clips(straight: Path) -> None:
    folder = newest_checkpoint(straight)
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["red square", "teal square"])
    pixels = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    ours = load_model(straight)
    model.eval()
    with torch.no_grad():
        text = model.encode_text(tokens, normalize=True)
        image = model.encode_image(ours.model.pixels(pixels), normalize=True)
    torch.testing.assert_close(ours.encode_captions(["red square", "teal square"]), text, atol=1e-5, rtol=0)
    torch.testing.assert_close(ours.encode_images(pixels), image, atol=1e-5, rtol=0)


def test_wandb_gets_every_row_offline(config: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(load(config, out, "tracking.wandb=offline", "train.total_samples=64"))
    files = list((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 1
    seen = [row for row in history(files[0]) if "train/loss" in row]
    assert [(row["step"], row["train/loss"]) for row in seen] == losses(out)
    assert [row["samples_seen"] for row in seen] == [BATCH * step for step in (1, 2, 3, 4)]


def test_a_run_goes_on_when_wandbs_process_is_killed(config: Path, tmp_path: Path) -> None:
    out, steps = tmp_path / "run", 100
    process = launch(config, out, 1, "tracking.wandb=offline", f"train.total_samples={steps * BATCH}")
    while not (out / "metrics.jsonl").is_file() or not rows(out):
        assert process.poll() is None
        time.sleep(0.02)
    (core,) = [one for one in psutil.Process(process.pid).children(recursive=True) if "wandb" in one.name()]
    core.kill()
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert [row["step"] for row in rows(out)] == [*range(1, steps + 1)]
    told = [line for line in err.splitlines() if "W&B has ended (" in line]
    assert len(told) == 1
    assert told[0].endswith(f"{out / 'metrics.jsonl'} has everything")


def test_an_evaluation_joins_the_training_in_wandb(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "grid.png")
    hits = {"R@5": {"value": 0.25, "low": 0.1, "high": 0.4, "chance": 0.01}}
    result: dict[str, Any] = {
        "checkpoint": str(tmp_path),
        "folder": str(tmp_path),
        "retrieval": {"pets": {"image_to_text": hits, "n_images": 9}},
        "zero_shot": {"pets/kind": {"accuracy": {"value": 0.5}, "classes": 2}},
        "linear_probe": {},
        "pictures": {"retrieval_examples": "grid.png"},
    }
    track_evaluation(tmp_path, TrackingConfig(wandb="off"), result)
    assert not (tmp_path / "wandb").exists()
    track_evaluation(tmp_path, TrackingConfig(), result)
    (row,) = history(next((tmp_path / "wandb").glob("offline-run-*/*.wandb")))
    assert row["retrieval/pets/image_to_text/R@5"] == 0.25
    assert row["zero_shot/pets/kind/accuracy"] == 0.5
    assert list((tmp_path / "wandb").rglob("*.png"))


MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no data": (["data.train=/no/where"], ["/no/where"]),
    "too few samples": (["train.global_batch_size=64"], ["64", "60"]),
    "an unknown model": (["model.arch=ViT-B32"], ["model.arch", "did you mean"]),
    "no such weights": (["model.pretrained=none.pt"], ["model.pretrained", "none.pt"]),
    "no held-out data": (["evaluate.data=/no/where"], ["/no/where"]),
    "two lengths": (["train.epochs=1"], ["train.epochs", "train.total_samples"]),
    "divergence": (["optim.lr=1e30", "schedule.warmup_samples=0"], ["optim.lr", "1e+30", "diverged"]),
    "a corpus that is not fetched": (["data.train=corpus:icons-demo/train"], ["diptych data fetch icons"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_sentence(name: str, config: Path, tmp_path: Path) -> None:
    overrides, words = MISTAKES[name]
    with pytest.raises(UserError) as caught:
        train(load(config, tmp_path / "run", *overrides))
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message


def test_a_run_folder_is_not_mixed_with_other_settings(straight: Path, config: Path) -> None:
    with pytest.raises(UserError, match=r"optim\.lr was 0\.002, now 0\.1.*out"):
        train(load(config, straight, "optim.lr=0.1"))
    assert train(load(config, straight, "train.log_every_steps=3", "data.workers=1")).step == 20


def test_damaged_samples_are_masked_named_and_bounded(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data")
    shard = data / "train" / "00001.tar"
    damaged = bytearray(shard.read_bytes())
    at = damaged.index(b"\x89PNG") + 40
    damaged[at] ^= 0xFF
    shard.write_bytes(damaged)
    config = write_config(tmp_path / "run.yaml", data)
    train(load(config, tmp_path / "run"))
    assert rows(tmp_path / "run")[-1]["bad_samples"] == 1
    lines = [json.loads(x) for x in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["shard"], line["reason"]) for line in lines] == [("00001.tar", "hash")]
    with pytest.raises(UserError, match=r"max_bad_fraction.*00001\.tar \(hash\)"):
        train(load(config, tmp_path / "strict", "data.max_bad_fraction=0.0"))


def test_a_killed_run_goes_on_as_if_nothing_had_happened(
    straight: Path, config: Path, tmp_path: Path
) -> None:
    process = launch(config, tmp_path / "run", 1)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not metrics.is_file() or metrics.read_text().count('"train"') < 8:
        assert process.poll() is None, process.communicate()[1][-2000:]
    process.kill()
    process.communicate()
    assert len(losses(tmp_path / "run")) < 20
    finish(launch(config, tmp_path / "run", 1))
    assert_same(tmp_path / "run", straight)


def test_two_processes_see_the_same_losses_to_rounding(straight: Path, config: Path, tmp_path: Path) -> None:
    finish(launch(config, tmp_path / "run", 2, "model.vision_cfg.patch_dropout=0.0"))
    train(load(config, tmp_path / "one", "model.vision_cfg.patch_dropout=0.0"))
    two, one = losses(tmp_path / "run"), losses(tmp_path / "one")
    assert [step for step, _ in two] == [step for step, _ in one]
    for (_, a), (_, b) in zip(two, one, strict=True):
        assert a == pytest.approx(b, rel=2e-4)
