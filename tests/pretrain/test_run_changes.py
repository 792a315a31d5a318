"""Settings that change between two starts of a run: what a start that came to nothing leaves, and what is
told of forced ones."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.pretrain.checkpoint import newest_checkpoint
from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.run import run_path
from diptych.pretrain.train import train

from .train_runs import BATCH, load, losses, make_data, write_config

SHORT, LONGER = f"train.total_samples={4 * BATCH}", f"train.total_samples={6 * BATCH}"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("changes")
    data = make_data(folder / "data")
    return write_config(folder / "run.yaml", data, evaluate={"data": None}, checkpoint={"every_steps": 2})


@pytest.fixture
def run(file: Path, tmp_path: Path) -> Path:
    """A run of four steps, with checkpoints of steps 2 and 4."""
    train(load(file, tmp_path / "run", SHORT))
    return tmp_path / "run"


class Full(RuntimeError):
    """Ends a run at its start, as a lack of memory would."""


class Ends:
    """Ends the run before its first step, or after a step."""

    def __init__(self, step: int = 0) -> None:
        self.step = step

    def start(self, facts: dict[str, Any]) -> None:
        if self.step == 0:
            raise Full

    def row(self, row: dict[str, Any]) -> None:
        if row["step"] == self.step:
            raise Full


def changes(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]


def test_a_start_that_trained_nothing_binds_nobody(file: Path, tmp_path: Path) -> None:
    with pytest.raises(Full):
        train(load(file, tmp_path / "run", SHORT, "model.embed_dim=8", "seed=7"), Ends())
    assert train(load(file, tmp_path / "run", SHORT)).step == 4
    assert not (tmp_path / "run" / "changes.jsonl").exists()


def test_rows_of_another_config_are_not_written_over(file: Path, tmp_path: Path) -> None:
    with pytest.raises(Full):
        train(load(file, tmp_path / "run", SHORT), Ends(1))
    with pytest.raises(UserError, match="seed was 0, now 7"):
        train(load(file, tmp_path / "run", SHORT, "seed=7"))


@pytest.mark.parametrize("step", [0, 5])
def test_a_forced_change_of_which_nothing_was_saved_can_be_undone(file: Path, run: Path, step: int) -> None:
    forced = (LONGER, "optim.lr=0.5", "resume.force=true")
    with pytest.raises(Full):
        train(load(file, run, *forced), Ends(step))
    assert changes(run)[-1]["forced"] == {
        "optim.lr": [2e-3, 0.5],
        "train.total_samples": [4 * BATCH, 6 * BATCH],
    }
    undone = Path(shutil.copytree(run, run.with_name("undone")))
    assert train(load(file, undone, SHORT)).step == 4
    if step:
        taken = {"optim.lr": [0.5, 2e-3], "train.total_samples": [6 * BATCH, 4 * BATCH]}
        assert (changes(undone)[-1]["taken"], changes(undone)[-1]["forced"]) == (taken, {})
    if step:  # what was trained with it goes on by the same settings, too
        again = Path(shutil.copytree(run, run.with_name("again")))
        assert train(load(file, again, LONGER, "optim.lr=0.5")).step == 6
    assert train(load(file, run, SHORT)).step == 4
    with pytest.raises(UserError, match=r"optim.lr was 0.002, now 0.1"):
        train(load(file, run, SHORT, "optim.lr=0.1"))


def test_rows_of_this_run_are_not_mixed_with_another_runs(file: Path, run: Path, tmp_path: Path) -> None:
    with pytest.raises(Full):
        train(load(file, tmp_path / "other", SHORT, "seed=7"), Ends(1))
    with pytest.raises(UserError, match="seed was 7, now 0"):
        train(load(file, tmp_path / "other", SHORT, f"resume={run}"))


def test_a_config_that_was_damaged_is_read_from_the_checkpoint(file: Path, run: Path) -> None:
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"seed was 0, now 7"):
        train(load(file, run, SHORT, "seed=7"))
    assert train(load(file, run, SHORT)).step == 4
    assert "model: [" not in (run / "config.yaml").read_text()


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "bad_steps.jsonl"])
def test_a_folder_in_the_place_of_a_runs_file_is_named(name: str, file: Path, run: Path) -> None:
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir()
    with pytest.raises(UserError, match=rf"out: {re.escape(str(run / name))} "):
        train(load(file, run, LONGER, "resume.force=true"))


def test_other_data_that_is_forced_is_written_down(file: Path, run: Path) -> None:
    other = make_data(run.with_name("data"))
    shutil.rmtree(other / "train")
    shutil.copytree(other / "val", other / "train")
    forced = (LONGER, f"data.train={other / 'train'}")
    with pytest.raises(UserError, match=r"data.train"):
        train(load(file, run, *forced[1:], SHORT))
    assert train(load(file, run, *forced, "resume.force=true")).step == 6
    was, now = changes(run)[-1]["forced"]["data.train"]
    assert was != now
    assert train(load(file, run, *forced)).step == 6  # and binds from then on


def test_an_average_neither_begins_nor_ends_and_nobody_is_told_to_force_it(file: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"optim.ema_decay was 0.9, now null: an average neither") as caught:
        train(load(file, run, SHORT, "optim.ema_decay=null", "resume.force=true"))
    assert "force" not in str(caught.value)
    assert train(load(file, run, LONGER, "optim.ema_decay=0.99", "resume.force=true")).step == 6


def test_what_resume_names_is_told_to_be_passed_over_once_a_run_has_its_own(
    file: Path, run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older = run / "checkpoints" / "step_00000002"
    gone = run.with_name("pruned") / "checkpoints" / "step_00000009"
    for given in (older, gone):  # the line that a run began with still starts it again
        assert train(load(file, run, SHORT, f"resume={given}")).step == 4
        assert f"{given} is passed over, since {run} goes on from its own step_00000004" in caplog.text
    assert train(load(file, run.with_name("back"), SHORT, f"resume={older}")).step == 4
    assert losses(run.with_name("back")) == losses(run)[2:]
    caplog.clear()
    for given in (newest_checkpoint(run), run):
        assert train(load(file, run, SHORT, f"resume={given}")).step == 4
    assert not caplog.messages


def test_a_run_that_was_moved_does_not_begin_anew_where_it_was(
    file: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = run.rename(tmp_path / "moved")
    words = ["pretrain", str(moved / "config.yaml")]
    assert main(words) == 2
    assert f"says {run}; add out={moved} to go on with that run" in capsys.readouterr().err
    assert not run.exists()
    assert main([*words, f"out={moved}"]) == 0
    assert main(words) == 0  # it knows where it is, now


def test_out_may_be_a_number_or_begin_at_home(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    given = {"out=4711": Path("4711"), "out=~/runs/a": tmp_path / "runs/a", "out=a~b": Path("a~b")}
    for word, folder in given.items():
        assert run_path(load_config(PretrainConfig, file, [word])) == folder
