"""SIGKILL again and again: the run that is started anew each time is the undisturbed one, bit for bit."""

import random
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ..pretrain.train_runs import BATCH, losses, make_data, write_config
from .killing import NAMES, Fault, Forker, Runner, differences, draw, kill_until_done, left_over

EVERY = 6
STEPS = 120  # 40 epochs of three batches
SHORT = f"train.total_samples={36 * BATCH}"


@pytest.fixture(scope="module")
def forker() -> Generator[Forker]:
    with Forker() as one:
        yield one


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    return write_config(
        folder / "run.yaml",
        make_data(folder / "data"),
        train={"total_samples": STEPS * BATCH},
        checkpoint={"every_steps": EVERY},
        evaluate={"every_steps": 12},
    )


@pytest.fixture(scope="module")
def pair(forker: Forker, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undisturbed run on two ranks."""
    return undisturbed(forker, config, tmp_path_factory.mktemp("pair") / "straight", 2, SHORT)


def faults(seed: int, names: tuple[str, ...], count: int) -> Iterator[Fault]:
    """So many faults, every name as often."""
    rng = random.Random(seed)
    for i in range(count):
        yield draw(rng, names[i % len(names)])


def words(config: Path, out: Path, *overrides: str) -> list[str]:
    return ["pretrain", str(config), f"out={out}", *overrides]


def undisturbed(forker: Forker, config: Path, out: Path, world_size: int, *overrides: str) -> Path:
    start = Runner(forker, words(config, out, *overrides), out, world_size).once(None)
    assert start.codes == [0] * world_size
    return out


@pytest.mark.slow
def test_a_run_killed_everywhere_is_the_undisturbed_one(
    forker: Forker, config: Path, tmp_path: Path
) -> None:
    straight = undisturbed(forker, config, tmp_path / "straight", 1)
    first, *_, last = losses(straight)
    assert last[1] < 0.6 * first[1]  # it learns, so a lost moment or batch would show

    run = tmp_path / "killed"
    runner = Runner(forker, words(config, run), run)
    starts = kill_until_done(runner, faults(0, NAMES, 18), every_steps=EVERY, tell=lambda s: print(s))
    assert sum(start.killed for start in starts) >= 15
    assert differences(run, straight) == []
    assert left_over(run, runner.leaders) == []


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["0", "1", "all"])
def test_two_ranks_killed_alone_or_together(
    ranks: str, forker: Forker, config: Path, pair: Path, tmp_path: Path
) -> None:
    names = ("step", "first batch", "anywhere") if ranks == "1" else ("save", "step", "prune", "anywhere")
    run = tmp_path / "killed"
    runner = Runner(forker, words(config, run, SHORT), run, 2)
    some = (replace(fault, ranks=ranks) for fault in faults(3, names, 4))
    starts = kill_until_done(runner, some, every_steps=EVERY, tell=lambda s: print(s))
    assert sum(start.killed for start in starts) >= 3
    assert all(start.unaided for start in starts)  # a rank that loses the other ends by itself
    assert differences(run, pair) == []
    assert left_over(run, runner.leaders) == []
