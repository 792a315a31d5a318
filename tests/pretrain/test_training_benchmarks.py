"""The benchmarks of training: their batches, their steps, their figures, the tables made of them."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parents[2]
BENCHMARKS = ROOT / "benchmarks"
MODULES = ("train_step", "time_to_accuracy", "end_to_end", "loader", "plot", "contestants", "rows")


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> object:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module


def module(load: object, name: str) -> ModuleType:
    assert callable(load)
    found = load(name)
    assert isinstance(found, ModuleType)
    return found


def test_batches_have_the_lengths_of_the_histogram(load: object) -> None:
    train_step = module(load, "train_step")
    histogram = json.loads((BENCHMARKS / "caption_lengths.json").read_text())
    assert len(histogram["counts"]) == 77
    assert sum(histogram["counts"]) == 10_000
    lengths = train_step.caption_lengths(10_000, np.random.default_rng(0))
    assert np.bincount(lengths, minlength=78)[1:].tolist() == histogram["counts"]
    batch = train_step.batch_of("quick", 64, 3)
    assert abs(batch["seq_lens"].float().mean() - histogram["mean"]) < 1
    ends = batch["seq_lens"].cumsum(0) - 1
    assert set(batch["token_ids"][ends].tolist()) == {49407}


def test_exact_steps_leave_open_clips_parameters(load: object) -> None:
    assert module(load, "train_step").difference("quick") < 1e-12


def test_figures_are_medians_of_the_rounds_own_ratios(load: object) -> None:
    train_step = module(load, "train_step")
    seconds = {"open_clip": [4.0, 8.0, 6.0], "exact": [2.0, 2.0, 2.0], "masked": [1.0, 1.0, 1.0]}
    steps = {k: [{"cpu": s, "wall": 2 * s, "flop": 1e9} for s in v] for k, v in seconds.items()}
    shares = {kind: {"rest": 1.0} for kind in train_step.KINDS}
    memory = {"open_clip": 1000, "exact": 500, "masked": 400}
    measured = {"steps": steps, "peaks": [1e9] * 3, "memory": memory, "profiles": shares}
    row = train_step.figures("quick", measured)
    assert (row["speedup_exact"], row["speedup_masked"], row["speedup_exact_wall"]) == (3.0, 6.0, 3.0)
    assert (row["memory_ratio"], row["roof_ratio"], row["roof_ratio_open_clip"]) == (0.5, 2.0, 6.0)
    assert row["samples_per_cpu_second"]["exact"] == 8.0


def test_captions_of_the_whole_run_have_the_drawn_lengths(load: object) -> None:
    end_to_end = module(load, "end_to_end")
    from diptych.data.text import build_tokenizer

    words = end_to_end.words()
    assert len(words) > 1000
    rng = np.random.default_rng(0)
    _, lengths = build_tokenizer(None, 77).pack([" ".join(rng.choice(words, n)) for n in (1, 5, 60)])
    assert lengths.tolist() == [3, 7, 62]


def test_a_score_counts_from_its_first_evaluation(load: object) -> None:
    accuracy = module(load, "time_to_accuracy")
    rows = [{"cpu": 1.0, "score": 0.1}, {"cpu": 2.0, "score": 0.3}, {"cpu": 3.0, "score": 0.2}]
    assert accuracy.seconds_to(rows, 0.2) == 2.0
    assert accuracy.seconds_to(rows, 0.4) is None
    for change in accuracy.WITHOUT.values():
        assert change
        for key, value in change.items():
            assert getattr(accuracy.DIPTYCH, key) != value, key


def test_tables_are_filled_from_the_newest_rows(load: object, tmp_path: Path) -> None:
    plot = module(load, "plot")
    rows = [
        {"model": "small", "batch": 1024, "speedup": 1.5, "memory_ratio": 0.5},
        {"model": "small", "batch": 1024, "speedup": 2.5, "memory_ratio": 0.04},
        {"model": "quick", "batch": 64, "speedup": 9.9, "memory_ratio": 0.9},
    ]
    (tmp_path / "loss.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = "a\n<!-- begin loss -->\nold\n<!-- end loss -->\nb\n<!-- begin step -->\nkept\n<!-- end step -->\n"
    filled = plot.fill(text, tmp_path)
    assert "| 1,024 | 2.5 | 0.04 |" in filled
    assert "old" not in filled
    assert "9.9" not in filled
    assert "kept" in filled
    assert plot.fill(filled, tmp_path) == filled


def test_the_document_shows_the_committed_rows(load: object) -> None:
    plot = module(load, "plot")
    document = (ROOT / "docs/performance.md").read_text()
    assert plot.fill(document) == document
    assert plot.svg() == (ROOT / "docs/images/performance.svg").read_text()


@pytest.mark.slow
def test_the_step_is_measured_in_small(tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    command = [sys.executable, str(BENCHMARKS / "train_step.py"), "--quick", "--results", str(results)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    row = json.loads(results.read_text())
    assert row["benchmark"] == "train_step"
    assert row["difference_fp64"] < 1e-12
    assert row["speedup_exact"] > 1
    assert 0 < row["memory_ratio"] < 1
    assert {part for shares in row["shares"].values() for part in shares} >= {"matrix products", "attention"}
