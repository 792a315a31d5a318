"""Thresholds for F1, beside brute force with scikit-learn, and runs that choose them without test rows."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.cli.main import main
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report
from diptych.finetune.tasks.task import Task
from diptych.finetune.tasks.thresholds import best_threshold, choose_thresholds, decided

from .labelled import COLUMNS, match_rows, write_config, write_csv, write_task
from .runs import contents, finetune, permute_test_labels

AUTO = "eval.threshold=auto"
probabilities = st.one_of(st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1))


def f1(truth: Any, said: Any) -> float:
    return float(sk.f1_score(truth, said, zero_division=0))


def brute_force(truth: Any, p: Any) -> float:
    """Every range of thresholds that says something else, by its middle, or by 0.5."""
    values = sorted(set(p.tolist()))
    ranges = list(zip([0.0, *values[:-1]], values, strict=True))
    found: list[tuple[float, float, float]] = []
    for low, high in ranges:
        middle = (low + high) / 2
        t = 0.5 if low < 0.5 <= high else middle if middle > low else high
        found.append((f1(truth, p >= t), -abs(t - 0.5), -t))
    if values[-1] < 0.5:
        found.append((f1(truth, p >= 0.5), 0.0, -0.5))
    return -max(found)[2]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.booleans(), probabilities), min_size=1, max_size=8))
def test_the_threshold_is_that_of_brute_force(rows: list[tuple[bool, float]]) -> None:
    truth, p = np.array([t for t, _ in rows]), np.array([value for _, value in rows])
    found = best_threshold(truth, p)
    assert found == brute_force(truth, p)
    every = [0.0, 0.5, *p, np.nextafter(p.max(), 2)]  # what is said changes nowhere else
    assert f1(truth, p >= found) == max(f1(truth, p >= t) for t in every)


def test_equal_ranges_and_rows_without_positives() -> None:
    truth = np.array([True, False, True])
    assert best_threshold(truth, np.array([0.2, 0.1, 0.3])) == pytest.approx(0.15)  # the middle of the range
    assert best_threshold(truth, np.array([0.7, 0.1, 0.9])) == 0.5  # which lies in it
    assert best_threshold(~truth & False, np.array([0.2, 0.9, 0.3])) == 0.5
    assert best_threshold(np.array([True, True]), np.array([0.4, 0.4])) == pytest.approx(0.2)
    close = np.nextafter(0.3, 1)
    assert best_threshold(np.array([False, True]), np.array([0.3, close])) == close  # no float lies between


def test_what_is_said_is_what_the_thresholds_say() -> None:
    random = np.random.default_rng(0)
    p = random.random((50, 3))
    task = Task("multilabel", ("a", "b", "c"))
    targets = (random.random((50, 3)) < 0.3).astype(np.int64)
    chosen = choose_thresholds(task, targets, p)
    said = task.predicted(decided(task, p, chosen))
    for c in range(3):
        assert f1(targets[:, c], said[:, c]) == max(f1(targets[:, c], p[:, c] >= t) for t in p[:, c])
    rows = np.where(np.arange(50)[:, None] < 25, [chosen], [[0.5, 0.5, 0.5]])
    both = decided(task, p, rows)
    assert np.array_equal(both[:25], decided(task, p[:25], chosen))
    assert np.array_equal(task.predicted(both[25:]), p[25:] >= 0.5)
    three = Task("multiclass", ("a", "b", "c"))
    assert choose_thresholds(three, targets[:, 0], p) == []
    assert decided(three, p, []) is p


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("thresholds")
    write_task(folder)
    write_config(folder, "{late: {op: late}}")
    finetune(folder, AUTO)
    return folder


def test_a_run_scores_and_predicts_with_thresholds_of_its_inner_rows(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made / "run"
    results = json.loads((run / "results.json").read_text())
    table = pq.read_table(run / "predictions.parquet").to_pydict()
    truth = np.array(table["target"]) == "1"
    inner = [row for row in match_rows(tmp_path) if row[5] == "val"]
    test = [row for row in match_rows(tmp_path) if row[5] == "test"]
    path = write_csv(tmp_path / "test.csv", test)
    for name, head in results["heads"].items():
        t = results["threshold"]["heads"][name]["1"]
        predictor = Predictor.load(run, head=name)
        assert predictor.thresholds == [t]
        p = predictor.predict_proba(write_csv(tmp_path / "inner.csv", inner))[:, 1]
        labels = [row[3] for row in inner]
        assert f1(labels, p >= t) == pytest.approx(max(f1(labels, p >= other) for other in [*p, 0.5]))
        said = np.array(table[f"{name}:1"]) >= t
        assert head["metrics"]["accuracy"]["value"] == pytest.approx(sk.accuracy_score(truth, said))
        assert head["metrics"]["f1"]["value"] == pytest.approx(f1(truth, said))
        assert head["metrics"]["auroc"]["value"] == pytest.approx(sk.roc_auc_score(truth, table[f"{name}:1"]))
        assert predictor.predict(path) == ["1" if one else "0" for one in said]
        assert predictor.evaluate(path)["metrics"]["f1"]["value"] == pytest.approx(f1(truth, said))
    cells = results["missing"]["cells"]
    assert cells[0]["metrics"]["accuracy"] == results["heads"][results["best"]]["metrics"]["accuracy"]
    assert results["threshold"]["setting"] == "auto"
    assert results["threshold"]["heads"]["text"]["1"] != 0.5  # a fair coin: all are said
    capsys.readouterr()
    assert main(["predict", str(run), str(path), "-o", str(tmp_path / "o.csv"), "--head", "text"]) == 0
    assert {line.split(",")[len(COLUMNS)] for line in (tmp_path / "o.csv").read_text().splitlines()[1:]} == {
        "1"
    }
    page = write_report([run], tmp_path / "r.html").read_text()
    assert "which have the greatest F1 on the inner rows: 1 0." in page


def test_another_threshold_trains_nothing_anew(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    write_config(tmp_path, "{late: {op: late}}")
    capsys.readouterr()
    results = finetune(tmp_path, "eval.threshold=0.25")
    assert capsys.readouterr().err.count("kept from before") == 4
    p = np.array(pq.read_table(tmp_path / "run" / "predictions.parquet")["late:1"])
    assert Predictor.load(tmp_path / "run", head="late").thresholds == [0.25]
    truth = np.array(pq.read_table(tmp_path / "run" / "predictions.parquet")["target"].to_pylist()) == "1"
    assert results["heads"]["late"]["metrics"]["f1"]["value"] == pytest.approx(f1(truth, p >= 0.25))
    assert finetune(tmp_path)["heads"]["late"]["metrics"]["f1"]["value"] == pytest.approx(f1(truth, p >= 0.5))


def test_labels_of_the_test_change_no_threshold_and_those_of_the_inner_rows_do(
    made: Path, tmp_path: Path
) -> None:
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    shutil.rmtree(tmp_path / "run")
    write_config(tmp_path, "{late: {op: late}}")
    permute_test_labels(tmp_path)
    results = finetune(tmp_path, AUTO)
    first = json.loads((made / "run" / "results.json").read_text())
    assert results["threshold"] == first["threshold"]
    assert contents(tmp_path / "run") == contents(made / "run")
    assert results["heads"]["late"]["metrics"]["f1"] != first["heads"]["late"]["metrics"]["f1"]


def test_folds_have_thresholds_of_their_own(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "images", tmp_path / "images")
    shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")
    write_csv(tmp_path / "match.csv", match_rows(tmp_path))
    write_config(tmp_path, "{late: {op: late}}")
    results = finetune(tmp_path, AUTO, "eval.cv={folds: 3}")
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    truth, fold = np.array(table["target"]) == "1", np.array(table["fold"])
    for name, head in results["heads"].items():
        limits = np.array([one["threshold"]["heads"][name]["1"] for one in results["folds"]])
        said = np.array(table[f"{name}:1"]) >= limits[fold]
        assert head["metrics"]["f1"]["value"] == pytest.approx(f1(truth, said))
        assert head["metrics"]["accuracy"]["value"] == pytest.approx(sk.accuracy_score(truth, said))
        for number, row in enumerate(results["folds"]):
            mine = fold == number
            assert row["scores"][name] == pytest.approx(sk.accuracy_score(truth[mine], said[mine]))
    best = results["best"]
    assert Predictor.load(tmp_path / "run").thresholds == [results["threshold"]["heads"][best]["1"]]


def test_labels_have_a_threshold_each(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "images", tmp_path / "images")
    shutil.copytree(made / "checkpoint", tmp_path / "checkpoint")
    columns = ("id", "image", "text", "red", "light", "split")
    rows = [
        [row[0], row[1], row[2], int("red" in row[0]), int(int(row[4][1:]) % 2), row[5]]
        for row in match_rows(tmp_path)
    ]
    write_csv(tmp_path / "match.csv", rows, columns)
    write_config(tmp_path, "[concat]")
    words = ("task={type: multilabel, target: [red, light]}", "data.group=null")
    results = finetune(tmp_path, AUTO, *words)
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    truth = np.array([["red" in said, "light" in said] for said in table["target"]])
    limits = results["threshold"]["heads"]["concat"]
    said = np.stack([np.array(table[f"concat:{name}"]) >= limits[name] for name in ("red", "light")], axis=1)
    metrics = results["heads"]["concat"]["metrics"]
    assert metrics["micro_f1"]["value"] == pytest.approx(sk.f1_score(truth, said, average="micro"))
    assert metrics["macro_f1"]["value"] == pytest.approx(sk.f1_score(truth, said, average="macro"))
    predictor = Predictor.load(tmp_path / "run", head="concat")
    test = write_csv(tmp_path / "test.csv", [row for row in rows if row[5] == "test"], columns)
    expected = [[n for n, one in zip(("red", "light"), row, strict=True) if one] for row in said]
    assert predictor.predict(test) == expected


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.threshold=1.5"], "eval.threshold"),
        (["eval.threshold=best"], "eval.threshold"),
        (["eval.threshold=auto", "task={type: regression}"], "eval.threshold: regression tasks have none"),
    ],
)
def test_thresholds_that_are_none_are_told(
    words: list[str], said: str, made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["finetune", str(made / "finetune.yaml"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error
