"""Cross-validations that are killed, changed and watched: what is kept, and which labels are looked at."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diptych.cli.main import main
from diptych.configs.load import load_config
from diptych.finetune import crossval, scoring, session
from diptych.finetune.config import FinetuneConfig
from diptych.finetune.encoders.features import silent
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report
from diptych.finetune.splits import checks
from diptych.finetune.tables.manifest import Rows, Splits
from diptych.finetune.tasks.task import Ints

from .fold_runs import CV, HEADS, KILLED, NAMES, make_run, permuted, pieces
from .labelled import match_rows, write_config, write_csv, write_task
from .runs import finetune, timeless


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that the tests of this file share and leave as it is."""
    return make_run(tmp_path_factory.mktemp("cv"))


def copy(made: Path, folder: Path) -> Path:
    """The same task and run in another folder."""
    shutil.copytree(made, folder, dirs_exist_ok=True)
    write_config(folder, HEADS)
    return folder


def test_a_killed_run_goes_on_and_only_what_changed_is_trained_anew(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path)
    config = write_config(tmp_path, HEADS)
    # in the second seed of text in the second fold: 4 + 1 heads are finished
    command = [sys.executable, "-c", KILLED, str(config), "11", CV]
    killed = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "run" / "results.json").exists()
    capsys.readouterr()
    results = finetune(tmp_path, CV)
    assert capsys.readouterr().err.count("kept from before") == 5
    whole = json.loads((made / "run" / "results.json").read_text())
    assert timeless(results) == timeless(whole) | {"checkpoint": results["checkpoint"]}
    assert pieces(tmp_path / "run") == pieces(made / "run")
    lines = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert lines == (made / "run" / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in lines.splitlines()] == list(range(lines.count("\n")))
    finetune(tmp_path, CV, "heads.late.rule=learned")
    assert capsys.readouterr().err.count("kept from before") == 6 * 3 + (whole["best"] == "concat")
    finetune(tmp_path, "eval.cv={folds: 3, repeats: 1}")
    assert capsys.readouterr().err.count("kept from before") >= 3 * 3


def test_labels_of_a_folds_test_rows_change_nothing_that_is_trained_for_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(made, tmp_path)
    config = load_config(FinetuneConfig, made / "run" / "config.yaml")
    sessions = session.open_sessions(config, silent, lambda text: None)
    folds = [one.fold for one in sessions[:-1]]
    chosen = folds[1]
    assert chosen is not None
    permuted(tmp_path, chosen.splits.test)
    shutil.rmtree(tmp_path / "run")
    monkeypatch.setattr(session, "make_folds", lambda *args, **options: folds)
    finetune(tmp_path, CV)
    before, after = pieces(made / "run" / chosen.name), pieces(tmp_path / "run" / chosen.name)
    assert len(before) == 4 * 5  # head, history, two seeds and probabilities
    assert after == before
    other = "folds/repeat_0/fold_2"  # where these rows train
    assert pieces(made / "run" / other) != pieces(tmp_path / "run" / other)


class Watched:
    """Targets that note which rows are read; nothing else can be done with them."""

    def __init__(self, targets: Ints) -> None:
        self._targets = targets
        self.read: set[int] = set()

    def __getitem__(self, rows: Any) -> Any:
        self.read |= set(np.atleast_1d(np.arange(len(self._targets))[rows]).tolist())
        return self._targets[rows]


@pytest.mark.parametrize("words", [[], ["eval.cv={folds: 3}"]], ids=["fixed", "folds"])
def test_no_test_label_is_read_before_all_heads_are_trained_and_chosen(
    words: list[str], made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path)
    write_config(tmp_path, HEADS)
    opened: list[Any] = []
    encode: Callable[..., Any] = checks.encode_targets

    def watching(rows: Rows, task: Any, splits: Splits, **options: Any) -> Any:
        targets, classes = encode(rows, task, splits, **options)
        opened.append((splits, Watched(targets)))
        return opened[-1][1], classes

    def written(*args: Any, **options: Any) -> None:
        """The last thing before scores are made."""
        for splits, targets in opened:
            assert targets.read == set(splits.train) | set(splits.inner)
            assert not targets.read & set(splits.test)
        checked.append(len(opened))
        write_run(*args, **options)

    checked: list[int] = []
    write_run = scoring.write_run
    monkeypatch.setattr(checks, "encode_targets", watching)
    from diptych.finetune import protocol

    monkeypatch.setattr(protocol, "write_run", written)
    monkeypatch.setattr(crossval, "write_run", written)
    finetune(tmp_path, *words)
    assert checked == [4 if words else 1]
    assert all(targets.read >= set(splits.test) for splits, targets in opened)


def test_encoders_of_folds_are_not_kept_and_those_of_the_final_model_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_task(tmp_path, names=4)
    write_config(
        tmp_path,
        "{concat: {op: concat, adapt: {method: lp_ft, encoder_lr: 1.0e-3, encoder_epochs: 1}}}",
        more="early_stopping: {metric: loss}\n",
    )
    words = ("eval.cv={folds: 2}", "eval.seeds=[0]")
    results = finetune(tmp_path, *words)
    run = tmp_path / "run"
    assert [str(p.relative_to(run)) for p in run.rglob("encoder_seed_*")] == ["heads/concat/encoder_seed_0"]
    before = pieces(run / "folds")
    (run / "results.json").unlink()
    assert timeless(finetune(tmp_path, *words)) == timeless(results)
    assert pieces(run / "folds") == before
    # other pictures in the test rows of one fold: its heads must be asked again, and the one whose encoders
    # are gone trained again; in the other fold these pictures train
    told = pq.read_table(run / "predictions.parquet").to_pydict()
    rows, other = match_rows(tmp_path, names=4), (tmp_path / "images" / "blue9.png").read_bytes()
    for row in (row for row, fold in zip(rows, told["fold"], strict=True) if fold == 1):
        (tmp_path / row[1]).write_bytes(other)
    capsys.readouterr()
    finetune(tmp_path, *words)
    kept = [line for line in capsys.readouterr().err.splitlines() if "kept from before" in line]
    assert kept == [f"repeat 0, fold 1, {name}: kept from before" for name in ("image", "text")]
    after = pieces(run / "folds")
    same = {name for name in before if "/fold_1/" in name and before[name] == after[name]}
    asked_again = {f"/repeat_0/fold_1/heads/{name}/out_of_fold.safetensors" for name in NAMES[:3]}
    assert {name for name in before if "/fold_1/" in name} - same == asked_again


def test_one_modality_alone_has_no_fusion_gain(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(made, tmp_path)
    words = ("data.modalities={image: {column: image}}", "heads={image: {op: image}}")
    results = finetune(tmp_path, "eval.cv={folds: 3}", *words)
    assert list(results["heads"]) == ["image"]
    assert results["best"] == results["best_single"] == "image"
    assert not {"fusion_gain", "chosen_per_fold"} & set(results)
    assert all(row["gain"] is None for row in results["folds"])
    printed = capsys.readouterr().out
    assert "accuracy by fold" in printed
    assert "Fusion gain" not in printed
    write_report([tmp_path / "run"])
    assert Predictor.load(tmp_path / "run").predict_proba(str(tmp_path / "match.csv")).shape == (160, 2)


def test_folds_that_cannot_be_made_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path)
    config = write_config(tmp_path, HEADS)
    assert main(["finetune", str(config), "eval.cv={folds: 11}"]) == 2
    assert "eval.cv.folds: 11 folds cannot be made of 10 groups" in capsys.readouterr().err
    rows = [[*row[:3], "rare" if row[4] == "s0" else row[3], *row[4:]] for row in match_rows(tmp_path)]
    write_csv(tmp_path / "match.csv", rows)
    assert main(["finetune", str(config), "eval.cv={folds: 2}", "task.type=multiclass"]) == 2
    error = capsys.readouterr().err.strip()
    assert "of repeat 0: " in error
    assert "label 'rare' in column 'target' is no class of the training rows" in error
    assert error.endswith("or set fewer folds")
    assert "\n" not in error
