"""Cross-validations of coloured squares through the command line, and what they leave."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from diptych.finetune.tasks.task import Ints

from .labelled import match_rows, write_config, write_csv, write_task
from .runs import finetune, timeless

HEADS = "{late: {op: late}}"
NAMES = ("image", "text", "concat", "late")
KILLED = """
import os, signal, sys
from diptych.cli.main import main
from diptych.finetune import heads
left, fit = [int(sys.argv[2])], heads.fit
def killing(*args, **options):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return fit(*args, **options)
heads.fit = killing
main(["finetune", sys.argv[1], *sys.argv[3:]])
"""
"""A program that kills itself before training number ``argv[2]``, counted from 0."""


def pieces(folder: Path) -> dict[str, Any]:
    """All files of the heads and their searches below a folder; of head.json and trials.jsonl what does not
    tell a time, of metrics.jsonl all but the running number."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if path.name == "head.json":
            found[str(path)] = timeless(json.loads(path.read_text()))
        elif path.name == "trials.jsonl":
            found[str(path)] = [timeless(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.name == "metrics.jsonl" and path.parent.parent.name == "heads":
            lines = map(json.loads, path.read_text().splitlines())
            found[str(path)] = [{k: v for k, v in line.items() if k != "step"} for line in lines]
        elif path.suffix == ".safetensors":
            found[str(path)] = path.read_bytes()
    return {name.removeprefix(str(folder)): value for name, value in found.items()}


def permuted(folder: Path, test: Ints) -> None:
    """Shuffle the labels of some rows of the table among themselves."""
    rows = match_rows(folder)
    shuffled = np.random.default_rng(0).permutation([rows[i][3] for i in test])
    assert list(shuffled) != [rows[i][3] for i in test]
    for i, target in zip(test, shuffled, strict=True):
        rows[i][3] = int(target)
    write_csv(folder / "match.csv", rows)


CV = "eval.cv={folds: 3, repeats: 2}"


def make_run(folder: Path) -> Path:
    """Two repeats of three folds in a new folder."""
    write_task(folder)
    write_config(folder, HEADS)
    finetune(folder, CV)
    return folder
