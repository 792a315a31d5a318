"""The benchmark of cross-validation over frozen encoders: a small run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from diptych.finetune.config import ENCODED

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "fusion_cv.py"


@pytest.mark.slow
def test_a_quick_run_appends_its_row(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARK), "--quick", "--results", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    (row,) = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert row["benchmark"] == "fusion_cv"
    assert row["heads"] == len(ENCODED) + 9  # concat and the eight that the benchmark names
    assert row["fold_kept_s"].keys() == row["fold_live_s"].keys() == {"concat", "bilinear"}
    assert row["cold_s"] > 0
    assert row["warm_s"] > 0
