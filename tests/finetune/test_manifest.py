"""Labelled tables: every format, missing against broken, and every mistake in one sentence."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.configs.errors import UserError
from diptych.finetune.config import CvConfig, LabelledDataConfig, ModalityConfig, TaskConfig
from diptych.finetune.scores.intervals import paired_intervals
from diptych.finetune.splits.folds import make_folds
from diptych.finetune.tables.cells import BrokenPicture, Picture, PictureFolder, PictureReader
from diptych.finetune.tables.manifest import parse_rows, read_columns, read_rows, split_rows
from diptych.finetune.tasks.targets import encode_targets
from diptych.pretrain.statistics import bootstrap_means

from .labelled import squares, write_csv

BINARY = TaskConfig(type="binary")
HEAD = ("id", "image", "text", "target", "group", "split")
ROWS = [
    ["a", "a.png", "a red\none, or not", 1, "g0", "train"],
    ["b", "b.png", "", 0, "g1", "train"],
    ["c", "", "grün", 0, "g2", "test"],
    ["d", "d.png", "x", 1, "g3", "test"],
]


def config(path: Path, **options: Any) -> LabelledDataConfig:
    return LabelledDataConfig(**{"manifest": str(path), "id": "id", "group": "group", **options})


def write(folder: Path, suffix: str, rows: list[list[Any]] = ROWS) -> Path:
    path = folder / f"table{suffix}"
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(HEAD)}
    if suffix == ".parquet":
        empty = {k: [cell if cell != "" else None for cell in v] for k, v in columns.items()}
        pq.write_table(pa.table(empty), path)
    elif suffix == ".jsonl":
        kept = [{k: v for k, v in zip(HEAD, row, strict=True) if v != ""} for row in rows]
        path.write_text("\n".join(json.dumps(row) for row in kept) + "\n\n", encoding="utf-8")
    else:
        with path.open("w", newline="", encoding="utf-8-sig") as file:
            csv.writer(file, delimiter="\t" if suffix == ".tsv" else ",").writerows([HEAD, *rows])
    return path


@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".jsonl", ".parquet"])
def test_every_format_gives_the_same_rows(suffix: str, tmp_path: Path) -> None:
    rows = read_rows(config(write(tmp_path, suffix)), BINARY)
    assert rows.ids == ["a", "b", "c", "d"]
    assert rows.cells["text"] == ["a red\none, or not", None, "grün", "x"]
    there = [cell[0].path.name if cell and cell[0].path else None for cell in rows.cells["image"]]
    assert there == ["a.png", "b.png", None, "d.png"]
    splits = split_rows(rows, config(tmp_path), inner_share=0.5)
    assert splits.test.tolist() == [2, 3]


def test_labels_become_class_numbers(tmp_path: Path) -> None:
    def classes(labels: list[Any], task: TaskConfig) -> tuple[list[int], list[str]]:
        rows = [
            [str(i), "", "x", label, str(i), "test" if i > 3 else "train"] for i, label in enumerate(labels)
        ]
        read = read_rows(config(write(tmp_path, ".parquet", rows)), task)
        splits = split_rows(read, config(tmp_path), inner_share=0.3)
        targets, names = encode_targets(read, task, splits, min_rows=0)
        return targets.tolist(), names

    for labels in ([0, 1, 0, 1, 1], [0.0, 1.0, 0.0, 1.0, 1.0], [False, True, False, True, True]):
        assert classes(labels, BINARY) == ([0, 1, 0, 1, 1], ["0", "1"])
    assert classes(["no", "yes"] * 3, TaskConfig(type="binary", positive="yes"))[1] == ["no", "yes"]
    assert classes(["yes", "no"] * 3, TaskConfig(type="binary", positive="no"))[1] == ["yes", "no"]
    three = TaskConfig(type="multiclass", classes=("c", "a", "b"))
    assert classes(["a", "b", "c", "a", "b"], three) == ([1, 2, 0, 1, 2], ["c", "a", "b"])
    assert classes([10, 9, 10, 9, 9], TaskConfig(type="multiclass"))[1] == ["10", "9"]


def test_without_val_or_split_groups_stay_whole_and_the_split_is_fixed() -> None:
    n = 200
    columns = {"text": ["x"] * n, "target": [i % 2 for i in range(n)], "group": [i // 4 for i in range(n)]}
    wanted = LabelledDataConfig(
        manifest="x",
        modalities={"text": ModalityConfig(column="text")},
        split=None,
        group="group",
    )
    rows = parse_rows(columns, wanted, PictureFolder(Path(".")), source="x", target="target")
    first, again = (split_rows(rows, wanted, inner_share=0.15) for _ in range(2))
    groups = [{rows.groups[i] for i in part} for part in (first.train, first.inner, first.test)]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert sorted(np.concatenate([first.train, first.inner, first.test])) == list(range(n))
    assert len(first.test) == 40
    assert len(first.inner) == 24
    assert all((a == b).all() for a, b in zip(vars(first).values(), vars(again).values(), strict=True))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_rows_without_a_group_stand_for_themselves(suffix: str, tmp_path: Path) -> None:
    table = [[f"r{i}", "", f"text {i}", i % 2, f"g{i // 2}" if i < 8 else "", ""] for i in range(24)]
    table[0][4] = table[1][4] = "row r9"  # what the group of row r9 would be called
    wanted = config(
        write(tmp_path, suffix, table), split=None, modalities={"text": ModalityConfig(column="text")}
    )
    rows = read_rows(wanted, BINARY)
    assert rows.groups[:8] == [row[4] for row in table[:8]]
    assert len(set(rows.groups)) == 4 + 16
    assert all(name.endswith(row[0]) for name, row in zip(rows.groups[8:], table[8:], strict=True))
    folds = make_folds(rows, None, CvConfig(folds=20), inner_share=0.2)
    assert sorted(len(fold.splits.test) for fold in folds) == [1] * 16 + [2] * 4
    hits = np.arange(24) % 3 == 0
    p = np.where(hits[:, None], [[0.0, 1.0]], [[1.0, 0.0]])
    got = paired_intervals(np.ones(24, dtype=np.int64), {"x": p}, ["accuracy"], rows.groups, samples=100)[0]
    named = [row[4] or f" {row[0]}" for row in table]
    assert got["x"]["accuracy"] == bootstrap_means(hits, named, samples=100)[0]


Change = Callable[[list[list[Any]]], Any]


def cell(row: int, column: str, value: Any) -> Change:
    return lambda rows: rows[row].__setitem__(HEAD.index(column), value)


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        (cell(1, "id", "a"), {}, r"table.csv: id 'a' stands on 2 rows; make it unique"),
        (
            cell(2, "split", "tset"),
            {},
            r"row 3: split 'tset' is unknown in column 'split'; use train, val, test",
        ),
        (cell(2, "group", "g1"), {}, r"group 'g1' of column 'group' stands in splits train and test"),
        (cell(2, "text", " "), {}, r"row 3 has neither image nor text; fill a cell"),
        (cell(1, "target", ""), {}, r"row 2: column 'target' is empty; label the row"),
        (cell(1, "image", "../../etc/passwd"), {}, r"row 2: image '../../etc/passwd' leads out of"),
        (cell(1, "image", "/etc/passwd"), {}, r"row 2: image '/etc/passwd' leads out of .*data.root"),
        (lambda rows: rows.clear(), {}, r"holds no rows; add some"),
        (
            cell(1, "target", "maybe"),
            {},
            r"row 2: 'maybe' in column 'target' is neither 0 nor 1; name the pos",
        ),
        (cell(0, "target", 0), {}, r"class '1' in column 'target' has 0 training rows, needed are 2"),
        (lambda rows: [row.__setitem__(5, "train") for row in rows], {}, r"has no row of split test"),
        (lambda rows: rows[0].append("more"), {}, r"row 1 has 7 cells instead of 6; quote cells"),
        (lambda rows: None, {"group": "grp"}, r"data.group: .* no column 'grp'; did you mean 'group'\?"),
        (lambda rows: None, {"id": "zzz"}, r"data.id: .* it has id, image, text, target, group, split"),
    ],
)
def test_mistakes_in_a_table_are_told_in_one_sentence(
    change: Change, options: dict[str, Any], words: str, tmp_path: Path
) -> None:
    rows = [list(row) for row in ROWS]
    change(rows)
    wanted = config(write(tmp_path, ".csv", rows), **options)

    def read() -> None:
        rows = read_rows(wanted, BINARY)
        encode_targets(rows, BINARY, split_rows(rows, wanted, inner_share=0.5), min_rows=2)

    with pytest.raises(UserError, match=words) as error:
        read()
    assert "\n" not in str(error.value)


def test_groups_may_stand_in_several_splits_where_that_is_said(tmp_path: Path) -> None:
    rows = [list(row) for row in ROWS]
    cell(2, "group", "g1")(rows)
    wanted = config(write(tmp_path, ".csv", rows), group_across_splits="allow")
    assert read_rows(wanted, BINARY).groups == ["g0", "g1", "g1", "g3"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", "is empty; its first line must name the columns"),
        ("t.csv", b"a,a\n1,2\n", "column 'a' stands twice"),
        ("t.csv", b"\xff\xfea", "is not UTF-8"),
        ("t.csv", b'a,b\n"x,2\n', "not a table of separated values"),
        ("t.jsonl", b'{"a": 1}\n{"a"\n', "line 2 is not JSON"),
        ("t.jsonl", b"[1]\n", "line 1 must be an object of columns, not list"),
        ("t.parquet", b"PAR1 no", "is not Parquet"),
        ("t.xlsx", b"", "a table must end in .csv, .tsv, .jsonl, .parquet; convert it"),
    ],
)
def test_files_that_are_no_tables_are_told(name: str, content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_columns(tmp_path / name)
    with pytest.raises(UserError, match=r"no such file or directory; give the path of a labelled table"):
        read_columns(tmp_path / "absent.csv")


def test_pictures_are_files_bytes_or_samples_of_shards_and_equal_content_is_one(tmp_path: Path) -> None:
    squares.write_split(tmp_path / "shards", ["noto"], squares.NAMES[:3])
    (tmp_path / "tables").mkdir()
    data = squares.square("red", 0)
    (tmp_path / "tables" / "with#hash.png").write_bytes(data)
    folder, reader = PictureFolder(tmp_path / "tables", tmp_path), PictureReader()
    shard = folder.parse("../shards#noto-red", "row 1")
    file = folder.parse("with#hash.png", "row 2")
    raw = folder.parse(data, "row 3")
    assert shard is not None
    assert shard.key == "noto-red"
    assert file is not None
    assert file.key is None
    assert raw is not None
    assert [reader.read(picture) for picture in (shard, file, raw)] == [data] * 3
    assert reader.fingerprint(file) == reader.fingerprint(raw) == reader.fingerprint(shard)
    picture = folder.parse(Image.open(tmp_path / "tables" / "with#hash.png"), "row 4")
    assert picture is not None
    assert picture.data is not None
    assert [folder.parse(empty, "row 5") for empty in (None, "", "  ", float("nan"), b"")] == [None] * 5
    with pytest.raises(UserError, match="row 6: the image is int; give a path, bytes or FOLDER#KEY"):
        folder.parse(7, "row 6")
    with pytest.raises(UserError, match="leads out of"):
        PictureFolder(tmp_path / "tables").parse("../shards#noto-red", "row 7")


def test_a_link_does_not_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "secret.png").write_bytes(b"x")
    (tmp_path / "inside" / "link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(UserError, match="leads out of"):
        PictureFolder(tmp_path / "inside").parse("link.png", "row 1")


def test_a_named_picture_that_is_not_there_is_broken_and_not_missing(tmp_path: Path) -> None:
    squares.write_split(tmp_path / "shards", ["noto"], squares.NAMES[:2])
    reader = PictureReader()
    for picture, words in (
        (Picture(path=tmp_path / "no.png"), "no such file"),
        (Picture(path=tmp_path / "shards", key="nobody"), "the shards have no sample 'nobody'"),
        (Picture(path=tmp_path), "is a directory"),
    ):
        with pytest.raises(BrokenPicture, match=words):
            reader.read(picture)


def test_a_table_to_predict_needs_no_labels_and_not_every_column(tmp_path: Path) -> None:
    rows = parse_rows(
        {"text": ["a", "b"]}, config(tmp_path), PictureFolder(tmp_path), source="x", target=None
    )
    assert rows.cells == {"image": [None, None], "text": ["a", "b"]}
    with pytest.raises(UserError, match="has no column 'image'"):
        parse_rows({"other": ["a"]}, config(tmp_path), PictureFolder(tmp_path), source="x", target=None)


def test_a_table_of_squares_is_read_from_disk(tmp_path: Path) -> None:
    path = write_csv(tmp_path / "t.csv", ROWS)
    assert len(read_rows(config(path), BINARY)) == 4


def test_columns_that_nobody_asks_for_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path, ".parquet")
    seen = pa.array([1, 2, 3, 4], pa.timestamp("ns"))  # of which Python has no datetimes
    pq.write_table(pq.read_table(path).add_column(0, "seen", seen), path)
    assert read_rows(config(path), BINARY).targets == [1, 0, 0, 1]
    with pytest.raises(UserError, match=r"table.parquet: row 1: Python cannot hold .* column 'seen'"):
        read_rows(config(path, group="seen"), BINARY)
    pq.write_table(pa.table([pa.array(["x"])] * 2, names=["a", "a"]), path)
    with pytest.raises(UserError, match="column 'a' stands twice"):
        read_columns(path)
