"""Tables of pairs: coloured squares with captions of their own, and runs on them."""

import json
from pathlib import Path
from typing import Any

from diptych.cli.main import main

from .labelled import SPLIT_OF, squares, write_csv

WORDS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
COLUMNS = ("id", "image", "text", "kind", "split")
CONFIG = """
name: pairs
out: {folder}/run
task: {task}
data: {{manifest: {folder}/pairs.csv, id: id{data}}}
model: {{checkpoint: {folder}/checkpoint, cache: false}}
heads: {heads}
adapt: {{lr: 1.0e-2, epochs: {epochs}, batch_size: 32{adapt}}}
eval: {{seeds: [0, 1], bootstrap: 100{eval}}}
tracking: {{wandb: "off"}}
"""


def pair_rows(folder: Path, names: int = 8) -> list[list[Any]]:
    """Two rows per picture: each has its two captions, which no other has."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = []
    for shade, word in enumerate(WORDS):
        for name in squares.NAMES[:names]:
            image = f"images/{name}{shade}.png"
            (folder / image).write_bytes(squares.square(name, 20 * shade))
            for i, text in enumerate((f"{name} square {word}", f"a {word} {name}")):
                rows.append([f"{name}{shade}-{i}", image, text, name, SPLIT_OF[shade]])
    return rows


def write_pairs(folder: Path, names: int = 8) -> None:
    """``pairs.csv`` with its pictures, and a tiny checkpoint."""
    write_csv(folder / "pairs.csv", pair_rows(folder, names), COLUMNS)
    squares.make_checkpoint(folder / "checkpoint")


def run_pairs(folder: Path, task: str, *words: str, **options: Any) -> dict[str, Any]:
    """Fine-tune and return results.json."""
    given = {"heads": "[similarity]", "data": "", "adapt": "", "eval": "", "epochs": 8} | options
    (folder / "finetune.yaml").write_text(CONFIG.format(folder=folder, task=task, **given))
    assert main(["finetune", str(folder / "finetune.yaml"), *words]) == 0
    return json.loads((folder / "run" / "results.json").read_text())
