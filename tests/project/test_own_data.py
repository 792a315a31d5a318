"""A user's own road, command by command: a table of pictures, shards, a run, its scores, heads, the page."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diptych.cli.main import main

from .repository import ROOT

COLOURS = ("red", "green", "blue", "orange", "purple", "black", "brown", "teal", "pink", "grey")
SHAPES = ("disc", "square", "ring", "bar", "cross")
PRETRAIN = str(ROOT / "configs/demo/pretrain.yaml")
TINY = (
    "model.embed_dim=32",
    "model.vision_cfg={layers: 2, width: 64, head_width: 16, patch_size: 8, image_size: 32}",
    "model.text_cfg={context_length: 12, width: 64, heads: 4, layers: 1}",
    "optim={lr: 2e-3}",
    "schedule={warmup_samples: 1000}",
    "train={global_batch_size: 100, total_samples: 15000, log_every_steps: 50, device: cpu, threads: 1}",
    "tracking.wandb=off",
)


def draw(colour: str, shape: str, rng: np.random.Generator) -> Image.Image:
    """A coloured shape at a drawn place and size."""
    picture = Image.new("RGB", (40, 40), "white")
    pen = ImageDraw.Draw(picture)
    size = int(rng.integers(16, 24))
    left, top = (int(x) for x in rng.integers(2, 38 - size, 2))
    box = (left, top, left + size, top + size)
    third = size // 3
    if shape == "disc":
        pen.ellipse(box, fill=colour)
    elif shape == "square":
        pen.rectangle(box, fill=colour)
    elif shape == "ring":
        pen.ellipse(box, outline=colour, width=4)
    if shape in ("bar", "cross"):
        pen.rectangle((left, top + third, left + size, top + 2 * third), fill=colour)
    if shape == "cross":
        pen.rectangle((left + third, top, left + 2 * third, top + size), fill=colour)
    return picture


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """500 pictures with captions, and for each whether another caption belongs to it."""
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    with (
        (tmp_path / "mine.csv").open("w", newline="") as file,
        (tmp_path / "match.csv").open("w") as labelled,
    ):
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "shape"])
        labelled.write("image,text,target,split\n")
        for number in range(500):
            colour, shape = COLOURS[number % 10], SHAPES[number // 10 % 5]
            name = f"pictures/{number:03d}.png"
            draw(colour, shape, rng).save(tmp_path / name)
            rows.writerow([name, f"a {colour} {shape}", shape])
            split = "test" if number >= 400 else "train"
            other = COLOURS[(number + int(rng.integers(1, 10))) % 10]
            labelled.write(f"{name},a {colour} {shape},1,{split}\n{name},a {other} {shape},0,{split}\n")
    return tmp_path / "mine.csv"


def test_from_a_table_of_pictures_to_the_page(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(table.parent)
    assert main(["data", "build", "mine.csv", "--out", "shards", "--val-fraction", "0.2"]) == 0
    assert main(["data", "verify", "shards/train", "--decode"]) == 0
    run = [
        "pretrain",
        PRETRAIN,
        "out=runs/mine",
        "data.train=shards/train",
        "evaluate.data=shards/val",
        *TINY,
    ]
    assert main([*run, "--dry-run"]) == 0
    assert not Path("runs").exists()
    assert main(run) == 0
    assert main(["evaluate", "runs/mine", "bootstrap=200"]) == 0
    (scores,) = json.loads(Path("runs/mine/evaluate.json").read_text())["retrieval"].values()
    r5 = scores["image_to_text"]["R@5"]
    assert r5["low"] > 3 * r5["chance"]

    Path("match.yaml").write_text(
        "task: {type: binary}\ndata: {manifest: match.csv}\nmodel: {checkpoint: runs/mine}\n"
        "heads: [concat]\nout: runs/match\nadapt: {epochs: 5}\neval: {seeds: [0], bootstrap: 200}\n"
        "tracking: {wandb: 'off'}\n"
    )
    assert main(["finetune", "match.yaml"]) == 0
    results = json.loads(Path("runs/match/results.json").read_text())
    assert results["n_test"] == 200
    assert set(results["heads"]) == {"image", "text", "concat"}
    assert main(["predict", "runs/match", "match.csv", "-o", "out.csv"]) == 0
    assert len(Path("out.csv").read_text().splitlines()) == 1001
    capsys.readouterr()
    assert main(["report", "runs/mine", "runs/match", "--out", "page.html"]) == 0
    assert capsys.readouterr().out.strip() == "page.html"
    assert "concat" in Path("page.html").read_text()


def test_too_few_samples_for_a_batch_are_told(
    table: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(table.parent)
    assert main(["data", "build", "mine.csv", "--out", "shards"]) == 0
    capsys.readouterr()
    words = ["pretrain", PRETRAIN, "out=runs/x", "data.train=shards", "evaluate.data=null", *TINY]
    assert main([*words, "train.global_batch_size=1000"]) == 2
    error = capsys.readouterr().err
    assert "global_batch_size: 1000 is more than the 500 samples" in error
    assert error.count("\n") == 1
