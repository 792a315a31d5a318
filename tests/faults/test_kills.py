"""SIGKILL again and again: the run that is started anew each time is the undisturbed one, bit for bit."""

import json
import random
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from diptych.configs.errors import UserError
from diptych.data.corpora.icons import fetch_icons
from diptych.data.corpora.pins import TIERS

from ..pretrain.train_runs import losses, make_data, rows, write_config
from ..project.repository import ROOT
from .killing import NAMES, Fault, Forker, Runner, Start, differences, draw, kill_until_done, left_over

BATCH, PER_EPOCH = 4, 15  # of 60 samples
EVERY = 4  # no divisor of PER_EPOCH: starts go on from anywhere in an epoch
STEPS = 120
SHORT = f"train.total_samples={36 * BATCH}"
SAVES = ("save", "rename", "prune")
IN_STEPS = {"step", *SAVES, "evaluate", "anywhere"}
"""Faults that come after a first step."""

PICTURES_BATCH, PICTURES_STEPS = 128, 30
VENDORS = ("twemoji", "noto", "fxemoji")


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
        train={"global_batch_size": BATCH, "total_samples": STEPS * BATCH},
        checkpoint={"every_steps": EVERY},
        evaluate={"every_steps": 12},
    )


def faults(seed: int, names: tuple[str, ...], count: int, *, rows: int = 10) -> Iterator[Fault]:
    """So many faults, every name as often."""
    rng = random.Random(seed)
    for i in range(count):
        yield draw(rng, names[i % len(names)], rows=rows)


def runner(forker: Forker, config: Path, out: Path, *overrides: str, world_size: int = 1) -> Runner:
    return Runner(forker, ["pretrain", str(config), f"out={out}", *overrides], out, world_size)


def undisturbed(forker: Forker, config: Path, out: Path, *overrides: str, world_size: int = 1) -> Path:
    one = runner(forker, config, out, *overrides, world_size=world_size)
    assert one.once(None).codes == [0] * world_size, one.log.read_text()
    return out


class Places:
    """Where in the data the checkpoints of a run lie."""

    def __init__(self, run: Path) -> None:
        self.run = run
        self.place: dict[int, tuple[int, int]] = {0: (0, 0)}
        """Epoch and step in it, by the checkpoint's step; also of those that are removed by now."""

    def look(self, start: Start) -> None:
        """Between a start and the next."""
        print(start)  # shown when the test fails
        for file in self.run.glob("checkpoints/step_*/trainer.json"):
            trainer = json.loads(file.read_text())
            self.place[trainer["step"]] = (trainer["stream"]["epoch"], trainer["stream"]["step"])

    def inside(self, starts: Sequence[Start]) -> list[int]:
        """Steps of the checkpoints in mid-epoch from which starts went on and did steps of their own."""
        return [one.first for one in starts if one.samples and self.place[one.first][1] > 0]


def most_kills_in_an_epoch(starts: Sequence[Start], per_epoch: int) -> int:
    """After how many different steps one epoch was cut off."""
    cut: defaultdict[int, set[int]] = defaultdict(set)
    for one in starts:
        if one.killed:
            cut[one.done // per_epoch].add(one.done)
    return max(map(len, cut.values()))


@pytest.mark.slow
def test_a_run_killed_everywhere_is_the_undisturbed_one(forker: Forker, config: Path, tmp_path: Path) -> None:
    straight = undisturbed(forker, config, tmp_path / "straight")
    train = [loss for _, loss in losses(straight)]
    assert sum(train[-10:]) < 0.5 * sum(train[:10])  # it learns, so a lost moment or batch would show

    run = tmp_path / "killed"
    one, places = runner(forker, config, run), Places(run)
    starts = kill_until_done(one, faults(0, NAMES, 18), at_most=2 * EVERY, tell=places.look)
    assert sum(start.killed for start in starts) >= 15
    assert {start.fault for start in starts if start.killed} == set(NAMES)
    assert {start.fault for start in starts if start.killed and start.samples} >= IN_STEPS
    assert any(start.torn for start in starts)
    assert len(set(places.inside(starts))) >= 3
    assert most_kills_in_an_epoch(starts, PER_EPOCH) >= 3
    assert differences(run, straight) == []
    assert left_over(run, one.leaders) == []


@pytest.mark.slow
def test_kills_while_saving_in_step_cost_one_interval_and_data_workers_end(
    forker: Forker, config: Path, tmp_path: Path
) -> None:
    overrides = (SHORT, "checkpoint.asynchronous=false", "data.workers=2")
    straight = undisturbed(forker, config, tmp_path / "straight", *overrides)
    run = tmp_path / "killed"
    one, places = runner(forker, config, run, *overrides), Places(run)
    starts = kill_until_done(one, faults(1, (*SAVES, "step"), 4), at_most=EVERY, tell=places.look)
    assert sum(start.killed for start in starts) >= 3
    assert len(places.inside(starts)) >= 2
    assert differences(run, straight) == []
    assert left_over(run, one.leaders) == []


@pytest.mark.slow
def test_two_ranks_killed_alone_and_together(forker: Forker, config: Path, tmp_path: Path) -> None:
    straight = undisturbed(forker, config, tmp_path / "straight", SHORT, world_size=2)
    run = tmp_path / "killed"
    one, places = runner(forker, config, run, SHORT, world_size=2), Places(run)
    alone = [replace(fault, ranks="0") for fault in faults(2, ("prune", "step"), 2)]
    alone += [replace(fault, ranks="1") for fault in faults(3, ("first batch", "step"), 2)]
    together = faults(4, ("save", "anywhere"), 2)
    starts = kill_until_done(one, iter([*together, *alone]), at_most=2 * EVERY, tell=places.look)
    assert sum(start.killed for start in starts) >= 5
    assert all(start.unaided for start in starts)  # a rank that loses the other ends by itself
    assert len(places.inside(starts)) >= 2
    assert differences(run, straight) == []
    assert left_over(run, one.leaders) == []


def pictures(monkeypatch: pytest.MonkeyPatch, require: Callable[[object, str], None]) -> Path:
    """Emoji of three vendors, by the demo's own packages and recipe: a tenth of its corpus."""
    demo = TIERS["demo"]
    chosen = tuple(package for package in demo.packages if package.name.rpartition("/")[2] in VENDORS)
    rules = replace(demo.rules, test_families=frozenset({"fxemoji"}), val_share=0.05)
    monkeypatch.setitem(TIERS, "demo", replace(demo, packages=chosen, rules=rules, galleries={}))
    try:
        return fetch_icons()
    except UserError as error:
        require("cannot be reached" not in str(error), "the npm registry is out of reach")
        raise


@pytest.mark.slow
def test_a_run_on_real_pictures_killed_at_random_is_the_undisturbed_one(
    forker: Forker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, require: Callable[[object, str], None]
) -> None:
    """The demo's recipe with smaller towers, under batch norms, whose statistics are of the state, too."""
    corpus, recipe = pictures(monkeypatch, require), ROOT / "configs/demo/pretrain.yaml"
    train = {"global_batch_size": PICTURES_BATCH, "total_samples": PICTURES_STEPS * PICTURES_BATCH}
    overrides = (
        f"data.train={corpus / 'train'}",
        "model.embed_dim=64",
        "model.vision_cfg={timm_model_name: test_resnet, timm_proj: linear, image_size: 32}",
        "model.text_cfg={context_length: 32, width: 64, heads: 2, layers: 1}",
        "optim.lr=3e-3",
        f"schedule.warmup_samples={5 * PICTURES_BATCH}",
        f"train={json.dumps(train | {'log_every_steps': 1, 'device': 'cpu', 'threads': 1})}",
        f"checkpoint.every_steps={EVERY}",
        f"evaluate={json.dumps({'data': str(corpus / 'val'), 'every_steps': 10})}",
        "tracking.wandb=off",
    )
    straight = undisturbed(forker, recipe, tmp_path / "straight", *overrides)
    learned = [loss for _, loss in losses(straight)]
    assert sum(learned[-5:]) < 0.9 * sum(learned[:5])
    held_out = rows(straight, "eval")[-1]
    assert held_out["val/image_to_text_R@5"] > 2 * held_out["val/image_to_text_R@5_chance"]

    run = tmp_path / "killed"
    one, places = runner(forker, recipe, run, *overrides), Places(run)
    instants = faults(5, ("anywhere", "save", "step", "anywhere"), 8, rows=6)
    starts = kill_until_done(one, instants, at_most=2 * EVERY, tell=places.look)
    assert sum(start.killed for start in starts) >= 5
    assert len(places.inside(starts)) >= 2
    per_epoch = sum(row["epoch"] == 0 for row in rows(straight))
    assert most_kills_in_an_epoch(starts, per_epoch) >= 3
    assert differences(run, straight) == []
    assert left_over(run, one.leaders) == []
