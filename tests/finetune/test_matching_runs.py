"""Whole runs of matching: pairs of a table, and pairs that are made not to match."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report

from .labelled import write_csv
from .pair_runs import COLUMNS, pair_rows, run_pairs, write_pairs
from .runs import contents

HEADS = "[concat, bilinear, late]"


def test_fused_heads_tell_what_either_modality_cannot(tmp_path: Path, capsys: Any) -> None:
    write_pairs(tmp_path)
    results = run_pairs(tmp_path, "{type: matching}", heads=HEADS, epochs=12)
    assert (results["n_train"], results["n_inner"], results["n_test"]) == (96, 64, 64)
    for name in ("image", "text"):
        scores = results["heads"][name]["metrics"]
        assert scores["auroc"]["value"] == pytest.approx(0.5)  # by construction, to the last digit
        assert scores["accuracy"]["value"] == 0.5
    assert results["heads"]["concat"]["metrics"]["auroc"]["value"] > 0.65
    assert results["majority"] == 0.5
    assert "Of these rows half were made" in results["note"]
    assert results["note"] in capsys.readouterr().out
    assert "half were made" in write_report([tmp_path / "run"]).read_text()
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    text = dict((row[0], row[2]) for row in pair_rows(tmp_path))
    picture = dict((row[0], row[1]) for row in pair_rows(tmp_path))
    for row_id, target in zip(table["id"], table["target"], strict=True):
        a, _, b = row_id.partition(" + ")
        assert (target == "0") == bool(b)
        assert not b or picture[a] != picture[b]
    model = Predictor.load(tmp_path / "run", head="concat")
    pairs = [row_id.partition(" + ") for row_id in table["id"]]
    rows = [{"image": picture[a], "text": text[b or a]} for a, _, b in pairs]
    p = model.predict_proba(rows, root=tmp_path)[:, 1]
    assert np.abs(p - np.array(table["concat:1"])).max() < 1e-5
    auroc = sk.roc_auc_score([int(t) for t in table["target"]], p)
    assert results["heads"]["concat"]["metrics"]["auroc"]["value"] == pytest.approx(auroc)
    with pytest.raises(UserError, match="the run made the pairs that do not match itself"):
        model.evaluate(rows, root=tmp_path)
    before = contents(tmp_path / "run")
    run_pairs(tmp_path, "{type: matching}", heads=HEADS, epochs=12)
    assert capsys.readouterr().err.count("kept from before") == 5
    assert contents(tmp_path / "run") == before


@pytest.mark.slow
def test_folds_hard_negatives_and_encoders(tmp_path: Path) -> None:
    write_pairs(tmp_path, names=5)
    tuned = "{op: bilinear, adapt: {method: lp_ft, encoder_epochs: 1, wise_ft: 0.5}}"
    heads = f"{{cross: {{op: cross, width: 8}}, tuned: {tuned}}}"
    task = "{type: matching, hard_negatives: true, negatives: 2}"
    options = {"heads": heads, "epochs": 2, "eval": ", cv: {folds: 2}, calibration: temperature"}
    results = run_pairs(tmp_path, task, **options)
    assert results["heads"]["text"]["metrics"]["auroc"]["value"] == pytest.approx(
        0.5, abs=0.1
    )  # folds' own models
    assert results["n_test"] == 300
    table = pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()
    picture = dict((row[0], row[1]) for row in pair_rows(tmp_path, 5))
    fold_of = {i: f for i, f in zip(table["id"], table["fold"], strict=True) if " + " not in i}
    for row_id, fold in zip(table["id"], table["fold"], strict=True):
        a, made, b = row_id.partition(" + ")
        assert not made or (picture[a] != picture[b] and fold_of[a] == fold_of[b] == fold)
    assert table["target"].count("0") == 2 * table["target"].count("1")


def test_what_matching_does_not_take(tmp_path: Path, capsys: Any) -> None:
    write_pairs(tmp_path, names=4)
    run_pairs(tmp_path, "{type: matching}", heads="[bilinear]", epochs=1)
    config = ["finetune", str(tmp_path / "finetune.yaml")]
    capsys.readouterr()
    for words, said in (
        (
            "adapt.method=contrastive",
            "contrastive is for binary, multiclass and retrieval tasks",
        ),
        ("adapt.sampling=balanced", "matching tasks do not have"),
        ("task.negatives=40", "40 texts that do not match cannot be found for each of the 16 inner rows"),
        ("data.modalities={image: {column: image}}", "matching is about image and text"),
    ):
        heads = "heads={}" if "modalities" in words else "heads=[bilinear]"
        assert main([*config, words, heads]) == 2, words
        assert said in capsys.readouterr().err
    assert main([*config, "--validate"]) == 0
    assert main([*config, "--validate", "task.negatives=40"]) == 1
    assert "40 texts that do not match cannot be found" in capsys.readouterr().out
    rows = [dict(zip(COLUMNS, row, strict=True)) for row in pair_rows(tmp_path, 4)]
    assert set(Predictor.load(tmp_path / "run").predict(rows[:9], root=tmp_path)) <= {"0", "1"}


def test_thresholds_and_a_broken_picture_of_a_test_pair(tmp_path: Path) -> None:
    write_pairs(tmp_path, names=4)
    rows = pair_rows(tmp_path, 4)
    place = next(i for i, row in enumerate(rows) if row[4] == "test")
    (tmp_path / "images" / "broken.png").write_bytes(b"no picture")
    rows[place][1] = "images/broken.png"
    write_csv(tmp_path / "pairs.csv", rows, COLUMNS)
    options: dict[str, Any] = {"heads": "[bilinear]", "epochs": 1, "data": ", on_error: quarantine"}
    results = run_pairs(tmp_path, "{type: matching}", eval=", threshold: auto, calibration: platt", **options)
    assert results["threshold"]["setting"] == "auto"
    assert list(results["threshold"]["heads"]["bilinear"]) == ["1"]
    with (tmp_path / "run" / "quarantine.csv").open() as file:
        (listed,) = csv.DictReader(file)  # the row of the table, and no pair that was made of it
    assert (listed["row"], listed["id"]) == (str(place + 1), rows[place][0])
    assert listed["image"] == str(tmp_path / rows[place][1])
    assert results["n_test"] == 2 * sum(row[4] == "test" for row in rows) - 2
