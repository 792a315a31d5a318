"""The benchmark of saving: a small run of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "benchmarks" / "saving.py"


@pytest.mark.slow
def test_a_quick_run_appends_its_row(tmp_path: Path) -> None:
    words = [sys.executable, str(BENCHMARK), "--quick", "--results", str(tmp_path / "rows.jsonl")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    row = json.loads((tmp_path / "rows.jsonl").read_text())
    assert row["benchmark"] == "saving"
    assert row["stall_ratio"] == row["beside_s"] / row["synchronous_s"]
    assert row["beside_cpu_s"] < row["synchronous_cpu_s"]
    assert row["durable_s"] > row["beside_s"]
