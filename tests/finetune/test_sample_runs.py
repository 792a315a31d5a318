"""Runs and predictions of tars and of folders of pictures are those of a table that holds the same."""

import csv
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.finetune.answers import answer_table
from diptych.finetune.predictor import Predictor

from .labelled import match_rows, write_config, write_csv, write_task
from .runs import contents, finetune, timeless

pytestmark = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
SHARDS = "data={{manifest: {0}/shards, format: shards, id: __key__, group: group}}"
CV = "eval.cv={folds: 2}"


def write_shards(folder: Path, rows: list[list[Any]]) -> Path:
    """The rows of the table of squares in tars of 50 samples."""
    (folder / "shards").mkdir()
    for start in range(0, len(rows), 50):
        with webdataset.TarWriter(str(folder / "shards" / f"{start:04d}.tar")) as writer:
            for name, image, text, target, group, split in rows[start : start + 50]:
                picture = (folder / image).read_bytes()
                fields = {"target": target, "group": group, "split": split}
                writer.write({"__key__": name, "png": picture, "txt": text, "json": fields})
    return folder / "shards"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a table, and tars with the same rows."""
    folder = tmp_path_factory.mktemp("samples")
    write_task(folder)
    write_shards(folder, match_rows(folder))
    write_config(folder, "{late: {op: late}}")
    finetune(folder)
    return folder


def comparable(results: Any) -> Any:
    return {k: v for k, v in timeless(results).items() if k != "checkpoint"}


def into(out: Path, folder: Path, *words: str) -> Any:
    """Results of a run in a folder of its own."""
    assert main(["finetune", str(folder / "finetune.yaml"), f"out={out}", *words]) == 0
    return json.loads((out / "results.json").read_text())


def other(made: Path, folder: Path) -> tuple[str, str]:
    """Overrides for a run beside the one that is shared."""
    write_config(folder, "{late: {op: late}}")
    return f"model.checkpoint={made}/checkpoint", SHARDS.format(made)


@pytest.mark.slow
def test_a_run_of_shards_is_that_of_the_table(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = other(made, tmp_path)
    results = finetune(tmp_path, *words)
    assert comparable(results) == comparable(json.loads((made / "run" / "results.json").read_text()))
    assert contents(tmp_path / "run") == contents(made / "run")
    capsys.readouterr()
    assert finetune(tmp_path, *words)["test_looks"] == 1
    assert capsys.readouterr().err.count("kept from before") == 4
    reports: list[Any] = []
    for folder, more in ((made, ()), (tmp_path, words)):
        main(["finetune", str(folder / "finetune.yaml"), "--validate", "--json", *more])
        reports.append(json.loads(capsys.readouterr().out))
    assert {k: v for k, v in reports[0].items() if k != "table"} == {
        k: v for k, v in reports[1].items() if k != "table"
    }
    folds = [
        comparable(into(tmp_path / f"folds{n}", folder, CV, *more))
        for n, (folder, more) in enumerate(((made, ()), (tmp_path, words)))
    ]
    assert folds[0] == folds[1]
    assert len(folds[0]["folds"]) == 2


@pytest.mark.parametrize("form", [".csv", ".jsonl", ".parquet"])
def test_predictions_of_shards_are_those_of_the_table(made: Path, form: str, tmp_path: Path) -> None:
    predictor = Predictor.load(made / "run", head="concat")
    p = predictor.predict_proba(made / "match.csv")
    assert np.array_equal(predictor.predict_proba(made / "shards", format="shards"), p)
    assert predictor.predict(f"{made}/shards/{{0000,0050,0100,0150}}.tar") == predictor.predict(
        made / "match.csv"
    )
    out = tmp_path / f"out{form}"
    assert answer_table(predictor, made / "shards", out, form="shards", chunk=7) == 160
    if form == ".parquet":
        rows = pq.read_table(out).to_pylist()
    elif form == ".jsonl":
        rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    else:
        rows = list(csv.DictReader(out.open(encoding="utf-8", newline="")))
    assert list(rows[0]) == [
        "__key__", "__folder__", "text", "target", "group", "split", "prediction", "p_0", "p_1",
    ]  # fmt: skip
    assert [row["__key__"] for row in rows] == [row[0] for row in match_rows(tmp_path)]
    assert [float(row["p_1"]) for row in rows] == pytest.approx(p[:, 1].tolist(), abs=1e-6)
    got = predictor.evaluate(made / "shards", format="shards")
    assert got == predictor.evaluate(made / "match.csv")


def test_the_command_asks_what_a_folder_is(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["predict", str(made / "run"), str(made / "shards"), "-o", str(tmp_path / "o.csv")]
    assert main(ask) == 2
    error = capsys.readouterr().err.strip()
    assert error.endswith("say which")
    assert "--format: " in error
    assert "\n" not in error
    assert main([*ask, "--format", "shards"]) == 0
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 161
    assert main([*ask[:2], str(made / "images"), *ask[3:], "--format", "folders"]) == 0
    told = capsys.readouterr().err
    assert "images has no column 'text': all rows are answered without text" in told
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 81  # pictures that lie in no class


def test_a_damaged_sample_stops_a_run_or_is_listed(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = match_rows(tmp_path)
    shards = write_shards(tmp_path, rows)
    with tarfile.open(shards / "0000.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("bad.json"))  # empty
    words = (other(made, tmp_path)[0], SHARDS.format(tmp_path))
    assert main(["finetune", str(tmp_path / "finetune.yaml"), *words]) == 2
    error = capsys.readouterr().err.strip()
    assert "0000.tar#bad has a '.json' that cannot be read" in error
    assert error.endswith("mend it or set data.on_error=quarantine")
    main(["finetune", str(tmp_path / "finetune.yaml"), "--validate", *words])
    assert "1 samples cannot be read, the first: " in capsys.readouterr().out
    results = finetune(tmp_path, *words, "data.on_error=quarantine")
    assert comparable(results) == comparable(json.loads((made / "run" / "results.json").read_text()))
    with (tmp_path / "run" / "quarantine.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert [(row["row"], row["id"], row["image"]) for row in listed] == [
        ("", "bad", str(shards / "0000.tar"))
    ]
    with tarfile.open(shards / "0000.tar", "a") as tar:
        tar.addfile(tarfile.TarInfo("worse.json"))
    assert main(["finetune", str(tmp_path / "finetune.yaml"), *words, "data.on_error=quarantine"]) == 2
    assert "2 of 162 rows are too many" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"0000.tar#bad has a '.json'"):
        Predictor.load(made / "run").predict(shards, format="shards")


def test_a_run_of_folders_is_that_of_the_table(made: Path, tmp_path: Path) -> None:
    rows: list[list[Any]] = []
    for name, image, text, target, _, split in match_rows(made):
        if target:
            colour = name.split("-")[0].rstrip("0123456789")
            path = tmp_path / "pets" / split / colour / Path(image).name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes((made / image).read_bytes())
            path.with_suffix(".txt").write_text(text, encoding="utf-8")
            rows.append([str(path.relative_to(tmp_path / "pets")), text, colour, split])
    order = {"train": 0, "val": 1, "test": 2}
    rows.sort(key=lambda row: (order[row[3]], row[0]))
    write_csv(tmp_path / "pets" / "all.csv", rows, ("image", "text", "label", "split"))
    write_config(tmp_path, "{late: {op: late}}")
    words = (
        f"model.checkpoint={made}/checkpoint",
        "task={type: multiclass, target: label}",
        "eval.seeds=[0]",
    )
    table = finetune(tmp_path, *words, f"data={{manifest: {tmp_path}/pets/all.csv}}")
    weights = contents(tmp_path / "run")
    whole = f"{{manifest: '{tmp_path}/pets/{{train,val,test}}', format: folders, split: __folder__}}"
    results = into(tmp_path / "other", tmp_path, *words, f"data={whole}")
    assert comparable(results) == comparable(table)
    assert contents(tmp_path / "other") == weights
    predictor = Predictor.load(tmp_path / "other")
    answers = predictor.predict(tmp_path / "pets" / "test", format="folders")
    tested = [row[0] for row in rows if row[3] == "test"]
    given = {"image": tested, "text": [row[1] for row in rows if row[3] == "test"]}
    assert answers == predictor.predict(given, root=tmp_path / "pets")
    accuracy = results["heads"][results["best"]]["metrics"]["accuracy"]["value"]
    assert (
        np.mean([said == name.split("/")[1] for said, name in zip(answers, tested, strict=True)]) == accuracy
    )
