"""What the rows of a run say of a logit scale at its bounds."""

import math
from functools import partial
from pathlib import Path

import pytest

from diptych.pretrain import parts
from diptych.pretrain.guard import Guard
from diptych.pretrain.train import train

from .train_runs import BATCH, load, make_data, rows, write_config

STEPS = 12
SHORT = (f"train.total_samples={STEPS * BATCH}", "evaluate.data=null")
# a bias far below all cosines: whatever the batch, a larger scale is better
ABOVE = ("loss.kind=siglip", "model.init_logit_bias=-200", f"model.init_logit_scale={math.log(100)}")
BELOW = ("model.init_logit_scale=0.0",)  # untrained features are better off with a smaller one


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clamped")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


def clamped(config: Path, out: Path, *overrides: str) -> tuple[list[float], list[float]]:
    """The shares of clamped steps and the logit scales in the rows of a run."""
    train(load(config, out, *SHORT, *overrides))
    found = rows(out)
    return [row["logit_scale_clamped"] for row in found], [row["logit_scale"] for row in found]


@pytest.mark.parametrize("waits", [False, True], ids=["branch", "masked"])
@pytest.mark.parametrize(
    ("bound", "overrides"), [(100.0, ABOVE), (1.0, BELOW)], ids=["the upper", "the lower"]
)
def test_steps_that_end_at_a_bound_of_the_logit_scale_are_counted(
    bound: float,
    overrides: tuple[str, ...],
    waits: bool,
    config: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts, "Guard", partial(Guard, waits=waits))  # waits: a GPU's way
    shares, scales = clamped(config, tmp_path / "each", *overrides)
    assert set(shares) <= {0.0, 1.0}
    assert shares[0] == 1.0
    # a row has the scale that its step began with
    assert [share == 1 for share in shares[:-1]] == [abs(scale - bound) < 1e-4 for scale in scales[1:]]
    fourths, _ = clamped(config, tmp_path / "fourths", *overrides, "train.log_every_steps=4")
    assert fourths == [sum(shares[first : first + 4]) / 4 for first in range(0, STEPS, 4)]


def test_a_run_away_from_the_bounds_has_none(config: Path, tmp_path: Path) -> None:
    shares, scales = clamped(config, tmp_path / "run")
    assert shares == [0.0] * STEPS
    assert all(1 < scale < 100 for scale in scales)


def test_a_scale_that_starts_at_its_bound_and_leaves_it_was_not_clamped(config: Path, tmp_path: Path) -> None:
    shares, scales = clamped(config, tmp_path / "run", f"model.init_logit_scale={math.log(100)}")
    assert scales[0] == pytest.approx(100)
    assert scales[-1] < 99.9
    assert shares == [0.0] * STEPS
