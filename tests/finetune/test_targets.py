"""Target columns of every task, from every kind of table, and their mistakes in one sentence."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.finetune.config import (
    FinetuneConfig,
    LabelledDataConfig,
    ModalityConfig,
    SourceConfig,
    TaskConfig,
)
from diptych.finetune.tables.manifest import Splits, read_rows
from diptych.finetune.tasks.targets import encode_targets, make_task

from .labelled import write_csv

LABELS = TaskConfig(type="multilabel")
NUMBER = TaskConfig(type="regression")
ORDERED = TaskConfig(type="ordinal", classes=("low", "mid", "high"))


def data(path: Path, **options: Any) -> LabelledDataConfig:
    return LabelledDataConfig(
        manifest=str(path), modalities={"text": ModalityConfig(column="text")}, **options
    )


def encoded(path: Path, task: TaskConfig, *, min_rows: int = 1, **options: Any) -> tuple[Any, list[str]]:
    config = data(path, **options)
    rows = read_rows(config, task)
    every = np.arange(len(rows))  # the last row is the test's
    return encode_targets(rows, task, Splits(every[:-1], every[:0], every[-1:]), min_rows=min_rows)


def table(folder: Path, targets: list[Any], suffix: str = ".parquet", **more: list[Any]) -> Path:
    """Rows of train, but the last of test."""
    n = len(targets)
    columns = {
        "text": ["x"] * n, "target": targets, "split": [*["train"] * (n - 1), "test"], **more,
    }  # fmt: skip
    path = folder / f"t{suffix}"
    if suffix == ".parquet":
        pq.write_table(pa.table(columns), path)
    elif suffix == ".jsonl":
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        write_csv(path, list(zip(*columns.values(), strict=True)), tuple(columns))
    return path


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl"])
def test_lists_become_one_column_per_label(suffix: str, tmp_path: Path) -> None:
    cells = [["b", "a"], [], ["a"], ["b", "b"], ["a"]]
    targets, classes = encoded(table(tmp_path, cells, suffix), LABELS)
    assert classes == ["a", "b"]
    assert targets.tolist() == [[1, 1], [0, 0], [1, 0], [0, 1], [1, 0]]
    declared = TaskConfig(type="multilabel", classes=("b", "a"))
    assert encoded(table(tmp_path, cells, suffix), declared)[0][:, ::-1].tolist() == targets.tolist()
    numbers = [[1, 2.0], [], ["1"], [2], [1]]
    if suffix == ".jsonl":
        assert encoded(table(tmp_path, numbers, suffix), LABELS)[1] == ["1", "2"]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_text_is_cut_at_the_separator_and_may_hold_no_label(suffix: str, tmp_path: Path) -> None:
    task = TaskConfig(type="multilabel", separator="|")
    got = encoded(table(tmp_path, ["b| a", "", "a|", "b", " a "], suffix), task)
    assert got[1] == ["a", "b"]
    assert got[0].tolist() == [[1, 1], [0, 0], [1, 0], [0, 1], [1, 0]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_columns_of_0_and_1_are_labels_by_their_names(suffix: str, tmp_path: Path) -> None:
    task = TaskConfig(type="multilabel", target=("wet", "cold"))
    more: dict[str, Any] = {"wet": [True, False, True, False], "cold": [0, 1, 1, 0]}
    targets, classes = encoded(table(tmp_path, [0] * 4, suffix, **more), task)
    assert classes == ["wet", "cold"]
    assert targets.tolist() == [[1, 0], [0, 1], [1, 1], [0, 0]]


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_numbers_and_ordered_classes(suffix: str, tmp_path: Path) -> None:
    targets, classes = encoded(table(tmp_path, [1.5, -2.0, 1e3, 0.0], suffix), NUMBER)
    assert (targets.tolist(), classes) == ([1.5, -2, 1000, 0], [])
    assert targets.dtype == np.float64
    targets, classes = encoded(table(tmp_path, ["low", "high", "mid", "low", "high"], suffix), ORDERED)
    assert (targets.tolist(), classes) == ([0, 2, 1, 0, 2], ["low", "mid", "high"])


def test_weights_are_read_with_the_rows(tmp_path: Path) -> None:
    path = table(tmp_path, [1.0, 2.0, 3.0], ".csv", w=[0, 1.5, "2"])
    rows = read_rows(data(path, weight="w"), NUMBER)
    assert rows.weights == [0, 1.5, 2]
    assert rows.take(np.array([2, 0])).weights == [2, 0]
    assert read_rows(data(path), NUMBER).weights == []


@pytest.mark.parametrize(
    ("cells", "task", "words"),
    [
        (
            [["a"], None, ["b"], ["a"]],
            LABELS,
            r"row 2: column 'target' is empty; give the row's labels \(\[\] for",
        ),
        ([["a"], ["b", None], ["b"], ["a"]], LABELS, r"row 2: a label in column 'target' is empty"),
        (["a", "b", "a", "b"], LABELS, r"row 1: column 'target' holds 'a' and no list; .* as task.separator"),
        ([["a"], ["b"], ["a"], ["c"]], LABELS, r"row 4: 'c' in column 'target' is no label of .* \(a, b\)"),
        ([["a"], ["a"], [], ["a"]], LABELS, r"holds 1 label in training; two .* for one task.type: binary"),
        (
            [["a"], ["a"], ["b"], ["a"]],
            LABELS,
            r"label 'b' in column 'target' has 1 training rows, needed are 2",
        ),
        (
            [[1], [2]],
            TaskConfig(type="multilabel", separator=";"),
            r"holds list and no text; remove task.separ",
        ),
        ([1.0, None, 2.0, 3.0], NUMBER, r"row 2: column 'target' is empty; label the row or remove it"),
        (
            [1.0, float("inf"), 2.0, 3.0],
            NUMBER,
            r"row 2: 'inf' in column 'target' is no finite number; mend it",
        ),
        (["1", "2", "3", "four"], NUMBER, r"row 4: 'four' in column 'target' is no finite number"),
        ([True, False, True], NUMBER, r"row 1: 'True' in column 'target' is no finite number"),
        ([2.0, 2.0, 2.0, 3.0], NUMBER, r"column 'target' holds one number in all training rows"),
        (["low", "mid", "high", "max"], ORDERED, r"row 4: label 'max' .* is no class .* \(low, mid, high\)"),
        (["low", "low", "mid", "low"], ORDERED, r"class 'high' in column 'target' has 0 training rows"),
    ],
)
def test_mistakes_in_targets_are_told_in_one_sentence(
    cells: list[Any], task: TaskConfig, words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words) as error:
        encoded(table(tmp_path, cells), task, min_rows=2)
    assert "\n" not in str(error.value)


def test_mistakes_in_several_columns_and_in_weights_are_told(tmp_path: Path) -> None:
    task = TaskConfig(type="multilabel", target=("a", "b"))
    for cell, words in (
        ("2", "row 2: '2' in column 'b' is neither 0 nor 1"),
        ("", "row 2: column 'b' is empty"),
    ):
        path = table(tmp_path, [0] * 3, ".csv", a=[0, 1, 0], b=[1, cell, 0])
        with pytest.raises(UserError, match=words):
            encoded(path, task)
    with pytest.raises(UserError, match=r"task.target: .* no column 'c'"):
        encoded(path, TaskConfig(type="multilabel", target=("a", "c")))
    path = table(tmp_path, [0] * 3, ".csv", a=[0, 0, 1], b=[1, 1, 0])
    with pytest.raises(UserError, match="label 'a' has 0 training rows, needed are 1"):
        encoded(path, task)
    for weight in (-1, "x", "nan", ""):
        path = table(tmp_path, [1, 2, 3], ".csv", w=[1, weight, 1])
        with pytest.raises(
            UserError, match=rf"row 2: weight '{weight}' in column 'w' is no number from 0 on"
        ):
            encoded(path, NUMBER, weight="w")


def test_class_weights_go_by_name(tmp_path: Path) -> None:
    task = TaskConfig(type="multiclass", class_weight={"b": 3.0})
    assert make_task(task, ["a", "b"]).class_weight == (1, 3)
    with pytest.raises(
        UserError, match=r"task.class_weight: 'b' is no class of the task \(a, c\); remove it"
    ):
        make_task(task, ["a", "c"])
    with pytest.raises(UserError, match="all classes have weight 0"):
        make_task(TaskConfig(type="multiclass", class_weight={"a": 0.0, "b": 0.0}), ["a", "b"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"type": "ordinal"}, "ordinal needs classes, three or more from low to high; for two use binary"),
        ({"type": "ordinal", "classes": ("a", "b")}, "ordinal needs classes, three or more"),
        ({"type": "regression", "classes": ("a", "b")}, "remove it for regression"),
        ({"type": "regression", "positive": 1}, "positive belongs to binary; remove it for regression"),
        ({"type": "regression", "class_weight": "balanced"}, "use data.weight for weights of rows"),
        ({"type": "regression", "focal_gamma": 2.0}, "focal_gamma: regression has no focal loss"),
        (
            {"type": "multiclass", "target": ("a", "b")},
            "target: multiclass has one column; several are for mul",
        ),
        ({"type": "multilabel", "target": ("a",)}, "name two or more different columns"),
        (
            {"type": "multilabel", "target": ("a", "b"), "separator": ";"},
            "separator belongs to multilabel and vqa with",
        ),
        (
            {"type": "multilabel", "target": ("a", "b"), "classes": ("a", "b")},
            "the labels are the names of the",
        ),
        (
            {"type": "binary", "separator": ";"},
            "separator belongs to multilabel and vqa with one text column",
        ),
        (
            {"type": "binary", "class_weight": {"1": -1.0}},
            "class_weight.1: -1.0 is no weight; give a number from",
        ),
    ],
)
def test_task_settings_that_do_not_fit_are_told(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TaskConfig(**options)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (
            "regression",
            {"eval": {"calibration": "temperature"}},
            "regression has no probabilities to calibrate",
        ),
        ("regression", {"adapt": {"label_smoothing": 0.1}}, "regression has no labels to smooth; use 0"),
        (
            "multilabel",
            {"heads": {"s": {"op": "similarity"}}},
            "heads.s: similarity is one number, which answers",
        ),
        ("regression", {"adapt": {"sampling": "balanced"}}, "balanced needs one class per row"),
        ("multilabel", {"eval": {"calibration": "platt"}}, "platt is for binary tasks; use temperature"),
    ],
)
def test_settings_that_a_task_does_not_have_are_told(kind: Any, options: dict[str, Any], words: str) -> None:
    settings: dict[str, Any] = {"heads": ["late"], **options}
    with pytest.raises(ValidationError, match=words):
        FinetuneConfig(
            task=TaskConfig(type=kind), data=LabelledDataConfig(manifest="t.csv"),
            model=SourceConfig(checkpoint="x"), **settings,
        )  # fmt: skip


def test_the_configs_of_the_documentation_are_valid(tmp_path: Path) -> None:
    docs = Path(__file__).parents[2] / "docs"
    pages = sorted((docs / "finetune").glob("*.md"), key=lambda page: page.name != "tasks.md")
    text = "\n".join(page.read_text(encoding="utf-8") for page in [*pages, docs / "finetune.md"])
    fences = re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    fences += re.findall(r'\.write\("""\n(name:.*?)"""\)', text, re.DOTALL)
    whole = [fence for fence in fences if fence.startswith("name:")]
    parts = [fence for fence in fences if fence not in whole]
    tasks = [line for part in parts for line in part.splitlines() if line.startswith("task: {type: ")]
    assert len(whole) >= 3
    assert len(tasks) >= 5
    for i, text in enumerate(whole):
        (tmp_path / f"{i}.yaml").write_text(text)
        load_config(FinetuneConfig, tmp_path / f"{i}.yaml")
    for line in tasks:
        lines = [line if old.startswith("task:") else old for old in whole[0].splitlines()]
        lines = [old for old in lines if "smoothing" not in old and not old.startswith("eval")]
        (tmp_path / "one.yaml").write_text("\n".join(lines))
        load_config(FinetuneConfig, tmp_path / "one.yaml")
