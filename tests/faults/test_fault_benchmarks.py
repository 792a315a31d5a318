"""The figures of benchmarks/faults.py and soak.py from what their runs leave."""

import importlib
import math
from types import ModuleType

import pytest

from ..project.repository import ROOT


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("faults")


@pytest.fixture
def plot(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("plot")


def test_a_step_counts_as_it_was_done_the_last_time(faults: ModuleType) -> None:
    batch, per_epoch, epochs = faults.BATCH, faults.PER_EPOCH, faults.EPOCHS
    steps = [
        {"step": 1 + step, "samples": [batch * (step % per_epoch) + i for i in range(batch)]}
        for step in range(per_epoch * epochs)
    ]
    assert faults.data_of(steps, set()) == {"steps_again": 0, "missing": 0, "repeated": 0}
    again = [*steps[:7], *steps[4:]]
    assert faults.data_of(again, set()) == {"steps_again": 3, "missing": 0, "repeated": 0}
    other = [*steps[:7], {"step": 8, "samples": steps[0]["samples"]}, *steps[8:], {"save": 1, "seconds": 0.1}]
    assert faults.data_of(other, set()) == {"steps_again": 0, "missing": batch, "repeated": batch}
    assert faults.data_of(steps, {5}) == {"steps_again": 0, "missing": batch, "repeated": 0}


def test_weights_are_measured_against_the_undisturbed_ones(faults: ModuleType) -> None:
    import torch

    truth = {"a": torch.tensor([3.0, 4.0]), "n": torch.tensor(7)}
    assert faults.distance({"a": torch.tensor([3.0, 4.0])}, truth) == 0
    assert math.isclose(faults.distance({"a": torch.tensor([3.0, 3.0])}, truth), 0.2)
    assert faults.distance({"a": torch.tensor([3.0, math.nan])}, truth) is None
    assert faults.distance(None, truth) is None


def test_what_a_fault_did_is_told_in_words(plot: ModuleType) -> None:
    clean = {"survived": True, "steps_again": 0, "missing": 0, "repeated": 0, "difference": 0.0}
    assert plot.outcome(clean) == "the same bits"
    assert plot.outcome(clean | {"steps_again": 7}) == "the same bits, 7 steps again"
    assert plot.outcome(clean | {"difference": 0.05, "missing": 3}) == "weights 5.0% off, 3 samples missed"
    assert "destroyed" in plot.outcome(clean | {"difference": 900.0})
    assert plot.outcome(clean | {"survived": False, "difference": None}) == "**lost**"
    in_save = {"survived": False, "tries": 3, "tries_survived": 1}
    assert plot.outcome(clean | in_save) == "**lost** in 2 of 3 tries"
    assert plot.outcome(None) == "has none"


def test_growth_is_told_from_the_middle_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    soak = importlib.import_module("soak")
    assert soak.flat([5.0, 5.0, 10.0, 10.0, 10.0, 10.0, 10.0, 10.0]) == 1
    assert soak.flat([10.0, 10.0, 10.0, 10.0, 15.0, 15.0, 15.0, 15.0]) == 1.5
