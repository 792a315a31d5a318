"""Whole runs on coloured squares through the command line: what is kept, what is looked at, what is told."""

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk
import torch

from diptych.cli.main import main
from diptych.configs.load import load_config
from diptych.finetune.config import FinetuneConfig
from diptych.finetune.predictor import Predictor

from ..pretrain.train_runs import held
from .labelled import COLUMNS, match_rows, write_config, write_csv, write_task
from .runs import contents, finetune, permute_test_labels, stop_at, timeless

HEADS = "{concat: {op: concat, interactions: true}, cross: {op: cross, width: 8, heads: 2}, late: {op: late}}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_task(tmp_path)
    write_config(tmp_path, HEADS)
    return tmp_path


def test_a_run_scores_every_head_beside_chance_and_the_single_modalities(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = finetune(folder)
    printed = capsys.readouterr()
    assert list(results["heads"]) == ["image", "text", "concat", "cross", "late"]
    assert (results["n_train"], results["n_inner"], results["n_test"]) == (96, 32, 32)
    assert results["n_test_groups"] == 2
    assert results["chance"] == results["majority"] == 0.5
    assert results["best"] in ("concat", "cross", "late")
    assert results["headline"] in printed.out
    for said in (results["headline"], results["fusion_gain"]["text"]):  # of two groups
        assert "too few groups (2) for a verdict" in said
        assert not any(verdict in said for verdict in ("better than", "worse than", "not told from"))
    assert "diptych predict" in printed.out
    for name, head in results["heads"].items():
        assert head["metrics"]["accuracy"]["low"] <= head["metrics"]["accuracy"]["value"]
        assert ("vs_best_single" in head) == (name not in ("image", "text"))
    for modality in ("image", "text"):  # each picture once with either answer: a fair coin
        assert results["heads"][modality]["metrics"]["accuracy"]["value"] == 0.5
    # every number comes from the probabilities that were written down
    table = pq.read_table(folder / "run" / "predictions.parquet").to_pydict()
    truth = np.array(table["target"]) == "1"
    for name, head in results["heads"].items():
        p = np.array(table[f"{name}:1"])
        assert head["metrics"]["accuracy"]["value"] == pytest.approx(sk.accuracy_score(truth, p >= 0.5))
        assert head["metrics"]["auroc"]["value"] == pytest.approx(sk.roc_auc_score(truth, p))
    rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(len(rows)))
    assert {row["kind"] for row in rows} == set(results["heads"])
    # the run's own config runs again, and its encoders load in open_clip
    again = load_config(FinetuneConfig, folder / "run" / "config.yaml")
    assert again == load_config(FinetuneConfig, folder / "finetune.yaml")
    open_clip.create_model_and_transforms(f"local-dir:{folder / 'run' / 'encoder'}")


def test_one_seed_gives_one_result(folder: Path) -> None:
    first = finetune(folder)
    weights = contents(folder / "run")
    shutil.rmtree(folder / "run")
    assert timeless(finetune(folder)) == timeless(first)
    assert contents(folder / "run") == weights


def test_a_stopped_run_goes_on_where_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = finetune(folder)
    metrics = (folder / "run" / "metrics.jsonl").read_bytes()
    weights = contents(folder / "run")
    shutil.rmtree(folder / "run")
    stop_at("cross", folder, monkeypatch)
    assert not (folder / "run" / "results.json").exists()
    capsys.readouterr()
    resumed = finetune(folder)
    assert capsys.readouterr().err.count("kept from before") == 3
    assert timeless(resumed) == timeless(whole)
    assert (folder / "run" / "metrics.jsonl").read_bytes() == metrics
    assert contents(folder / "run") == weights
    before = (folder / "run" / "heads" / "late" / "head.json").stat().st_mtime_ns
    finetune(folder, "heads.concat.width=16")  # one head's setting changes: that one alone is made anew
    assert capsys.readouterr().err.count("kept from before") == 4
    assert (folder / "run" / "heads" / "late" / "head.json").stat().st_mtime_ns == before


def test_a_folder_takes_one_run_at_a_time(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["finetune", str(folder / "finetune.yaml"), "heads=[late]"]
    assert main(words) == 0
    kept = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    with held(folder / "run") as pid:
        assert main([*words, "adapt.lr=0.1"]) == 2
        assert f"run is in use by process {pid} on " in capsys.readouterr().err
    (folder / "run" / "lock").unlink()
    assert {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()} == kept
    assert main(words) == 0


def test_a_head_is_not_kept_for_modalities_in_another_order(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Weights are laid out in the order of the config."""
    order = "{text: {column: text}, image: {column: image}}"
    first = finetune(folder, "heads=[concat]")
    capsys.readouterr()
    finetune(folder, "heads=[concat]", f"data.modalities={order}")
    assert "kept from before" not in capsys.readouterr().err
    again = finetune(folder, "heads=[concat]")
    assert again["heads"]["concat"]["metrics"] == first["heads"]["concat"]["metrics"]


def test_a_head_of_an_unfinished_run_is_not_read_with_an_earlier_runs_classes(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(folder, "heads=[concat, late]")
    words = ("heads=[concat, late]", "task.positive=0")
    stop_at("late", folder, monkeypatch, *words)
    ask = ["predict", str(folder / "run"), str(folder / "match.csv"), "-o", str(folder / "o.csv"), "--head"]
    capsys.readouterr()
    assert main([*ask, "concat"]) == 2
    assert "head 'concat' was trained again by a run that did not finish" in capsys.readouterr().err
    assert main([*ask, "late"]) == 0
    finetune(folder, *words)
    assert main([*ask, "concat"]) == 0


def test_labels_of_the_test_change_no_weight(folder: Path) -> None:
    first = finetune(folder)
    weights, best = contents(folder / "run"), first["best"]
    shutil.rmtree(folder / "run")
    permute_test_labels(folder)
    second = finetune(folder)
    assert contents(folder / "run") == weights
    assert second["best"] == best
    assert second["heads"]["concat"]["metrics"] != first["heads"]["concat"]["metrics"]


def test_predictions_are_the_runs_own_also_after_it_moved_and_lost_its_checkpoint(folder: Path) -> None:
    results = finetune(folder)
    table = pq.read_table(folder / "run" / "predictions.parquet").to_pydict()
    moved = folder / "elsewhere"
    shutil.move(folder / "run", moved)
    shutil.rmtree(folder / "checkpoint")
    rows = [row for row in match_rows(folder) if row[5] == "test"]
    write_csv(folder / "test.csv", rows)
    for head in results["heads"]:
        p = Predictor.load(moved, head=head).predict_proba(folder / "test.csv")
        assert p.shape == (32, 2)
        assert np.abs(p[:, 1] - np.array(table[f"{head}:1"])).max() < 1e-5
        twice = Predictor.load(moved, head=head).predict_proba(folder / "test.csv")
        assert np.array_equal(p, twice)
    assert main(["predict", str(moved), str(folder / "test.csv"), "-o", str(folder / "out.csv")]) == 0
    with (folder / "out.csv").open() as file:
        answers = list(csv.DictReader(file))
    assert list(answers[0]) == [*COLUMNS, "prediction", "p_0", "p_1"]
    best = np.array(table[f"{results['best']}:1"])
    assert [row["id"] for row in answers] == [row[0] for row in rows]
    assert [row["prediction"] for row in answers] == ["1" if p >= 0.5 else "0" for p in best]
    assert np.abs(np.array([float(row["p_1"]) for row in answers]) - best).max() < 1e-5


def test_encoders_that_are_trained_are_kept_with_the_head(folder: Path) -> None:
    write_config(
        folder,
        "{tuned: {op: bilinear, adapt: {method: lp_ft, encoder_lr: 1.0e-3, encoder_batch_size: 16}}}",
        more="early_stopping: {metric: loss}\n",
    )
    results = finetune(folder)
    assert results["heads"]["tuned"]["method"] == "lp_ft"
    assert results["heads"]["tuned"]["params"] > 24 * 24 * 2
    own = folder / "run" / "heads" / "tuned" / "encoder_seed_0"
    model: Any = open_clip.create_model_and_transforms(f"local-dir:{own}")[0]
    base: Any = open_clip.create_model_and_transforms(f"local-dir:{folder / 'run' / 'encoder'}")[0]
    assert not torch.equal(model.visual.conv1.weight, base.visual.conv1.weight)
    table = pq.read_table(folder / "run" / "predictions.parquet").to_pydict()
    write_csv(folder / "test.csv", [row for row in match_rows(folder) if row[5] == "test"])
    p = Predictor.load(folder / "run", head="tuned").predict_proba(folder / "test.csv")
    assert np.abs(p[:, 1] - np.array(table["tuned:1"])).max() < 1e-5


def test_more_than_two_classes_with_calibration_and_a_seeded_split(folder: Path) -> None:
    rows = [
        [*row[:3], row[0].rstrip("0123456789-"), row[4], row[5]] for row in match_rows(folder) if row[3] == 1
    ]
    write_csv(folder / "match.csv", rows)
    text = write_config(folder, "[concat, gated, bilinear, weighted_sum, late]").read_text()
    text = text.replace("type: binary", "type: multiclass").replace("id: id", "id: id, split: null")
    (folder / "finetune.yaml").write_text(
        text.replace("bootstrap: 100", "bootstrap: 100, calibration: temperature")
    )
    results = finetune(folder)
    assert len(results["classes"]) == 8
    assert results["chance"] == 1 / 8
    assert list(results["heads"]["late"]["metrics"]) == [
        "accuracy", "balanced_accuracy", "macro_f1", "brier", "ece",
    ]  # fmt: skip
    predictor = Predictor.load(folder / "run")
    said = predictor.predict({"text": ["red square", "blue square"]})
    assert set(said) <= set(results["classes"])
    assert predictor.predict_proba([{"text": "red square"}]).shape == (1, 8)


def test_broken_pictures_stop_the_run_or_are_listed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = folder / "images" / "red0.png"
    broken.write_bytes(b"no picture")
    assert main(["finetune", str(folder / "finetune.yaml")]) == 2
    error = capsys.readouterr().err
    assert "row 1: image" in error
    assert "(2 such rows)" in error
    assert "data.on_error=quarantine" in error
    assert main(["finetune", str(folder / "finetune.yaml"), "data.on_error=quarantine"]) == 2
    assert "2 of 160 rows are too many" in capsys.readouterr().err
    with (folder / "run" / "quarantine.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert [row["id"] for row in listed] == ["red0-1", "red0-0"]
    rows = match_rows(folder)
    broken.write_bytes(b"no picture")
    write_csv(folder / "match.csv", [row for row in rows if row[0] != "red0-0"])
    assert finetune(folder, "data.on_error=quarantine", "heads=[late]")["n_train"] == 94


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["heads.late.op=lat"], "data.modalities has no lat; did you mean 'late'?"),
        (["heads.late.rank=3"], "rank is no option of late (its options: rule); remove it"),
        (["heads.cross.width=9"], "width 9 is no multiple of heads 2"),
        (["heads.concat.adapt={lrr: 1}"], "heads.concat.adapt: unknown key lrr; known here: method, lr,"),
        (["heads.concat.adapt={lr: -1}"], "heads.concat.adapt.lr: input should be greater than 0, not -1"),
        (["heads=[late, late]"], "late stands twice"),
        (["heads.text={op: late}"], "'text' is the name of the baseline"),
        (["heads={concat: {op: late}}"], "'concat' is the name of the baseline; call this late head"),
        (["eval.cv={folds: 1}"], "eval.cv.folds: input should be greater than or equal to 2, not 1"),
        (["eval.cv={fold: 3}"], "eval.cv.fold: unknown key; did you mean 'folds'?"),
        (["heads.cross.adapt={method: lp_ft}"], "cross reads frozen tokens"),
        (
            ["task={type: multiclass}", "heads={s: {op: similarity}}"],
            "similarity is one number, which answers binary",
        ),
        (["task={type: multiclass}", "eval.calibration=platt"], "platt is for binary tasks"),
        (["task.classes=[a, b]"], "classes belongs to multiclass"),
        (["data.modalities={text: {column: text}}"], "concat needs two modalities"),
        (["eval.seeds=[1, 1]"], "one or more different seeds"),
        (["early_stopping.metric=acc"], "'acc' is no metric of binary tasks; use auto, loss, accuracy"),
        (["model.checkpoint=nowhere"], "nowhere"),
        (["data.manifest=nowhere.csv"], "nowhere.csv: no such file or directory"),
        (["data.manifest=corpus:none/x.parquet"], "diptych data fetch icons"),
        (["adapt.epoch=3"], "adapt.epoch: unknown key; did you mean 'epochs'?"),
        (["device=cuda"], "'cuda' cannot be used here"),
    ],
)
def test_mistakes_in_a_config_end_with_one_sentence(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if words == ["device=cuda"] and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    assert main(["finetune", str(folder / "finetune.yaml"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert said in error
    assert "\n" not in error


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["task={type: regression}", "heads={v: {op: late, rule: vote}}"],
            "heads.v.rule: vote is for tasks of",
        ),
        (["task={type: regression}", "heads={p: {op: late, rule: product}}"], "heads.p.rule: product is for"),
        (["task.class_weight={yes: 2}"], "task.class_weight: 'yes' is no class of the task (0, 1)"),
    ],
)
def test_what_the_task_does_not_allow_is_told_before_pictures_are_read(
    words: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "images" / "red0.png").write_bytes(b"no picture")
    assert main(["finetune", str(folder / "finetune.yaml"), *words]) == 2
    assert said in capsys.readouterr().err
