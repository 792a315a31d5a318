"""The benchmarks of the loss and of GradCache: their figures, and a small run of each."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def module(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    for own in ("loss", "grad_cache", "train_step", "contestants", "rows"):
        monkeypatch.delitem(sys.modules, own, raising=False)
    return importlib.import_module(name)


def test_ratios_of_the_loss_are_medians_of_the_rounds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = module("loss", monkeypatch)
    ours = [{"cpu": seconds, "wall": 1.0, "MiB": 10.0, "bytes": 0} for seconds in (1.0, 2.0, 4.0)]
    theirs = [{"cpu": seconds, "wall": 3.0, "MiB": 400.0, "bytes": 0} for seconds in (3.0, 4.0, 4.0)]
    monkeypatch.setattr(
        loss, "rounds_of", lambda kinds, *_: {"diptych": ours, "open_clip": theirs}, raising=True
    )
    row = loss.single(16384, 1, 3, True)
    assert (row["batch"], row["speedup"], row["speedup_wall"]) == (16384, 2.0, 3.0)
    assert row["memory_ratio"] == 0.025
    assert row["cpu_s"] == {"diptych": 2.0, "open_clip": 4.0}


def test_both_losses_of_the_benchmark_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    loss = module("loss", monkeypatch)
    values = [loss.loss_of(kind)(*loss.features(0, 32)).item() for kind in ("diptych", "ring", "open_clip")]
    assert values == pytest.approx(values[:1] * 3, rel=1e-6)


@pytest.mark.slow
def test_one_measurement_has_time_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    found = module("loss", monkeypatch).measured("open_clip", 512, 1)
    assert found["cpu"] > 0
    assert found["wall"] > 0
    assert found["MiB"] > 2  # two copies of 512 x 512 logits


def test_figures_of_grad_cache_are_medians_of_the_rounds_own(monkeypatch: pytest.MonkeyPatch) -> None:
    grad_cache = module("grad_cache", monkeypatch)
    plain = [{"cpu": s, "wall": s, "MiB": 400.0, "step_MiB": 300.0} for s in (1.0, 2.0, 4.0)]
    cached = [{"cpu": s, "wall": s, "MiB": 100.0, "step_MiB": 30.0} for s in (1.5, 2.0, 8.0)]
    row = grad_cache.figures({"plain": plain, "grad_cache": cached})
    assert (row["memory_ratio"], row["memory_ratio_without_state"], row["time_ratio"]) == (0.25, 0.1, 1.5)


def test_grad_cache_of_the_benchmark_has_the_plain_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module("grad_cache", monkeypatch).difference("quick") < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["loss", "grad_cache"])
def test_a_quick_run_appends_its_rows(name: str, tmp_path: Path) -> None:
    results = tmp_path / "rows.jsonl"
    words = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--results", str(results)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in results.read_text().splitlines()]
    assert {row["benchmark"] for row in rows} == {name}
    if name == "loss":
        assert {"speedup", "memory_ratio", "batch"} <= rows[0].keys()
        assert set(rows[0]["ranks"]["2"]["mb_moved"]) == {"gather", "ring", "open_clip"}
    else:
        assert {"memory_ratio", "time_ratio"} <= rows[0].keys()
