"""The benchmarks of reliability as a user starts them, in small: kills at random, and what guards cost."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..project.repository import ROOT


def said_by(name: str, results: Path, *words: str) -> str:
    """What ``benchmarks/NAME.py --quick`` prints."""
    command = [sys.executable, str(ROOT / "benchmarks" / f"{name}.py"), "--quick", "--results", str(results)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def only_row(name: str, results: Path, *words: str) -> dict[str, Any]:
    """What it appends."""
    said_by(name, results, *words)
    (row,) = [json.loads(line) for line in results.read_text().splitlines()]
    assert row["benchmark"] == name
    return row


@pytest.mark.slow
def test_a_quick_soak_ends_as_the_undisturbed_run(tmp_path: Path) -> None:
    row = only_row("soak", tmp_path / "rows.jsonl", "--work", str(tmp_path / "work"))
    assert row["kills"] == sum(row["kills_by_place"].values()) == 6
    assert row["starts"] == 7
    assert 0 < row["most_steps_lost"] <= row["steps_lost_allowed"]
    assert row["differences"] == []
    assert row["left_over"] == []
    assert row["shm_files_left"] == []
    assert row["loss"]["last"] < 0.8 * row["loss"]["first"]
    assert not (tmp_path / "cache").exists()  # --work is all that it writes to

    # the same command has nothing left to do, and what is old gets no new date
    starts = (tmp_path / "work" / "starts.jsonl").read_bytes()
    said = said_by("soak", tmp_path / "again.jsonl", "--work", str(tmp_path / "work"))
    assert f"remove {tmp_path / 'work'} to run it anew" in said
    assert (tmp_path / "work" / "starts.jsonl").read_bytes() == starts
    assert not (tmp_path / "again.jsonl").exists()


@pytest.mark.slow
def test_a_quick_measurement_of_the_guards_finds_every_part(tmp_path: Path) -> None:
    row = only_row("overhead", tmp_path / "rows.jsonl")
    assert (row["steps"], row["processes"]) == (20, 2)
    step = {"guard", "flags", "stop", "metrics", "watch"}
    assert row["shares"].keys() >= step | {"replicas", "copying", "writing"}
    assert all(share > 0 for share in row["shares"].values())  # each was called, and took time
    assert row["share"] == pytest.approx(sum(row["shares"].values()), rel=0.01)
    assert row["share"] < 1
