"""Whole runs of multilabel, regression and ordinal tasks: training, scores, answers and report."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.metrics as sk

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.finetune.predictor import Predictor
from diptych.finetune.report.page import write_report

from .labelled import SPLIT_OF, squares, write_csv, write_task

NAMES = squares.NAMES[:4]
ORDER = ("cold", "mild", "warm", "hot")
CONFIG = """
name: kinds
out: {folder}/run
task: {task}
data: {{manifest: {folder}/table{suffix}, modalities: {modalities}, id: id, group: group{data}}}
model: {{checkpoint: {folder}/checkpoint, cache: false}}
heads: {heads}
adapt: {{lr: 1.0e-2, epochs: 6, batch_size: 16{adapt}}}
eval: {{seeds: [0, 1], bootstrap: 100{eval}}}
tracking: {{wandb: "off"}}
"""
BOTH = "{image: {column: image}, text: {column: text}}"


def rows() -> list[dict[str, Any]]:
    """Coloured squares in shades, with labels, a price and a degree that text and picture tell."""
    made: list[dict[str, Any]] = []
    for shade in range(10):
        for i, name in enumerate(NAMES):
            labels = (
                [name]
                + (["dark"] if shade < 5 else [])
                + (["new"] if SPLIT_OF[shade] != "test" and i else [])
            )
            made.append(
                {
                    "id": f"{name}{shade}",
                    "image": f"images/{name}{shade}.png",
                    "text": f"{name} square",
                    "labels": labels,
                    "price": 1000.0 + 100 * i + shade,
                    "degree": ORDER[i],
                    "group": f"s{shade}",
                    "split": SPLIT_OF[shade],
                    "weight": 1 + i % 2,
                }
            )
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("kinds")
    write_task(path, names=4)
    columns = {name: [row[name] for row in rows()] for name in rows()[0]}
    pq.write_table(pa.table(columns), path / "table.parquet")
    with (path / "table.jsonl").open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows())
    flat = [[*row.values()] for row in rows()]
    for cells in flat:
        cells[3] = " | ".join(cells[3])
    write_csv(path / "table.csv", flat, tuple(rows()[0]))
    own = {name: [int(name in row["labels"]) for row in rows()] for name in (*NAMES, "dark", "new")}
    pq.write_table(pa.table({k: v for k, v in columns.items() if k != "labels"} | own), path / "wide.parquet")
    return path


def run(
    folder: Path, tmp_path: Path, task: str, *, suffix: str = ".parquet", **options: str
) -> dict[str, Any]:
    """Fine-tune and return results.json; the run lies in tmp_path."""
    words = {"heads": "[concat, late, bilinear]", "modalities": BOTH, "data": "", "adapt": "", "eval": ""}
    text = CONFIG.format(folder=folder, task=task, suffix=suffix, **(words | options))
    config = tmp_path / "finetune.yaml"
    config.write_text(text)
    words_out = [f"out={tmp_path / 'run'}"]
    assert main(["finetune", str(config), *words_out]) == 0
    return json.loads((tmp_path / "run" / "results.json").read_text())


def predictions(tmp_path: Path) -> dict[str, list[Any]]:
    return pq.read_table(tmp_path / "run" / "predictions.parquet").to_pydict()


def test_rows() -> list[dict[str, Any]]:
    return [{k: row[k] for k in ("id", "image", "text")} for row in rows() if row["split"] == "test"]


test_rows.__test__ = False  # type: ignore[attr-defined]  of this kind here


@pytest.mark.parametrize(
    ("task", "suffix"),
    [
        ("{type: multilabel, target: labels}", ".parquet"),
        ("{type: multilabel, target: labels}", ".jsonl"),
        ('{type: multilabel, target: labels, separator: "|"}', ".csv"),
        (f"{{type: multilabel, target: [{', '.join([*NAMES, 'dark', 'new'])}]}}", "wide"),
    ],
)
def test_multilabel_runs_from_every_kind_of_target(
    task: str, suffix: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = "/../wide.parquet" if suffix == "wide" else suffix
    (folder / "table").mkdir(exist_ok=True)
    results = run(folder, tmp_path, task, suffix=made, eval=", calibration: temperature")
    assert list(results["heads"]["late"]["metrics"]) == ["macro_map", "micro_f1", "macro_f1", "lrap", "ece"]
    assert sorted(results["classes"]) == sorted([*NAMES, "dark", "new"])
    assert results["labels_scored"] == 4  # of test rows none is new or dark
    assert results["chance"] == 0.25
    assert f"over 4 of {len(results['classes'])} labels on the 8 test rows" in results["headline"]
    assert results["headline"] in capsys.readouterr().out
    # every number comes from the probabilities that were written down
    table, classes = predictions(tmp_path), results["classes"]
    truth = np.array([[c in labels for c in classes] for labels in table["target"]])
    for name, head in results["heads"].items():
        p = np.stack([table[f"{name}:{c}"] for c in classes], axis=1)
        scores = [
            sk.average_precision_score(truth[:, i], p[:, i]) for i, c in enumerate(classes) if c in NAMES
        ]
        assert head["metrics"]["macro_map"]["value"] == pytest.approx(np.mean(scores))
        assert head["metrics"]["lrap"]["value"] == pytest.approx(
            sk.label_ranking_average_precision_score(truth, p)
        )
    assert results["heads"]["concat"]["metrics"]["macro_map"]["value"] > 0.5
    predictor = Predictor.load(tmp_path / "run", head="concat")
    p = predictor.predict_proba(test_rows(), root=folder)
    assert np.abs(p - np.stack([table[f"concat:{c}"] for c in classes], axis=1)).max() < 1e-5
    said = predictor.predict(test_rows(), root=folder)
    assert said == [[c for c, value in zip(classes, row, strict=True) if value >= 0.5] for row in p]


def test_labels_are_answered_as_lists_or_as_text(folder: Path, tmp_path: Path) -> None:
    run(
        folder,
        tmp_path,
        '{type: multilabel, target: labels, separator: "|"}',
        suffix=".csv",
        heads="[concat, late]",
    )
    said = Predictor.load(tmp_path / "run").predict(folder / "table.csv")
    assert any(len(labels) > 1 for labels in said)
    for suffix in (".csv", ".jsonl", ".parquet"):
        out = tmp_path / f"out{suffix}"
        assert main(["predict", str(tmp_path / "run"), str(folder / "table.csv"), "-o", str(out)]) == 0
        if suffix == ".csv":
            with out.open() as file:
                answers = list(csv.DictReader(file))
            assert [row["prediction"] for row in answers] == ["|".join(labels) for labels in said]
            assert "p_dark" in answers[0]
        elif suffix == ".jsonl":
            lines = [json.loads(line) for line in out.read_text().splitlines()]
            assert [row["prediction"] for row in lines] == said
        else:
            assert pq.read_table(out).to_pydict()["prediction"] == said


def test_regression_answers_in_the_targets_own_unit(folder: Path, tmp_path: Path) -> None:
    heads = "[concat, late, similarity]"
    results = run(folder, tmp_path, "{type: regression, target: price}", heads=heads)
    assert list(results["heads"]["late"]["metrics"]) == ["rmse", "mae", "r2", "spearman"]
    table = predictions(tmp_path)
    truth = np.array(table["target"])
    assert truth.tolist() == [row["price"] for row in rows() if row["split"] == "test"]
    assert results["chance"] == pytest.approx(truth.std())
    assert "majority" not in results
    inner = {name: head["inner"]["rmse"] for name, head in results["heads"].items()}
    assert results["best"] == min(("concat", "late", "similarity"), key=inner.__getitem__)
    assert results["best_single"] == min(("image", "text"), key=inner.__getitem__)
    single = results["heads"][results["best_single"]]["metrics"]["rmse"]["value"]
    for name, head in results["heads"].items():
        answers = np.array(table[f"{name}:prediction"])
        got = head["metrics"]["rmse"]["value"]
        assert got == pytest.approx(sk.root_mean_squared_error(truth, answers))
        assert head["metrics"]["mae"]["value"] == pytest.approx(sk.mean_absolute_error(truth, answers))
        if "vs_best_single" in head:  # positive is better
            assert head["vs_best_single"]["diff"] == pytest.approx(single - got)
        assert "reliability" not in head
        predictor = Predictor.load(tmp_path / "run", head=name)
        said = predictor.predict(test_rows(), root=folder)
        assert said == pytest.approx(answers.tolist(), rel=1e-6)
        assert abs(np.mean(said) - 1150) < 100
    with pytest.raises(UserError, match="regression has no probabilities; use predict"):
        Predictor.load(tmp_path / "run").predict_proba(test_rows(), root=folder)
    assert results["heads"]["concat"]["metrics"]["rmse"]["value"] < results["chance"]
    out = tmp_path / "out.csv"
    assert main(["predict", str(tmp_path / "run"), str(folder / "table.csv"), "-o", str(out)]) == 0
    with out.open() as file:
        answers = list(csv.DictReader(file))
    assert not [name for name in answers[0] if name.startswith("p_")]
    best = Predictor.load(tmp_path / "run").predict(folder / "table.csv")
    assert [float(row["prediction"]) for row in answers] == best  # to the last digit
    assert "(RMSE) on the 8 test rows" in results["headline"]
    assert "for the best constant answer" in results["headline"]


def test_ordered_classes(folder: Path, tmp_path: Path) -> None:
    heads = "{concat: {op: concat}, late: {op: late}, sim: {op: similarity}, cross: {op: cross, width: 8}}"
    task = f"{{type: ordinal, target: degree, classes: [{', '.join(ORDER)}], class_weight: balanced}}"
    results = run(folder, tmp_path, task, heads=heads, eval=", calibration: temperature")
    assert results["classes"] == list(ORDER)
    assert list(results["heads"]["late"]["metrics"]) == ["qwk", "mae_ranks", "accuracy", "ece"]
    assert (results["chance"], results["majority"]) == (0, 0.25)
    assert "has a quadratic-weighted kappa of" in results["headline"]
    table = predictions(tmp_path)
    truth = np.array([ORDER.index(name) for name in table["target"]])
    for name, head in results["heads"].items():
        p = np.stack([table[f"{name}:{c}"] for c in ORDER], axis=1)
        assert np.allclose(p.sum(1), 1, atol=1e-6)
        assert (p >= 0).all()
        predictor = Predictor.load(tmp_path / "run", head=name)
        assert np.abs(predictor.predict_proba(test_rows(), root=folder) - p).max() < 1e-5
        said = [ORDER.index(c) for c in predictor.predict(test_rows(), root=folder)]
        kappa = sk.cohen_kappa_score(truth, said, weights="quadratic", labels=range(4))
        assert head["metrics"]["qwk"]["value"] == pytest.approx(kappa)
        assert head["metrics"]["mae_ranks"]["value"] == pytest.approx(np.abs(truth - said).mean())
        assert head["metrics"]["accuracy"]["value"] == pytest.approx(np.mean(truth == said))
    assert results["heads"]["concat"]["metrics"]["qwk"]["value"] > 0.3


@pytest.mark.parametrize(
    "kind", ["multilabel, target: labels", "regression, target: price", "ordinal, target: degree"]
)
def test_folds_of_every_task(kind: str, folder: Path, tmp_path: Path) -> None:
    task = f"{{type: {kind}, classes: [{', '.join(ORDER)}]}}" if "ordinal" in kind else f"{{type: {kind}}}"
    results = run(folder, tmp_path, task, heads="[concat, late]", eval=", cv: {folds: 3}")
    table = predictions(tmp_path)
    metric = next(iter(results["heads"]["concat"]["metrics"]))
    assert len(table["target"]) == 40
    assert sorted(set(table["fold"])) == [0, 1, 2]
    best, single = results["best"], results["best_single"]
    for part in results["folds"]:  # positive is better, also of an error
        gain = part["scores"][best] - part["scores"][single]
        assert part["gain"] == pytest.approx(-gain if metric == "rmse" else gain)
    if metric == "rmse":
        got = sk.root_mean_squared_error(table["target"], table[f"{best}:prediction"])
        assert results["heads"][best]["metrics"]["rmse"]["value"] == pytest.approx(got)
        assert abs(np.mean(table[f"{best}:prediction"]) - 1150) < 100
    assert len(Predictor.load(tmp_path / "run").predict(test_rows(), root=folder)) == 8


@pytest.mark.parametrize("how", ["lp_ft", "lp_ft, wise_ft: 0.5", "lora, soup: uniform"])
def test_encoders_may_be_trained_for_a_number(how: str, folder: Path, tmp_path: Path) -> None:
    heads = f"{{tuned: {{op: concat, adapt: {{method: {how}, encoder_lr: 1.0e-3, encoder_epochs: 1}}}}}}"
    options = {"heads": heads, "data": ", weight: weight"}
    results = run(folder, tmp_path, "{type: regression, target: price}", **options)
    assert results["heads"]["tuned"]["method"] == how.partition(",")[0]
    answers = Predictor.load(tmp_path / "run", head="tuned").predict(test_rows(), root=folder)
    assert answers == pytest.approx(predictions(tmp_path)["tuned:prediction"], rel=1e-6)
    assert abs(np.mean(answers) - 1150) < 100


def test_weights_and_loss_settings_are_part_of_what_a_head_is_kept_for(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = "{type: multiclass, target: degree}"
    run(folder, tmp_path, task, heads="[concat, late]")
    weights = (tmp_path / "run" / "heads" / "late" / "seed_0.safetensors").read_bytes()
    capsys.readouterr()
    run(folder, tmp_path, task, heads="[concat, late]")
    assert capsys.readouterr().err.count("kept from before") == 4
    for changed, data in (
        (task.replace("}", ", class_weight: {hot: 3}}"), ""),
        (task.replace("}", ", focal_gamma: 2}"), ""),
        (task, ", weight: weight"),
        (task.replace("multiclass", f"ordinal, classes: [{', '.join(ORDER)}]"), ""),
    ):
        run(folder, tmp_path, changed, heads="[concat, late]", data=data)
        assert "kept from before" not in capsys.readouterr().err
        assert (tmp_path / "run" / "heads" / "late" / "seed_0.safetensors").read_bytes() != weights


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("{type: multilabel, target: labels}", ["macro_map, fused", "chance 25.0 %", "Reliability of"]),
        ("{type: regression, target: price}", ["rmse, fused", "chance 111.", "mae", "r2"]),
        (
            f"{{type: ordinal, target: degree, classes: [{', '.join(ORDER)}]}}",
            ["qwk, fused", "Reliability of"],
        ),
        ("{type: multiclass, target: degree}", ["accuracy, fused", "majority 25.0 %", "Reliability of"]),
    ],
)
def test_the_report_shows_every_task_in_its_own_measure(
    task: str, words: list[str], folder: Path, tmp_path: Path
) -> None:
    run(folder, tmp_path, task, heads="[concat, late]")
    page = write_report([tmp_path / "run"]).read_text()
    for word in words:
        assert word in page
    assert ("Reliability of" in page) == ("regression" not in task)
    assert "nan" not in page.lower()


@pytest.mark.parametrize(
    ("task", "suffix"),
    [
        ("{type: multilabel, target: labels}", ".parquet"),
        ('{type: multilabel, target: labels, separator: "|"}', ".csv"),
        (f"{{type: multilabel, target: [{', '.join([*NAMES, 'dark', 'new'])}]}}", "wide"),
        ("{type: regression, target: price}", ".csv"),
        (f"{{type: ordinal, target: degree, classes: [{', '.join(ORDER)}]}}", ".jsonl"),
        ("{type: multiclass, target: degree}", ".csv"),
        ("{type: binary, target: odd, positive: one}", "odd"),
    ],
)
def test_every_task_is_evaluated_and_explained(task: str, suffix: str, folder: Path, tmp_path: Path) -> None:
    columns = pq.read_table(folder / ("wide.parquet" if suffix == "wide" else "table.parquet")).to_pydict()
    columns["odd"] = ["one" if i % 2 else "two" for i in range(len(columns["id"]))]
    pq.write_table(pa.table(columns), folder / "odd.parquet")
    (folder / "table").mkdir(exist_ok=True)
    where = f"/../{suffix}.parquet" if suffix in ("wide", "odd") else suffix
    results = run(folder, tmp_path, task, suffix=where, heads="[late]")
    predictor = Predictor.load(tmp_path / "run")
    if "separator" in task:
        columns["labels"] = [" | ".join(labels) for labels in columns["labels"]]
    test = [i for i, split in enumerate(columns["split"]) if split == "test"]
    table = {name: [cells[i] for i in test] for name, cells in columns.items()}
    scored = predictor.evaluate(table, root=folder)
    assert scored["n"] == results["n_test"]
    for metric, score in results["heads"][results["best"]]["metrics"].items():
        assert scored["metrics"][metric] == pytest.approx(score, abs=1e-4, rel=1e-5)
    cells = results["missing"]["cells"]
    first = results["missing"]["metric"]
    assert cells[0]["metrics"][first] == results["heads"][results["best"]]["metrics"][first]
    assert len(cells) == 9
    if suffix == "odd":  # one of the two classes alone
        ones = [i for i, label in enumerate(table["odd"]) if label == "one"]
        alone = {name: [column[i] for i in ones] for name, column in table.items()}
        assert predictor.evaluate(alone, root=folder)["metrics"]["auroc"]["value"] is None
    p, found = predictor.explain_rows(predictor._rows(table, folder))
    assert np.allclose(found.phi.sum(1), found.everything - found.nothing, rtol=0, atol=1e-6)
    if "regression" in task:
        assert found.classes is None
        assert found.everything.tolist() == p[:, 0].tolist()
    elif "multilabel" in task:
        assert found.classes == [results["classes"][c] for c in p.argmax(1)]
    else:
        assert found.classes == predictor.predict(table, root=folder)
    out = tmp_path / "out.jsonl"
    pq.write_table(pa.table(table), folder / "in.parquet")
    assert (
        main(["predict", str(tmp_path / "run"), str(folder / "in.parquet"), "-o", str(out), "--explain"]) == 0
    )
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["phi_text"] for line in lines] == pytest.approx(found.phi[:, 1].tolist(), abs=1e-3)
    if "multilabel" in task:
        assert [line["explained"] for line in lines] == found.classes
