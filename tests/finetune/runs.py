"""Runs of coloured squares through the command line, and what they leave."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diptych.cli.main import main
from diptych.finetune import heads

from .labelled import match_rows, write_csv


def finetune(folder: Path, *words: str) -> dict[str, Any]:
    assert main(["finetune", str(folder / "finetune.yaml"), *words]) == 0
    return json.loads((folder / "run" / "results.json").read_text())


def timeless(value: Any) -> Any:
    """Results without what a clock says."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, bytes]:
    """Every weight file."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*.safetensors"))}


def permute_test_labels(folder: Path, **options: Any) -> None:
    """Write the table of squares again with the labels of its test rows permuted."""
    rows = match_rows(folder, **options)
    test = [i for i, row in enumerate(rows) if row[5] == "test"]
    shuffled = np.random.default_rng(0).permutation([rows[i][3] for i in test])
    for i, target in zip(test, shuffled, strict=True):
        rows[i][3] = int(target)
    write_csv(folder / "match.csv", rows)


def stop_at(op: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """A run that is interrupted when it comes to a head of this operator."""
    original = heads.fit

    def stopped(config: Any, *args: Any, **options: Any) -> Any:
        if config.op == op:
            raise KeyboardInterrupt
        return original(config, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(heads, "fit", stopped)
        assert main(["finetune", str(folder / "finetune.yaml"), *words]) == 130
