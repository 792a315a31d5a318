"""A cross-validation beside a held-out test split: what is trained, looked at, counted and told."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from diptych.cli.main import main
from diptych.configs.load import load_config
from diptych.finetune.config import FinetuneConfig
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report
from diptych.finetune.splits import checks

from .labelled import match_rows, write_config, write_csv, write_task
from .runs import contents, finetune, permute_test_labels, timeless

CV = "eval={cv: {folds: 2, rows: without_test}, seeds: [0], bootstrap: 100}"
HEADS = "{late: {op: late}}"


def holdout(folder: Path, *words: str) -> dict[str, Any]:
    assert main(["finetune", str(folder / "finetune.yaml"), "--holdout", *words]) == 0
    return json.loads((folder / "run" / "holdout" / "results.json").read_text())


def looks(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "test_looks.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-validation without the test rows, and their scores."""
    folder = tmp_path_factory.mktemp("holdout")
    write_task(folder, names=4)
    write_config(folder, HEADS)
    finetune(folder, CV)
    holdout(folder, CV)
    return folder


def copy(made: Path, folder: Path) -> Path:
    shutil.copytree(made, folder, dirs_exist_ok=True)
    write_config(folder, HEADS)
    return folder


def test_the_folds_leave_the_test_rows_out_and_the_holdout_is_the_run_on_fixed_splits(
    made: Path, tmp_path: Path
) -> None:
    run = made / "run"
    folds, held = (json.loads((p / "results.json").read_text()) for p in (run, run / "holdout"))
    split = {row[0]: row[5] for row in match_rows(tmp_path, names=4)}
    out_of_fold = pq.read_table(run / "predictions.parquet")["id"].to_pylist()
    assert sorted(out_of_fold) == sorted(i for i, name in split.items() if name != "test")
    assert [split[i] for i in pq.read_table(run / "holdout" / "predictions.parquet")["id"].to_pylist()] == [
        "test"
    ] * 16
    assert (folds["n_test"], held["n_test"]) == (64, 16)
    assert "folds" not in held
    assert "test_looks" not in folds
    write_task(tmp_path, names=4)
    write_config(tmp_path, HEADS)
    fixed = finetune(tmp_path, "eval.seeds=[0]")
    assert timeless(fixed) | {"checkpoint": held["checkpoint"]} == timeless(
        {k: v for k, v in held.items() if k != "holdout"}
    )
    assert contents(tmp_path / "run") == contents(run / "holdout")
    again = load_config(FinetuneConfig, run / "holdout" / "config.yaml")
    assert again.eval.holdout
    assert again == load_config(FinetuneConfig, made / "finetune.yaml", [CV, "eval.holdout=true"])
    assert Predictor.load(run / "holdout").predict({"text": ["red square"]})[0] in ("0", "1")


def test_labels_of_the_test_rows_change_nothing_of_the_folds(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(made, tmp_path)
    shutil.rmtree(tmp_path / "run")
    permute_test_labels(tmp_path, names=4)
    read: list[int] = []
    encode = checks.encode_targets

    def watching(rows: Any, task: Any, splits: Any, **options: Any) -> Any:
        read.extend(i for part in (splits.train, splits.inner, splits.test) for i in part.tolist())
        return encode(rows, task, splits, **options)

    monkeypatch.setattr(checks, "encode_targets", watching)
    results = finetune(tmp_path, CV)
    first = json.loads((made / "run" / "results.json").read_text())
    assert timeless(results) == timeless(first) | {"checkpoint": results["checkpoint"]}
    assert contents(tmp_path / "run") == {
        name: data for name, data in contents(made / "run").items() if not name.startswith("holdout")
    }
    rows = match_rows(tmp_path, names=4)
    assert {rows[i][5] for i in read} == {"train", "val"}


def test_a_seeded_test_split_is_left_out_of_the_folds_too(tmp_path: Path) -> None:
    write_task(tmp_path, names=4)
    write_config(tmp_path, HEADS)
    words = (CV, "data.split=null", "data.test_share=0.3")
    finetune(tmp_path, *words)
    results = holdout(tmp_path, *words)
    folds, held = (
        set(pq.read_table(p / "predictions.parquet")["id"].to_pylist())
        for p in (tmp_path / "run", tmp_path / "run" / "holdout")
    )
    assert not folds & held
    assert len(folds | held) == 80
    assert results["n_test"] == len(held) == 24


def test_looks_at_the_test_split_are_counted_once_per_set_of_models(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(made, tmp_path)
    run = tmp_path / "run" / "holdout"
    (run / "test_looks.jsonl").unlink()
    capsys.readouterr()
    assert holdout(tmp_path, CV)["test_looks"] == 1
    out = capsys.readouterr().out
    assert "The cross-validation of this config leaves its rows out" in out
    assert "Scored on the held-out test split, the first time in this folder." in out
    assert holdout(tmp_path, CV)["test_looks"] == 1  # the same models have the same scores
    assert holdout(tmp_path, CV, "adapt.lr=0.01")["test_looks"] == 2
    assert holdout(tmp_path, CV, "eval.threshold=0.3")["test_looks"] == 3
    assert "set of models number 3 of this folder" in " ".join(capsys.readouterr().out.split())
    assert holdout(tmp_path, CV)["test_looks"] == 3
    lines = looks(run)
    assert [line["look"] for line in lines] == [1, 2, 3]
    assert len({line["key"] for line in lines}) == 3
    assert lines[0]["n_test"] == 16
    page = write_report([tmp_path / "run"], tmp_path / "r.html").read_text()
    assert "run/holdout" in page
    assert "Scored by cross-validation, 2 folds without the rows of the test split" in page
    assert "set of models number 3 of this folder" in page
    (run / "test_looks.jsonl").write_text("no JSON")
    assert main(["finetune", str(tmp_path / "finetune.yaml"), "--holdout", CV]) == 2
    assert "test_looks.jsonl cannot be read" in capsys.readouterr().err


def test_a_look_counts_although_the_run_dies_behind_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(made, tmp_path)
    shutil.rmtree(tmp_path / "run" / "holdout")

    def killed(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        from diptych.finetune import protocol

        patch.setattr(protocol, "evaluate", killed)
        assert main(["finetune", str(tmp_path / "finetune.yaml"), "--holdout", CV]) == 130
    assert len(looks(tmp_path / "run" / "holdout")) == 1


def test_a_cross_validation_of_all_rows_is_told_beside_the_holdout(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(made, tmp_path)
    results = holdout(tmp_path, CV.replace("without_test", "all"))
    assert results["holdout"]["cv"]["rows"] == "all"
    assert "what was chosen by it has seen them" in " ".join(capsys.readouterr().out.split())


def test_what_cannot_stand_in_one_folder_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(made, tmp_path)
    config = str(tmp_path / "finetune.yaml")
    before = contents(tmp_path / "run")
    for words, said in (
        ([], "run holds a cross-validation; keep eval.cv and add --holdout, or give another folder as out"),
        (["--holdout"], "eval: holdout: without cv every run tests on the fixed splits; leave --holdout out"),
    ):
        capsys.readouterr()
        assert main(["finetune", config, *words]) == 2
        error = capsys.readouterr().err.strip()
        assert said in error
        assert "\n" not in error
    assert contents(tmp_path / "run") == before


def test_a_pretraining_runs_folder_is_refused(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(made, tmp_path)
    (tmp_path / "run" / "checkpoints").mkdir()
    before = contents(tmp_path / "run")
    capsys.readouterr()
    assert main(["finetune", str(tmp_path / "finetune.yaml"), CV]) == 2
    assert capsys.readouterr().err.strip().endswith("run holds a pretraining run; set out to another folder")
    assert contents(tmp_path / "run") == before


def test_validate_looks_at_what_will_be_scored(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy(made, tmp_path)
    config = str(tmp_path / "finetune.yaml")
    shown: list[list[tuple[str, int]]] = []
    for words in ([CV], [CV, "--holdout"]):
        capsys.readouterr()
        main(["finetune", config, "--validate", "--json", *words])
        parts = json.loads(capsys.readouterr().out)["parts"]
        shown.append([(part["name"], part["rows"]) for part in parts])
    assert [name for name, _ in shown[0]] == ["repeat 0, fold 0", "repeat 0, fold 1"]
    assert sum(n for _, n in shown[0]) == 64
    assert shown[1] == [("train", 48), ("inner", 16), ("test", 16)]
    rows = match_rows(tmp_path, names=4)
    rows = [[*row[:5], "test" if row[4] == "s0" else "train"] for row in rows]
    write_csv(tmp_path / "match.csv", rows)
    assert np.mean([row[5] == "test" for row in rows]) == 0.1
    capsys.readouterr()
    main(["finetune", config, "--validate", "--json", CV])
    assert sum(part["rows"] for part in json.loads(capsys.readouterr().out)["parts"]) == 72
