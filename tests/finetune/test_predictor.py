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
from diptych.finetune.answers import answer_table
from diptych.finetune.predictor import Predictor
from diptych.finetune.runs.saved import open_encoder
from diptych.finetune.tables.files import open_table

from .labelled import COLUMNS, match_rows, squares, write_config, write_csv, write_task


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
        # of this kind here
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
    with pytest.raises(UserError, match="device: 'cuda:99' cannot be used here; give auto or cpu"):
        Predictor.load(made / "run", device="cuda:99")
    with pytest.raises(UserError, match="device: 'gpu' cannot be used here"):
        Predictor.load(made / "run", device="gpu")
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


def _answered(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
@pytest.mark.parametrize("form", [".csv", ".jsonl", ".parquet"])
def test_tables_are_answered_in_chunks_as_they_are_whole(
    made: Path, suffix: str, form: str, tmp_path: Path
) -> None:
    texts = ["red square", "blue, square", None, "gold square", "ä", "red square", "one\nmore"]
    data = squares.square("red", 20)
    (tmp_path / "red.png").write_bytes(data)
    images: list[Any] = [None, "red.png", "red.png", None, "red.png", None, "red.png"]
    kept: list[Any] = [None, None, None, 1, 2, None, 3]  # a type that the first chunk does not tell
    table = tmp_path / f"in{suffix}"
    if suffix == ".csv":
        cells = zip(texts, images, kept, strict=True)
        write_csv(table, [[c or "" for c in row] for row in cells], ("text", "image", "n"))
    elif suffix == ".jsonl":
        rows = zip(texts, images, kept, strict=True)
        lines = [{"text": t} | ({"image": i} if i else {}) | ({"n": n} if n else {}) for t, i, n in rows]
        table.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        pictures = [data if image else None for image in images]
        pq.write_table(pa.table({"text": texts, "image": pictures, "n": kept}), table)
    predictor, out = Predictor.load(made / "run", head="concat"), tmp_path / f"out{form}"
    assert [len(chunk["text"]) for chunk in open_table(table).chunks(3)] == [3, 3, 1]
    assert answer_table(predictor, table, out, chunk=3) == 7
    answers = _answered(out)
    p = predictor.predict_proba(table)
    assert [float(row["p_1"]) for row in answers] == pytest.approx(p[:, 1].tolist(), abs=1e-6)
    assert [row["prediction"] for row in answers] == predictor.predict(table)
    assert [row["text"] or None for row in answers] == texts
    assert [int(row["n"]) if row["n"] else None for row in answers] == kept
    assert ("image" in answers[0]) == (suffix != ".parquet")  # bytes are left out


def test_a_broken_row_far_down_is_told_with_its_number_and_nothing_is_left(
    made: Path, tmp_path: Path
) -> None:
    predictor, out = Predictor.load(made / "run", head="concat"), tmp_path / "out.csv"
    out.write_text("old")
    table = write_csv(tmp_path / "t.csv", [["", "a"]] * 8 + [["absent.png", "b"]], ("image", "text"))
    with pytest.raises(UserError, match=r"t.csv: row 9: image .*absent.png cannot be read"):
        answer_table(predictor, table, out, chunk=2)
    with table.open("a") as file:
        file.write("only one cell\n")
    with pytest.raises(UserError, match="row 10 has 1 cells instead of 2"):
        answer_table(predictor, table, out, chunk=2)
    write_csv(table, [["", "a"]] * 5 + [["", ""]], ("image", "text"))
    with pytest.raises(UserError, match="row 6 has neither image nor text"):
        answer_table(predictor, table, out, chunk=2)
    write_csv(table, [], ("image", "text"))
    with pytest.raises(UserError, match=r"t.csv holds no rows"):
        answer_table(predictor, table, out)
    mixed = tmp_path / "mixed.jsonl"
    mixed.write_text('{"text": "a", "n": 1}\n{"text": "b", "n": "x"}\n')
    with pytest.raises(UserError, match="cells of different kinds"):
        answer_table(predictor, mixed, tmp_path / "out.parquet")
    assert answer_table(predictor, mixed, tmp_path / "out.jsonl") == 2
    assert [row["n"] for row in _answered(tmp_path / "out.jsonl")] == [1, "x"]
    assert out.read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"out.csv", "t.csv", "mixed.jsonl", "out.jsonl"}


def test_a_column_that_is_not_there_is_said_in_one_line(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table = write_csv(tmp_path / "t.csv", [["red square"], ["blue square"]], ("text",))
    assert main(["predict", str(made / "run"), str(table), "-o", str(tmp_path / "o.csv")]) == 0
    err = capsys.readouterr().err
    assert err.strip() == f"{table} has no column 'image': all rows are answered without image"
    write_csv(table, [["x"]], ("other",))
    assert main(["predict", str(made / "run"), str(table), "-o", str(tmp_path / "o.csv")]) == 2
    assert "no column 'image'" in capsys.readouterr().err


def test_embeddings_are_the_encoders_own(made: Path) -> None:
    predictor = Predictor.load(made / "run", head="late")
    data = squares.square("red", 20)
    found = predictor.embed([{"image": data, "text": "red square"}, {"text": "gold"}, {"image": data}])
    model = open_encoder(made / "run" / "encoder", "cpu")
    assert {k: (v.dtype, v.shape[0]) for k, v in found.items()} == {
        "image": (np.float32, 3), "text": (np.float32, 3),
    }  # fmt: skip
    texts = model.encode_captions(["red square", "gold"]).numpy()
    assert np.abs(found["text"][:2] - texts).max() < 1e-6
    assert np.isnan(found["text"][2]).all()
    assert np.isnan(found["image"][1]).all()
    assert np.array_equal(found["image"][0], found["image"][2])
    there = np.concatenate([found["text"][:2], found["image"][[0, 2]]])
    assert np.abs(np.linalg.norm(there, axis=1) - 1).max() < 1e-5


def test_evaluating_the_test_rows_again_gives_the_runs_own_scores(made: Path, tmp_path: Path) -> None:
    results = json.loads((made / "run" / "results.json").read_text())
    rows = [row for row in match_rows(tmp_path) if row[-1] == "test"]
    table = write_csv(tmp_path / "test.csv", rows)
    for head in ("concat", "late"):
        predictor = Predictor.load(made / "run", head=head)
        got = predictor.evaluate(table)
        assert (got["head"], got["n"], got["n_groups"]) == (head, len(rows), results["n_test_groups"])
        for metric, score in results["heads"][head]["metrics"].items():
            assert got["metrics"][metric] == pytest.approx(score, abs=1e-5)
    columns = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
    assert predictor.evaluate(columns, root=tmp_path) == got
    one = predictor.evaluate({"text": ["a", "b"], "target": [1, 1]}, samples=100)
    assert one["metrics"]["auroc"] == {"value": None, "low": None, "high": None}
    assert one["n_groups"] == 2
    with pytest.raises(UserError, match="no column 'target', the run's target"):
        predictor.evaluate({"text": ["a"]})
    with pytest.raises(UserError, match="neither 0 nor 1"):
        predictor.evaluate({"text": ["a"], "target": ["x"]})


def test_cells_of_the_input_are_written_as_they_are_and_json_has_no_nan(made: Path, tmp_path: Path) -> None:
    predictor, table = Predictor.load(made / "run", head="concat"), tmp_path / "in.parquet"
    ids, more = [12345678901.0, 0.1 + 0.2, float("nan")], [[1.5, float("inf")], [], None]
    pq.write_table(pa.table({"text": ["a", "b", "c"], "sku": ids, "more": more}), table)
    answer_table(predictor, table, tmp_path / "out.csv")
    rows = _answered(tmp_path / "out.csv")
    assert [row["sku"] for row in rows] == ["12345678901.0", "0.30000000000000004", "nan"]
    assert all(len(row["p_1"]) < 13 for row in rows)
    answer_table(predictor, table, tmp_path / "out.jsonl")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    lines = (tmp_path / "out.jsonl").read_text().splitlines()
    found = [json.loads(line, parse_constant=refuse) for line in lines]
    assert [row["sku"] for row in found] == [*ids[:2], None]
    assert [row["more"] for row in found] == [[1.5, None], [], None]


def test_cells_that_python_or_parquet_cannot_hold_are_told_with_file_and_column(
    made: Path, tmp_path: Path
) -> None:
    predictor, out = Predictor.load(made / "run", head="concat"), tmp_path / "out.parquet"
    table = tmp_path / "in.parquet"
    columns = {"seen": pa.array([1000, 2001], pa.timestamp("ns")), "text": ["a", "b"]}
    pq.write_table(pa.table(columns), table)
    with pytest.raises(UserError, match=r"in.parquet: row 2: Python cannot hold .* column 'seen' of timesta"):
        answer_table(predictor, table, out)
    for given in (table, pa.table(columns)):  # nobody asks for the column
        assert predictor.predict_proba(given).shape == (2, 2)
    lines = tmp_path / "in.jsonl"
    many: list[Any] = [2**53 + 1, *[1] * 2048, 0.5]
    for cells, words in (
        ([1, 2**70], r"in.jsonl: column 'n' holds cells .* Parquet cannot hold \(Python int too large"),
        ([{}], r"in.jsonl: column 'n' holds cells .* Parquet cannot hold \(Cannot write struct type"),
        ([1, "\ud800"], r"in.jsonl: line 2 holds half a surrogate pair"),
        (many, r"out.parquet: column 'n' cannot be written as double \(.*; write answers as .jsonl"),
    ):
        lines.write_text("".join(json.dumps({"text": "a", "n": cell}) + "\n" for cell in cells))
        with pytest.raises(UserError, match=words):
            answer_table(predictor, lines, out)
    lines.write_text('{"text": "a", "n": {}}\n' * 3 + '{"text": "b", "n": {"x": 1}}\n')
    assert answer_table(predictor, lines, out, chunk=2) == 4
    assert pq.read_table(out)["n"].to_pylist()[2:] == [{"x": None}, {"x": 1}]
