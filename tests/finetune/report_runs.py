"""Run folders as the report finds them, written by hand after the documented schema."""

import json
import math
from pathlib import Path
from typing import Any

from PIL import Image


def score(value: float, chance: float, majority: float | None = None) -> dict[str, float]:
    made = {"value": value, "low": value - 0.02, "high": value + 0.02, "chance": chance}
    return made if majority is None else {**made, "majority": majority}


def ways(r5: float) -> dict[str, Any]:
    return {f"R@{k}": score(r5 * (0.5 + 0.1 * k), k / 1400) for k in (1, 5, 10)}


def example(direction: str, name: str, number: int) -> dict[str, Any]:
    pictures = direction == "text_to_image"
    top = [
        {"caption": f"{name} {i}", "cosine": 0.9 - i / 10, "hit": i == number % 5}
        | ({"picture": f"evaluate/thumbs/{(number + i) % 4}.png"} if pictures else {})
        for i in range(5)
    ]
    picture = None if pictures else f"evaluate/thumbs/{number % 4}.png"
    return {"direction": direction, "gallery": "pets", "query": name, "picture": picture, "top": top}


def make_pretrain(folder: Path, *, steps: int = 400, name: str = "red fox") -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text("name: demo\ndata: {train: /nowhere/corpus/train}\n")
    with (folder / "metrics.jsonl").open("w") as file:
        for step in range(steps):
            row: dict[str, Any] = {"kind": "train", "step": step, "samples_seen": (step + 1) * 512}
            row |= {"loss": 6 * math.exp(-step / 150) + 1, "lr": 1e-3 * math.sin(math.pi * step / steps)}
            row |= {"logit_scale": 14 + step / 20, "grad_norm": 1.0, "samples_per_s": 900.0, "bad_samples": 0}
            file.write(json.dumps(row) + "\n")
            if step % 50 == 49:
                scores = {f"val/{d}_R@{k}": step / steps * k / 20 for d in DIRECTIONS for k in (1, 5, 10)}
                scores |= {f"val/{d}_R@5_chance": 0.016 for d in DIRECTIONS}
                file.write(json.dumps({**row, "kind": "eval", **scores}) + "\n")
    (folder / "evaluate" / "thumbs").mkdir(parents=True)
    for i, colour in enumerate(("#c33", "#3a3", "#36c", "#cc3")):
        Image.new("RGB", (72, 72), colour).save(folder / "evaluate" / "thumbs" / f"{i}.png")
    evaluation = {
        "checkpoint": str(folder),
        "model": {"image": "convnet", "text": "transformer", "parameters": 5_200_000, "image_size": 48},
        "data": "/nowhere/corpus",
        "retrieval": {
            gallery: {
                "image_to_text": ways(0.31),
                "text_to_image": ways(0.29),
                "n_images": 1430,
                "n_captions": 1400,
            }
            for gallery in ("pets", "test_word")
        },
        "zero_shot": {
            "pets/subgroup": {"accuracy": score(0.41, 0.01, 0.142), "classes": 97, "n": 1430, "prompts": 5000}
        },
        "linear_probe": {
            "pets/subgroup": {"accuracy": score(0.5, 0.01, 0.142), "classes": 97, "n": 1430, "n_train": 8000}
        },
        "examples": [example(d, f"{name} {i}", i) for d in DIRECTIONS for i in range(4)],
        "pictures": {},
        "notes": [],
    }
    (folder / "evaluate.json").write_text(json.dumps(evaluation))
    return folder


DIRECTIONS = ("image_to_text", "text_to_image")


def make_finetune(folder: Path, *, name: str = "gated") -> Path:
    def head(op: str, accuracy: float, gain: float | None) -> dict[str, Any]:
        made: dict[str, Any] = {
            "stage": "single" if op in ("image", "text") else "mid",
            "level": "embedding",
            "op": op,
            "params": 530_000,
            "seconds": 3.2,
        }
        made["metrics"] = {
            "accuracy": {"value": accuracy, "low": accuracy - 0.01, "high": accuracy + 0.01},
            "auroc": {"value": accuracy + 0.05, "low": accuracy + 0.04, "high": accuracy + 0.06},
        }
        if gain is not None:
            made["vs_best_single"] = {
                "diff": gain,
                "low": gain - 0.01,
                "high": gain + 0.01,
                "against": "text",
            }
        return made

    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("name: match\n")
    results = {
        "task": "match",
        "target": "target",
        "heads": {
            "text": head("text", 0.5, None),
            "image": head("image", 0.499, None),
            name: head("gated", 0.63, 0.13),
            "late": head("late", 0.5, 0.0),
        },
        "best": name,
        "chance": 0.5,
        "majority": 0.5,
        "n_train": 26_000,
        "n_test": 9_700,
        "headline": "The gated head is right on 63.0 % of the pairs.",
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder
