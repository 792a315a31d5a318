"""Predictions for every kind of table, with modalities missing, and every kind of answer file."""

import csv
import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.finetune.predictor import Predictor

from .labelled import squares, write_config, write_csv, write_task


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned run, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("run")
    write_task(folder)
    config = write_config(
        folder, "{concat: {op: concat}, cross: {op: cross, width: 8, heads: 2}, late: {op: late}}"
    )
    assert main(["finetune", str(config), "model.cache=false"]) == 0
    return folder


class Frame:
    """What pandas shows of a data frame."""

    def __init__(self, columns: dict[str, list[Any]]) -> None:
        self._columns, self.columns = columns, list(columns)

    def to_dict(self, orient: str) -> dict[str, list[Any]]:
        assert orient == "list"
        return self._columns


@pytest.mark.parametrize("head", ["concat", "cross", "late"])
def test_every_kind_of_table_gives_the_same_answers(made: Path, head: str, tmp_path: Path) -> None:
    predictor = Predictor.load(made / "run", head=head)
    data = squares.square("red", 20)
    (tmp_path / "red.png").write_bytes(data)
    columns = {"image": ["red.png", None, "red.png"], "text": ["red square", "blue square", None]}
    write_csv(
        tmp_path / "t.csv",
        [["red.png", "red square"], ["", "blue square"], ["red.png", ""]],
        ("image", "text"),
    )
    expected = predictor.predict_proba(tmp_path / "t.csv")
    assert expected.shape == (3, 2)
    assert np.isfinite(expected).all()
    picture = Image.open(io.BytesIO(data))
    rows: list[dict[str, Any]] = [
        {"image": data, "text": "red square"}, {"text": "blue square"}, {"image": picture},
    ]  # fmt: skip
    tables: list[Any] = [
        columns,
        pa.table(columns),
        Frame(columns | {"text": ["red square", "blue square", float("nan")]}),
    ]
    for table in tables:
        assert np.array_equal(predictor.predict_proba(table, root=tmp_path), expected)
    assert np.array_equal(predictor.predict_proba(rows), expected)
    assert predictor.predict(rows) == ["1" if p >= 0.5 else "0" for p in expected[:, 1]]
    alone = np.concatenate([predictor.predict_proba([row]) for row in rows])
    assert np.abs(alone - expected).max() < 1e-6


def test_late_answers_with_one_modality_as_that_modality_does(made: Path) -> None:
    late = Predictor.load(made / "run", head="late")
    saved = late._saved[0].head
    texts = ["red square", "blue square", "gold square"]
    got = late.predict_proba({"text": texts})
    model = next(iter(late._models.values()))
    features = model.encode_captions(texts)
    parts: list[Any] = []
    for one in late._saved:
        logits = one.head.classify["text"](one.head.standard["text"](features))  # type: ignore[union-attr, operator, index]
        parts.append(late.task.probabilities(one.calibrated(logits)))
    assert np.abs(got - np.mean(parts, axis=0)).max() < 1e-6
    assert saved.modalities == ("image", "text")


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_answers_come_in_every_format_and_leave_bytes_out(made: Path, suffix: str, tmp_path: Path) -> None:
    data = squares.square("red", 20)
    table = tmp_path / "in.parquet"
    pq.write_table(pa.table({"name": ["x", "y"], "image": [data, None], "text": ["ä, b", "c"]}), table)
    out = tmp_path / f"out{suffix}"
    assert main(["predict", str(made / "run"), str(table), "-o", str(out), "--head", "concat"]) == 0
    p = Predictor.load(made / "run", head="concat").predict_proba(table)
    if suffix == ".parquet":
        rows = pq.read_table(out).to_pylist()
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        with out.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ","))
    assert list(rows[0]) == ["name", "text", "prediction", "p_0", "p_1"]
    assert [row["text"] for row in rows] == ["ä, b", "c"]
    assert [float(row["p_1"]) for row in rows] == pytest.approx(p[:, 1].tolist(), abs=1e-6)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"text": ["a", ""]}, r"row 2 has neither image nor text"),
        ({"image": ["absent.png"]}, r"row 1: image .*absent.png cannot be read: no such file or directory"),
        ({"image": ["../x.png"]}, r"leads out of"),
        ({"other": ["a"]}, r"no column 'image'"),
        ({"text": ["a"], "image": []}, r"different lengths"),
        ([], r"holds no rows"),
        (7, r"a table must be a path, a data frame, a dict of columns or a list of rows, not int"),
    ],
)
def test_tables_that_cannot_be_answered_are_told(made: Path, table: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        Predictor.load(made / "run").predict_proba(table, root=tmp_path)


def test_runs_that_cannot_be_opened_are_told(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="is no finished fine-tuning run"):
        Predictor.load(tmp_path)
    with pytest.raises(UserError, match="has no head 'x'; it has image, text, concat, cross, late"):
        Predictor.load(made / "run", head="x")
    shutil.copytree(made / "run", tmp_path / "copy")
    weights = tmp_path / "copy" / "heads" / "late" / "seed_1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"seed_1.safetensors is damaged"):
        Predictor.load(tmp_path / "copy", head="late")
    table = str(made / "match.csv")
    assert main(["predict", str(made / "run"), table, "-o", str(tmp_path / "x.txt")]) == 2
    assert "answers are written as .csv, .tsv, .jsonl, .parquet" in capsys.readouterr().err
    assert main(["predict", str(made / "run"), table, "-o", str(tmp_path / "no" / "x.csv")]) == 2
    assert "there is no folder" in capsys.readouterr().err
