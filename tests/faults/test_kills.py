"""SIGKILL again and again: the run that is started anew each time is the undisturbed one, bit for bit."""

import random
from collections.abc import Generator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from ..pretrain.train_runs import BATCH, losses, make_data, write_config
from .killing import NAMES, Fault, Forker, Runner, Start, differences, draw, kill_until_done, left_over

EVERY = 6
STEPS = 120  # 40 epochs of three batches
SHORT = f"train.total_samples={36 * BATCH}"
SAVES = ("save", "rename", "prune")


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


def faults(seed: int, names: tuple[str, ...], count: int) -> Iterator[Fault]:
    """So many faults, every name as often."""
    rng = random.Random(seed)
    for i in range(count):
        yield draw(rng, names[i % len(names)])


def runner(forker: Forker, config: Path, out: Path, *overrides: str, world_size: int = 1) -> Runner:
    return Runner(forker, ["pretrain", str(config), f"out={out}", *overrides], out, world_size)


def undisturbed(forker: Forker, config: Path, out: Path, *overrides: str, world_size: int = 1) -> Path:
    one = runner(forker, config, out, *overrides, world_size=world_size)
    assert one.once(None).codes == [0] * world_size, one.log.read_text()
    return out


def told(start: Start) -> None:
    print(start)  # shown when the test fails


@pytest.mark.slow
def test_a_run_killed_everywhere_is_the_undisturbed_one(forker: Forker, config: Path, tmp_path: Path) -> None:
    straight = undisturbed(forker, config, tmp_path / "straight")
    first, *_, last = losses(straight)
    assert last[1] < 0.6 * first[1]  # it learns, so a lost moment or batch would show

    run = tmp_path / "killed"
    one = runner(forker, config, run)
    starts = kill_until_done(one, faults(0, NAMES, 18), at_most=2 * EVERY, tell=told)
    assert sum(start.killed for start in starts) >= 15
    assert {start.fault for start in starts if start.killed} == set(NAMES)
    assert any(start.torn for start in starts)
    assert differences(run, straight) == []
    assert left_over(run, one.leaders) == []


@pytest.mark.slow
def test_kills_while_saving_in_step_cost_one_interval_and_data_workers_end(
    forker: Forker, config: Path, tmp_path: Path
) -> None:
    overrides = (SHORT, "checkpoint.asynchronous=false", "data.workers=2")
    straight = undisturbed(forker, config, tmp_path / "straight", *overrides)
    run = tmp_path / "killed"
    one = runner(forker, config, run, *overrides)
    starts = kill_until_done(one, faults(1, (*SAVES, "step"), 4), at_most=EVERY, tell=told)
    assert sum(start.killed for start in starts) >= 3
    assert differences(run, straight) == []
    assert left_over(run, one.leaders) == []


@pytest.mark.slow
def test_two_ranks_killed_alone_and_together(forker: Forker, config: Path, tmp_path: Path) -> None:
    straight = undisturbed(forker, config, tmp_path / "straight", SHORT, world_size=2)
    run = tmp_path / "killed"
    one = runner(forker, config, run, SHORT, world_size=2)
    alone = [replace(fault, ranks="0") for fault in faults(2, ("prune", "step"), 2)]
    alone += [replace(fault, ranks="1") for fault in faults(3, ("first batch", "step"), 2)]
    together = faults(4, ("save", "anywhere"), 2)
    starts = kill_until_done(one, iter([*together, *alone]), at_most=2 * EVERY, tell=told)
    assert sum(start.killed for start in starts) >= 5
    assert all(start.unaided for start in starts)  # a rank that loses the other ends by itself
    assert differences(run, straight) == []
    assert left_over(run, one.leaders) == []
