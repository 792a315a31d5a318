"""The report's curves, confusion, residuals, weights and errors: right numbers, escaped text, and what is not
there is said."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, confusion_matrix, roc_auc_score

from diptych.cli.main import main
from diptych.finetune.config import HeadConfig
from diptych.finetune.config.modality import ModalityConfig
from diptych.finetune.fusion.operators import build_head
from diptych.finetune.report.curves import confusion_section, curve_section, residual_section
from diptych.finetune.report.errors import mistakes
from diptych.finetune.report.page import write_report
from diptych.finetune.report.predictions import Predictions, Unreadable, read_predictions
from diptych.finetune.report.weights import weight_section
from diptych.finetune.runs.saved import save_head
from diptych.finetune.scores.results import write_predictions
from diptych.finetune.tables.cells import Picture
from diptych.finetune.tables.manifest import Rows
from diptych.finetune.tasks.task import Task, TaskType

from .labelled import match_rows, squares, write_config, write_csv
from .test_report import Page

CLASSES = {"binary": ("no", "yes"), "regression": ()}


def answers(kind: TaskType, n: int = 60) -> Predictions:
    """Random answers that know a little."""
    random = np.random.default_rng(1)
    task = Task(kind, CLASSES.get(kind, ("a", "b", "c")))
    ids, groups = [str(i) for i in range(n)], [str(i // 2) for i in range(n)]
    if kind == "regression":
        truth: Any = random.normal(10, 3, n)
        p = (truth + random.normal(0, 1, n))[:, None]
    elif kind == "multilabel":
        truth = random.integers(0, 2, (n, 3))
        p = np.clip(0.3 * truth + 0.7 * random.random((n, 3)), 0, 1)
    else:
        truth = random.integers(0, len(task.classes), n)
        p = random.random((n, len(task.classes))) + 0.5 * np.eye(len(task.classes))[truth]
        p /= p.sum(1, keepdims=True)
    return Predictions(task, ids, groups, truth, {"head": p, "image": p[::-1].copy()}, None, None)


KINDS: list[TaskType] = ["binary", "multiclass", "multilabel", "ordinal", "regression"]


@pytest.mark.parametrize("kind", KINDS)
def test_predictions_come_back_as_they_were_written(kind: TaskType, tmp_path: Path) -> None:
    made = answers(kind)
    rows = Rows("t", made.ids, {}, {}, groups=made.groups)
    write_predictions(tmp_path, made.task, rows, made.targets, np.arange(60), made.p)
    results = {"type": kind, "classes": list(made.task.classes), "heads": {"head": {}, "image": {}}}
    got = read_predictions(tmp_path, results)
    assert (got.ids, got.groups, got.repeat) == (made.ids, made.groups, None)
    assert np.array_equal(got.targets, made.targets)
    for name, p in made.p.items():
        assert np.allclose(got.p[name], p, atol=1e-15)  # of two classes 1 - p is written
    for name in got.task.metrics:
        want = made.task.value(name, made.targets, made.p["head"])
        assert got.task.value(name, got.targets, got.p["head"]) == pytest.approx(want, abs=1e-14)
    with pytest.raises(Unreadable, match="does not fit"):
        read_predictions(tmp_path, results | {"heads": {"other": {}}})
    (tmp_path / "predictions.parquet").write_text("no table")
    with pytest.raises(Unreadable, match="does not fit"):
        read_predictions(tmp_path, results)


def parsed(html: str, folder: Path) -> Page:
    (folder / "part.html").write_text(html)
    return Page(folder / "part.html")


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_areas_of_each_class_are_scikit_learns(kind: TaskType, tmp_path: Path) -> None:
    made = answers(kind)
    page = parsed(curve_section(made, {}, "head", samples=50), tmp_path)
    aps: list[float] = []
    for c in range(3):
        positive = made.targets[:, c] if kind == "multilabel" else (made.targets == c).astype(int)
        area = roc_auc_score(positive, made.p["head"][:, c])
        aps.append(float(average_precision_score(positive, made.p["head"][:, c])))
        assert f"{100 * area:.1f} %" in page.text
        assert f"{100 * aps[-1]:.1f} %" in page.text
    if kind == "multilabel":
        mean = made.task.value("macro_map", made.targets, made.p["head"])
        assert np.mean(aps) == pytest.approx(mean, abs=1e-12)
    lines = [a for tag, a in page.tags if tag == "polyline"]
    assert len(lines) == 3 + 1 + 3  # ROC, guessing, precision


def test_a_class_without_rows_and_many_classes(tmp_path: Path) -> None:
    task = Task("multiclass", tuple(f"c{i:02}" for i in range(50)))
    random = np.random.default_rng(0)
    truth = random.integers(0, 49, 300)  # the last never comes up
    p = random.random((300, 50))
    p /= p.sum(1, keepdims=True)
    made = Predictions(
        task, list(map(str, range(300))), list(map(str, range(300))), truth, {"h": p}, None, None
    )
    page = parsed(curve_section(made, {}, "h", samples=20), tmp_path)
    assert (
        "drawn are the 6 most frequent of 49, listed 40; 1 without a positive or a negative row" in page.text
    )
    page = parsed(confusion_section(made, "h"), tmp_path)
    seen = confusion_matrix(truth, p.argmax(1), labels=range(50))
    np.fill_diagonal(seen, 0)
    assert sum(tag == "tr" for tag, _ in page.tags) == 1 + 15
    assert f"rows c{seen.max(1).argmax():02}" in page.text


@pytest.mark.parametrize("kind", ["binary", "multiclass", "ordinal"])
def test_confusion_is_scikit_learns(kind: TaskType, tmp_path: Path) -> None:
    made = answers(kind)
    said = made.task.predicted(made.p["head"])
    page = parsed(confusion_section(made, "head"), tmp_path)
    counts = [w for w in page.words if w.strip().isdigit()]
    want = confusion_matrix(made.targets, said, labels=range(len(made.task.classes)))
    assert list(map(int, counts)) == want.ravel().tolist()


def test_residuals(tmp_path: Path) -> None:
    made = answers("regression", 3000)
    page = parsed(residual_section(made, "head"), tmp_path)
    residual = made.p["head"][:, 0] - made.targets
    assert f"its mean is {residual.mean():.4g}, its standard deviation {residual.std():.4g}" in page.text
    assert "1,200 of 3,000 rows" in page.text
    assert sum(tag == "circle" for tag, _ in page.tags) == 2 * 1200


@pytest.mark.parametrize("kind", KINDS)
def test_the_surest_errors(kind: TaskType) -> None:
    made = answers(kind)
    p, truth = made.p["head"], made.targets
    found = mistakes(made, "head", 5)
    assert len(found) == 5
    rows = [one.row for one in found]
    if kind == "regression":
        off = np.abs(p[:, 0] - truth)
    elif kind == "multilabel":
        off = np.where((p >= 0.5) != truth, np.abs(p - truth), 0).max(1)
    else:
        said = made.task.predicted(p)
        off = np.where(said != truth, p[np.arange(60), said], 0)
        if kind == "ordinal":
            off += np.abs(said - truth)
        assert all(one.explained == said[one.row] != truth[one.row] for one in found)
    assert rows == np.argsort(-off, kind="stable")[:5].tolist()
    right = (
        {"head": np.eye(3)[truth]} if kind in ("multiclass", "ordinal") else {"head": truth[:, None] * 1.0}
    )
    if kind in ("multiclass", "ordinal", "regression"):
        assert mistakes(Predictions(made.task, made.ids, made.groups, truth, right, None, None), "head") == []


def test_errors_and_confusion_are_those_of_the_rows_own_thresholds(tmp_path: Path) -> None:
    """Of two folds the second says yes from 0.9 on."""
    made = answers("binary")
    rows = Rows("t", made.ids, {}, {}, groups=made.groups)
    fold = np.arange(60) % 2
    more = {"repeat": np.zeros(60, dtype=np.int64), "fold": fold}
    write_predictions(tmp_path, made.task, rows, made.targets, np.arange(60), made.p, more)
    folds = [
        {"repeat": 0, "fold": f, "threshold": {"heads": {"head": {"yes": t}, "image": {"yes": t}}}}
        for f, t in enumerate((0.5, 0.9))
    ]
    results = {"type": "binary", "classes": ["no", "yes"], "heads": {"head": {}, "image": {}}, "folds": folds}
    got = read_predictions(tmp_path, results)
    said = (got.p["head"][:, 1] >= np.where(fold == 0, 0.5, 0.9)).astype(int)
    page = parsed(confusion_section(got, "head"), tmp_path)
    counts = [int(w) for w in page.words if w.strip().isdigit()]
    assert counts == confusion_matrix(made.targets, said).ravel().tolist()
    wrong = np.flatnonzero(said != made.targets)
    assert {one.row for one in mistakes(got, "head", 60)} == set(wrong.tolist())
    assert all(one.said == got.task.classes[said[one.row]] for one in mistakes(got, "head", 60))


EVIL = "<script>alert(1)</script>\"onerror='x & y"
HEADS = "{gated: {op: gated, width: 8}, learned: {op: late, rule: learned}}"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cross-validation on squares whose texts want to run and whose labels are noise, so that errors are
    sure."""
    folder = tmp_path_factory.mktemp("answers")
    rows = match_rows(folder, shades=8)
    for i, row in enumerate(rows):
        row[2] = f"{row[2]} {EVIL}" if i % 2 else row[2]
        row[3] = i % 3 % 2
    write_csv(folder / "match.csv", rows)
    squares.make_checkpoint(folder / "checkpoint")
    config = write_config(folder, HEADS, epochs=3)
    assert main(["finetune", str(config), "model.cache=false", "eval.cv={folds: 2}", "eval.seeds=[0]"]) == 0
    return folder


def test_a_run_with_its_pictures(made: Path, tmp_path: Path) -> None:
    page = Page(write_report([made / "run"], tmp_path / "page.html"))
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.tags}
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        source = attributes.get("src")
        assert source is None or source.startswith(("data:image/jpeg;base64,", "data:image/png;base64,"))
    results = json.loads((made / "run" / "results.json").read_text())
    best = results["heads"][results["best"]]["metrics"]
    assert f"{100 * best['auroc']['value']:.1f} %" in page.text
    for words in ("ROC and precision-recall", "Confusion of", "Most confident errors of", "fold 0", "fold 1"):
        assert words in page.text
    shown = [a for _, a in page.tags if a.get("class") == "error"]
    assert 1 <= len(shown) <= 8
    assert sum(a.get("class") == "heat" for _, a in page.tags) == len(shown)
    assert sum(a.get("class") == "word" for _, a in page.tags) >= 2 * len(shown)
    assert (tmp_path / "page.html").stat().st_size < 400_000


@pytest.mark.parametrize("gone", ["pictures", "table", "answers", "changed"])
def test_what_is_gone_is_said_and_the_page_is_made(gone: str, made: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made, copy)
    config = copy / "run" / "config.yaml"
    config.write_text(config.read_text().replace(str(made), str(copy)))
    told = {
        "pictures": "The picture cannot be shown",
        "table": "Without pictures and texts",
        "answers": "No curves: there is no",
        "changed": "has none of the tested rows any more",
    }
    if gone == "pictures":
        shutil.rmtree(copy / "images")
    elif gone == "table":
        (copy / "match.csv").unlink()
    elif gone == "answers":
        (copy / "run" / "predictions.parquet").unlink()
    else:
        text = (
            (copy / "match.csv")
            .read_text()
            .replace("-1,images", "-9,images")
            .replace("-0,images", "-8,images")
        )
        (copy / "match.csv").write_text(text)
    page = Page(write_report([copy / "run"]))
    assert told[gone] in page.text
    assert not any(a.get("class") == "heat" for _, a in page.tags)
    if gone == "table":
        assert "row " in page.text
    if gone == "pictures":
        assert "alert(1)" in page.text


@pytest.mark.parametrize("pool", [None, "attention"])
def test_learned_weights_and_gates(pool: Any, tmp_path: Path) -> None:
    squares.make_checkpoint(tmp_path / "encoder")
    widths = {"image": 24, "text": 24}
    run: dict[str, Any] = {"task": "binary", "classes": ["0", "1"], "widths": widths, "token_widths": None}
    run |= {"modalities": {"image": "i", "text": "t"}, "id": None, "max_pixels": 10**6}
    pooled = ["image"] if pool else []
    if pool:
        run |= {"modalities": {"image": {"column": "i", "pool": pool}, "text": {"column": "t"}}}
    run["pooled"] = pooled
    options: dict[str, dict[str, Any]] = {
        "gates": {"op": "gated", "width": 8},
        "sum": {"op": "weighted_sum"},
        "plain": {"op": "concat"},
    }
    for name, config in options.items():
        head: Any = build_head(HeadConfig.model_validate(config), widths, 1, pooled=pooled)
        if name == "sum":
            (head.inner if pool else head).scores.data = torch.tensor([2.0, 0.0])
        seeds = [{"seed": 0, "scale": 1.0, "shift": 0.0}]
        document = {"config": HeadConfig.model_validate(config).model_dump(), "seeds": seeds}
        save_head(tmp_path / "heads" / name, document, [(0, head, None)])
    (tmp_path / "run.json").write_text(json.dumps(run | {"heads": list(options), "best": "sum"}))
    pictures: list[Any] = [Picture(data=squares.square(name, 0)) for name in squares.NAMES[:4]]
    texts: list[Any] = ["red", "blue", None, "gold"]
    declared = {"image": ModalityConfig(column="i", pool=pool), "text": ModalityConfig(column="t")}
    rows = Rows("t", list("abcd"), declared, {"image": [(p,) for p in pictures], "text": texts})
    page = parsed(weight_section(tmp_path, rows), tmp_path)
    assert "gates median and 5 to 95 % of 3 rows" in page.text
    assert "sum the same for all rows image 0.88 text 0.12" in page.text  # softmax of 2 and 0
    assert "plain" not in page.text
    assert sum(tag == "figure" for tag, _ in page.tags) == 1
    page = parsed(weight_section(tmp_path, None), tmp_path)
    assert "Gates of gates need the run's table." in page.text
    assert weight_section(tmp_path / "none", rows) == ""
