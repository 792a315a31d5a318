"""Whole runs whose weights and batches are broken on purpose: left out, gone back, gone on, stopped."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.configs.errors import UserError
from diptych.pretrain import parts
from diptych.pretrain.checkpoint import newest_checkpoint, read_document, read_tensors
from diptych.pretrain.guard import Guard
from diptych.pretrain.model import ContrastiveModel
from diptych.pretrain.train import _Run, train

from ..pretrain.train_runs import BATCH, load, losses, make_data, rows, write_config

LADDER = ("guard.max_skips=2", "guard.window_steps=10", "guard.max_rollbacks=1", "evaluate.every_steps=20")


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("guarded")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


def bad_steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "bad_steps.jsonl").read_text().splitlines()]


def weights(run: Path, file: str = "train_model.safetensors") -> dict[str, torch.Tensor]:
    folder = newest_checkpoint(run)
    assert folder is not None
    return read_tensors(folder / file)


def events(run: Path) -> list[tuple[str, int]]:
    return [(row["event"], row["at_step"]) for row in rows(run, "guard")]


Hit = Callable[[_Run, int], None]


def before_step(patch: pytest.MonkeyPatch, hit: Hit) -> None:
    """``hit(run, step)`` before every step, counted from 1."""
    enter = _Run._enter_step

    def entering(self: _Run) -> float:
        hit(self, self.state.step + 1)
        return enter(self)

    patch.setattr(_Run, "_enter_step", entering)


def break_weights(at: int, value: float = torch.nan) -> Hit:
    def hit(run: _Run, step: int) -> None:
        if step == at:
            with torch.no_grad():
                run.clip.visual.conv1.weight[0, 0] = value

    return hit


def poison(*at: int) -> Hit:
    """Pixels past all bounds in some steps."""
    now = [0]
    whole = ContrastiveModel.pixels

    def pixels(self: ContrastiveModel, image: torch.Tensor) -> torch.Tensor:
        return whole(self, image) * (1e38 if self.training and now[0] in at else 1.0)

    ContrastiveModel.pixels = pixels

    def hit(_: _Run, step: int) -> None:
        now[0] = step

    return hit


@pytest.fixture
def own_pixels() -> Any:
    whole = ContrastiveModel.pixels
    yield
    ContrastiveModel.pixels = whole


def test_a_run_that_took_up_another_goes_back_to_where_it_began(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(load(config, tmp_path / "first", *LADDER, "train.total_samples=64"))
    before_step(monkeypatch, break_weights(6))
    start = f"resume={{start: {tmp_path / 'first'}, force: true}}"
    outcome = train(load(config, tmp_path / "run", *LADDER, start, "checkpoint.every_steps=50"))
    assert (outcome.step, outcome.stopped) == (20, False)
    assert bad_steps(tmp_path / "run")[-1].items() >= {"checkpoint": "step_00000004", "first_step": 5}.items()


def test_where_a_run_began_is_not_gone_back_to_if_it_is_damaged_by_then(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = tmp_path / "first"
    train(load(config, first, *LADDER, "train.total_samples=64"))
    (newest,) = (first / "checkpoints").iterdir()
    file = newest / "train_model.safetensors"

    def hit(run: _Run, step: int) -> None:
        if step == 6:
            file.write_bytes(file.read_bytes()[:-1] + b"!")
            break_weights(6)(run, step)

    before_step(monkeypatch, hit)
    start = f"resume={{start: {first}, force: true}}"
    with pytest.raises(UserError, match="there is no checkpoint to go back to"):
        train(load(config, tmp_path / "run", *LADDER, start, "checkpoint.every_steps=50"))


def test_weights_that_broke_are_the_checkpoints_again_and_the_data_goes_on(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, break_weights(9))
    outcome = train(load(config, tmp_path / "run", *LADDER))
    assert (outcome.step, outcome.stopped) == (20, False)
    named = bad_steps(tmp_path / "run")
    assert [(row["step"], row["reason"]) for row in named] == [
        *((9, "not finite"), (10, "not finite"), (11, "not finite"), (11, "rollback"))
    ]
    assert {"checkpoint": "step_00000006", "first_step": 7, "last_step": 11}.items() <= named[-1].items()
    assert events(tmp_path / "run") == [("skip", 9), ("skip", 10), ("skip", 11), ("rollback", 11)]
    last = rows(tmp_path / "run")[-1]
    assert (last["skipped_steps"], last["rollbacks"], last["samples_seen"]) == (3, 1, 20 * BATCH)
    assert [step for step, loss in losses(tmp_path / "run") if loss is None] == [9, 10, 11]
    assert all(value.isfinite().all() for value in weights(tmp_path / "run").values())
    folder = newest_checkpoint(tmp_path / "run")
    assert folder is not None
    trainer = read_document(folder / "trainer.json")
    assert (trainer["guard"]["rollbacks"], trainer["step"]) == (1, 20)
    assert (trainer["stream"]["epoch"], trainer["stream"]["step"]) == divmod(20, 60 // BATCH)


@pytest.mark.usefixtures("own_pixels")
def test_five_poisoned_batches_are_passed_and_a_gpus_way_gives_the_same(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before_step(monkeypatch, poison(8, 9, 10, 11, 12))
    train(load(config, tmp_path / "branch", *LADDER))
    assert events(tmp_path / "branch") == [
        *(("skip", 8), ("skip", 9), ("skip", 10), ("rollback", 10), ("skip", 11), ("skip", 12))
    ]
    monkeypatch.setattr(parts, "Guard", partial(Guard, waits=True))
    train(load(config, tmp_path / "masked", *LADDER))
    assert bad_steps(tmp_path / "masked") == bad_steps(tmp_path / "branch")
    masked, branch = losses(tmp_path / "masked"), losses(tmp_path / "branch")
    assert masked == branch
    for name, value in weights(tmp_path / "branch").items():
        assert value.equal(weights(tmp_path / "masked")[name]), name


def test_the_ladders_end_names_the_list_and_what_to_lower(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(run: _Run, step: int) -> None:
        if step >= 9:
            break_weights(step)(run, step)

    before_step(monkeypatch, always)
    out = tmp_path / "run"
    with pytest.raises(UserError) as caught:
        train(load(config, out, *LADDER, "checkpoint.every_steps=8"))
    message = str(caught.value)
    for word in ("optim.lr", "0.002", "step 14", "12, 13, 14", "bad_steps.jsonl", "guard.max_rollbacks"):
        assert word in message, word
    assert [path.name for path in sorted((out / "checkpoints").iterdir())] == ["step_00000008"]
    monkeypatch.undo()
    raised = [option for option in LADDER if "max_rollbacks" not in option] + ["guard.max_rollbacks=2"]
    assert train(load(config, out, *raised)).step == 20


def test_no_checkpoint_holds_weights_that_do_not_work(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step before the checkpoint breaks the weights: no loss has shown it yet."""
    settle = Guard.settle
    broken: list[int] = []

    def breaking(self: Guard, *, due: bool = True) -> None:
        settle(self, due=due)
        if self._state.step == 12 and not broken:
            broken.append(12)
            with torch.no_grad():
                self._state.clip.visual.conv1.weight.fill_(1e30)  # finite, and too large to work

    monkeypatch.setattr(Guard, "settle", breaking)
    train(load(config, tmp_path / "run", *LADDER, "checkpoint.keep=9"))
    assert events(tmp_path / "run") == [("rollback", 12)]
    first, second = (
        read_tensors(tmp_path / "run" / "checkpoints" / name / "train_model.safetensors")
        for name in ("step_00000006", "step_00000012")
    )
    for name, value in first.items():
        assert value.equal(second[name]), name


SCRIPT = """
import os, signal, sys
sys.path.insert(0, {root!r})
import pytest
from tests.faults.test_guard_runs import before_step, break_weights
from diptych.cli.main import main
from diptych.pretrain.parts import RunParts

before_step(pytest.MonkeyPatch(), break_weights(9))
log = RunParts.log

def dying(self, kind, row):
    log(self, kind, row)
    if os.environ.get("DIE_AT") == str(self.state.step) and kind == "train":
        os.kill(os.getpid(), signal.SIGKILL)

RunParts.log = dying
sys.exit(main(["pretrain", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dies", [10, 11, 15])
def test_a_run_killed_on_the_ladder_goes_on_to_the_same_end(dies: int, config: Path, tmp_path: Path) -> None:
    script = tmp_path / "run.py"
    script.write_text(SCRIPT.format(root=str(Path(__file__).parents[2])))

    def run(out: Path, die_at: int | None) -> int:
        dying = {} if die_at is None else {"DIE_AT": str(die_at)}
        command = [
            sys.executable,
            str(script),
            str(config),
            f"out={out}",
            *LADDER,
            "checkpoint.every_steps=8",
        ]
        return subprocess.run(command, env=os.environ | dying, timeout=300, check=False).returncode

    assert run(tmp_path / "straight", None) == 0
    assert run(tmp_path / "killed", dies) == -signal.SIGKILL
    assert run(tmp_path / "killed", None) == 0
    assert losses(tmp_path / "killed") == losses(tmp_path / "straight")
    assert bad_steps(tmp_path / "killed") == bad_steps(tmp_path / "straight")
    assert events(tmp_path / "killed") == events(tmp_path / "straight")
    for file in ("train_model.safetensors", "open_clip_model.safetensors", "optimizer.safetensors"):
        expected = weights(tmp_path / "straight", file)
        for name, value in weights(tmp_path / "killed", file).items():
            assert value.equal(expected[name]), (file, name)


def spike(at: int, patch: pytest.MonkeyPatch) -> None:
    """The loss of one step, and so its gradients, a hundred times as large."""
    whole = _Run._loss

    def larger(self: _Run, batch: Any, features: Any) -> torch.Tensor:
        return whole(self, batch, features) * (100.0 if self.state.step + 1 == at else 1.0)

    patch.setattr(_Run, "_loss", larger)


@pytest.mark.parametrize("waits", [False, True], ids=["branch", "masked"])
def test_a_spike_is_left_out_where_asked_and_told_by_default(
    waits: bool, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "Guard", partial(Guard, waits=waits))
    watch = ("guard.spike.window_steps=10", "guard.spike.threshold=30")
    kept = ("checkpoint.every_steps=1", "checkpoint.keep=30")
    skip, warn = (
        load(config, tmp_path / way, *watch, *kept, f"guard.spike.action={way}") for way in ("skip", "warn")
    )
    spike(15, monkeypatch)
    train(skip)
    train(warn)
    assert events(tmp_path / "skip") == [("skip", 15)]
    assert events(tmp_path / "warn") == [("spike", 15)]
    assert [(row["step"], row["reason"]) for row in bad_steps(tmp_path / "skip")] == [(15, "spike")]
    assert not (tmp_path / "warn" / "bad_steps.jsonl").exists()
    for way, left_out in (("skip", True), ("warn", False)):
        last = rows(tmp_path / way)[-1]
        assert (last["spikes"], last["skipped_steps"]) == (1, int(left_out))
        before, after = (
            read_tensors(tmp_path / way / "checkpoints" / f"step_{step:08d}" / "train_model.safetensors")
            for step in (14, 15)
        )
        assert all(value.equal(after[name]) for name, value in before.items()) == left_out
    assert losses(tmp_path / "skip")[:15] == losses(tmp_path / "warn")[:15]


def test_a_collapse_is_told_once_also_over_a_resume(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All features are the same from the second step on."""

    def alike(run: _Run, step: int) -> None:
        if step > 1:
            with torch.no_grad():
                for name, value in run.clip.named_parameters():
                    if name in ("visual.proj", "text.text_projection"):
                        value.zero_()

    before_step(monkeypatch, alike)
    options = ("guard.collapse_after_samples=64", "evaluate.every_steps=4", "optim.lr=1e-9")
    run = tmp_path / "run"
    train(load(config, run, *options, "train.total_samples=192"))
    told = [("collapse", 4), ("chance", 4)]
    assert events(run) == told
    outcome = train(load(config, run, *options, "resume.force=true"))
    assert outcome.step == 20
    assert {row["step"] for row in rows(run, "eval")} == {4, 8, 12, 16, 20}
    assert events(run) == told
    train(load(config, tmp_path / "quiet", *options, "guard.collapse_after_samples=null"))
    assert events(tmp_path / "quiet") == []
