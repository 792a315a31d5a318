"""Own data into shards: every kind of table, folders, bad rows, paths that leave their folder."""

import csv
import datetime
import decimal
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diptych.configs.errors import UserError
from diptych.data.build import BuildReport, build_shards, safe_key
from diptych.data.scanning import Limits
from diptych.data.shards import RawSample, open_shards
from diptych.data.sources import Columns
from diptych.data.writer import check_key

from .samples import picture

Rows = Sequence[dict[str, Any]]


def pictures(folder: Path, n: int = 4) -> list[str]:
    (folder / "pics").mkdir(parents=True, exist_ok=True)
    names = [f"pics/p{i}.{('png', 'jpg', 'webp')[i % 3]}" for i in range(n)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(picture(i, name[-4:].strip(".")))
    return names


def table(path: Path, rows: Rows) -> Path:
    names = list(rows[0])
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    elif path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, names, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_all(folder: Path) -> list[RawSample]:
    shards = open_shards(folder)
    return [shards.read(sample_id) for sample_id in range(len(shards))]


def reasons(report: BuildReport) -> list[tuple[int, str]]:
    return [(bad["row"], bad["reason"]) for bad in report.bad]


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "ndjson", "parquet"])
def test_every_kind_of_table_gives_the_same_samples(tmp_path: Path, ending: str) -> None:
    names = pictures(tmp_path)
    texts = ["plain", 'with "quotes", commas', "two\nlines", "umlaut \u00e4 and \N{CAT FACE}"]
    rows = [
        {"image": name, "caption": text, "source": f"s{i}"}
        for i, (name, text) in enumerate(zip(names, texts, strict=True))
    ]
    report = build_shards([table(tmp_path / f"t.{ending}", rows)], tmp_path / "out")
    assert (report.rows, report.written, report.bad) == (4, 4, [])
    got = read_all(tmp_path / "out")
    assert [raw.key for raw in got] == ["000000001", "000000002", "000000003", "000000004"]
    assert [raw.caption for raw in got] == texts
    assert [raw.image for raw in got] == [(tmp_path / name).read_bytes() for name in names]
    assert [raw.extension for raw in got] == ["png", "jpg", "webp", "png"]
    assert [raw.meta for raw in got] == [{"image": row["image"], "source": row["source"]} for row in rows]
    stored = json.loads((tmp_path / "out/build_report.json").read_text())
    fingerprint = open_shards(tmp_path / "out").fingerprint
    assert stored["folders"] == {".": {"samples": 4, "shards": 1, "fingerprint": fingerprint}}
    assert not (tmp_path / "out/quarantine.jsonl").exists()


def test_a_rebuild_is_equal_byte_for_byte(tmp_path: Path) -> None:
    names = pictures(tmp_path, 9)
    source = table(tmp_path / "t.csv", [{"image": name, "caption": name} for name in names])
    for out, workers in (("a", 1), ("b", 2)):
        build_shards([source], tmp_path / out, samples_per_shard=4, workers=workers, decode=False)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_share_of_the_images_is_held_back_and_copies_stay_together(tmp_path: Path) -> None:
    names = pictures(tmp_path, 40)
    rows = [{"image": name, "caption": f"{time} {name}"} for time in ("first", "again") for name in names]
    report = build_shards([table(tmp_path / "t.csv", rows)], tmp_path / "out", val_fraction=0.25)
    train, val = read_all(tmp_path / "out/train"), read_all(tmp_path / "out/val")
    assert (len(train) + len(val), report.written) == (80, 80)
    assert 6 <= len(val) <= 36
    assert {raw.image for raw in train}.isdisjoint({raw.image for raw in val})
    assert sorted(raw.caption for raw in train + val) == sorted(row["caption"] for row in rows)
    assert report.folders["val"]["samples"] == len(val)
    assert report.folders["train"]["fingerprint"] == open_shards(tmp_path / "out/train").fingerprint
    with pytest.raises(UserError, match="leaves none for train"):
        build_shards([tmp_path / "t.csv"], tmp_path / "none", val_fraction=1.0)
    assert list((tmp_path / "none").rglob("*.tar")) == []


def test_parquet_holds_bytes_hugging_face_images_and_every_type(tmp_path: Path) -> None:
    day = datetime.datetime(2024, 5, 6, 7, 8, 9)
    rows = [
        {"jpg": picture(0, "jpg"), "text": "bytes", "n": 3, "f": 0.5, "bad": float("nan"), "day": day,
         "price": decimal.Decimal("1.50"), "blob": b"x", "tags": ["a"], "none": None, "yes": True}
    ]  # fmt: skip
    build_shards([table(tmp_path / "a.parquet", rows)], tmp_path / "a")
    (raw,) = read_all(tmp_path / "a")
    assert (raw.image, raw.caption) == (picture(0, "jpg"), "bytes")
    assert raw.meta == {
        "n": 3, "f": 0.5, "day": "2024-05-06T07:08:09", "price": 1.5, "tags": ["a"], "yes": True
    }  # fmt: skip
    rows = [{"image": {"bytes": picture(1), "path": "x.png"}, "caption": "as the hub does"}]
    build_shards([table(tmp_path / "b.parquet", rows)], tmp_path / "b")
    assert read_all(tmp_path / "b")[0].image == picture(1)


def test_several_captions_are_kept_and_the_first_is_the_text(tmp_path: Path) -> None:
    name = pictures(tmp_path, 1)[0]
    rows = [{"image": name, "captions": ["one", " ", "two"]}]
    build_shards([table(tmp_path / "t.jsonl", rows)], tmp_path / "out")
    (raw,) = read_all(tmp_path / "out")
    assert (raw.caption, raw.meta["captions"]) == ("one", ["one", "two"])


def test_columns_are_found_by_name_or_chosen(tmp_path: Path) -> None:
    name = pictures(tmp_path, 1)[0]
    # open_clip's own layout: tabs in a file called .csv
    (tmp_path / "t.csv").write_text(f"filepath\ttitle\tText\n{name}\ta title, with a comma\tother\n")
    build_shards([tmp_path / "t.csv"], tmp_path / "a")
    assert read_all(tmp_path / "a")[0].caption == "other"  # in the order of the usual names
    build_shards([tmp_path / "t.csv"], tmp_path / "b", columns=Columns(caption="title", key="title"))
    (raw,) = read_all(tmp_path / "b")
    assert (raw.key, raw.caption, raw.meta["Text"]) == (
        "a title, with a comma",
        "a title, with a comma",
        "other",
    )
    for columns, words in (
        (
            Columns(caption="nope"),
            "has no column 'nope'; it has filepath, title, Text: choose with --caption",
        ),
        (Columns(image="nope"), "choose with --image"),
        (Columns(key="nope"), "choose with --key"),
    ):
        with pytest.raises(UserError, match=words):
            build_shards([tmp_path / "t.csv"], tmp_path / "c", columns=columns)
    (tmp_path / "u.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="has no known caption column; it has a, b"):
        build_shards([tmp_path / "u.csv"], tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_a_folder_of_images_with_texts_beside_them(tmp_path: Path) -> None:
    source = tmp_path / "source"
    names = pictures(source, 3)
    (source / "pics/p0.txt").write_text("from txt\n")
    (source / "pics/p0.json").write_text(json.dumps({"licence": "CC0"}))
    (source / "pics/p1.json").write_text(json.dumps({"caption": "from json", "n": 1}))
    (source / "top.v2.PNG").write_bytes(picture(9))
    (source / "top.v2.txt").write_text("a name with dots")
    (source / ".hidden").mkdir()
    (source / ".hidden/x.png").write_bytes(picture(9))
    report = build_shards([source], tmp_path / "out", max_bad_fraction=0.5)
    assert reasons(report) == [(4, "caption")]
    assert "neither p2.txt nor p2.json" in report.bad[0]["detail"]
    got = read_all(tmp_path / "out")
    assert [(raw.key, raw.caption) for raw in got] == [
        ("top_v2", "a name with dots"), ("pics/p0", "from txt"), ("pics/p1", "from json")
    ]  # fmt: skip
    assert got[1].meta == {"licence": "CC0", "path": names[0]}
    assert got[2].meta == {"n": 1, "path": names[1]}


def test_two_folders_may_have_pictures_of_one_name(tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        pictures(tmp_path / name, 1)
        (tmp_path / name / "pics/p0.txt").write_text(name)
    build_shards([tmp_path / "cats", tmp_path / "dogs"], tmp_path / "out")
    assert [(raw.key, raw.caption) for raw in read_all(tmp_path / "out")] == [
        ("cats/pics/p0", "cats"), ("dogs/pics/p0", "dogs")
    ]  # fmt: skip


def test_bad_rows_are_named_and_left_out(tmp_path: Path) -> None:
    good = pictures(tmp_path, 1)[0]
    (tmp_path / "pics/cut.png").write_bytes(picture(size=(60, 60))[:-600])
    (tmp_path / "pics/no.png").write_bytes(b"no image")
    (tmp_path / "pics/large.png").write_bytes(
        picture()[:16] + (60000).to_bytes(4, "big") * 2 + picture()[24:]
    )
    lines = [
        {"image": good, "caption": "good"},
        {"image": "pics/none.png", "caption": "no such file"},
        {"image": "pics", "caption": "a folder"},
        {"image": "pics/cut.png", "caption": "cut"},
        {"image": "pics/no.png", "caption": "no image"},
        {"image": "pics/large.png", "caption": "a bomb"},
        {"image": "https://example.com/x.png", "caption": "a link"},
        {"image": "", "caption": "nothing"},
        {"image": 7, "caption": "a number"},
        {"image": good, "caption": "  "},
        {"image": good, "caption": 5},
        {"image": good, "caption": []},
        {"image": "a\0b", "caption": "no path"},
        {"caption": "no image"},
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "t.jsonl").write_bytes(text.encode() + b'{"image": \n[1]\n\xff\n\n')
    report = build_shards([tmp_path / "t.jsonl"], tmp_path / "out", max_bad_fraction=0.99)
    assert reasons(report) == list(
        enumerate(["missing", "missing", "decode", "decode", "size", "url", "missing", "missing", "caption",
                   "caption", "caption", "path", "missing", "json", "json", "json"], 2)
    )  # fmt: skip
    assert (report.rows, report.written) == (17, 1)
    listed = [json.loads(line) for line in (tmp_path / "out/quarantine.jsonl").read_text().splitlines()]
    assert listed == report.bad
    assert json.loads((tmp_path / "out/build_report.json").read_text())["reasons"] == report.reasons
    assert len(open_shards(tmp_path / "out")) == 1


def test_csv_rows_with_too_many_cells_or_foreign_letters_are_bad_rows(tmp_path: Path) -> None:
    good = pictures(tmp_path, 1)[0].encode()
    lines = [b"\xef\xbb\xbfimage,caption", good + b",fine", good + b",a comma, unquoted", good, b"",
             good + b",caf\xe9", good + b',"over\ntwo lines"']  # fmt: skip
    (tmp_path / "t.csv").write_bytes(b"\r\n".join(lines))
    report = build_shards([tmp_path / "t.csv"], tmp_path / "out", max_bad_fraction=0.9)
    assert reasons(report) == [(2, "columns"), (3, "columns"), (4, "json")]
    assert [raw.caption for raw in read_all(tmp_path / "out")] == ["fine", "over\ntwo lines"]


def test_keys_of_a_column_must_be_unique(tmp_path: Path) -> None:
    name = pictures(tmp_path, 1)[0]
    rows = [{"image": name, "caption": "x", "id": value} for value in ("a.b", "c", "c", "", "a_b")]
    source = table(tmp_path / "t.csv", rows)
    report = build_shards([source], tmp_path / "out", columns=Columns(key="id"), max_bad_fraction=0.9)
    assert reasons(report) == [(3, "duplicate"), (4, "key"), (5, "duplicate")]
    got = read_all(tmp_path / "out")
    assert [(raw.key, raw.meta["id"]) for raw in got] == [("a_b", "a.b"), ("c", "c")]


def test_no_path_leads_out_of_its_folder(tmp_path: Path) -> None:
    data, secret = tmp_path / "data", tmp_path / "secret.png"
    data.mkdir()
    secret.write_bytes(picture())
    (data / "in.png").write_bytes(picture(1))
    (data / "link.png").symlink_to(secret)
    (data / "loop.png").symlink_to("loop.png")
    (data / "folder").symlink_to(tmp_path)
    (data / "inner.png").symlink_to("in.png")
    names = ["../secret.png", str(secret), "link.png", "folder/secret.png", "x/../../secret.png", "loop.png",
             "inner.png", str(data / "in.png"), "./in.png"]  # fmt: skip
    source = table(data / "t.csv", [{"image": name, "caption": name} for name in names])
    report = build_shards([source], tmp_path / "out", max_bad_fraction=0.9)
    assert [(row, reason) for row, reason in reasons(report) if row != 6] == [
        (row, "path") for row in (1, 2, 3, 4, 5)
    ]
    assert [raw.caption for raw in read_all(tmp_path / "out")] == names[6:]
    # a folder of images may not pull in other files by links either
    (data / "link.txt").write_text("a secret")
    (data / "in.txt").symlink_to(tmp_path / "note")
    (tmp_path / "note").write_text("another secret")
    with pytest.raises(UserError, match="rows are bad"):
        build_shards([data], tmp_path / "out2", max_bad_fraction=1.0)
    # and --root widens the fence by choice
    report = build_shards([source], tmp_path / "out3", root=tmp_path, max_bad_fraction=0.9)
    assert [raw.caption for raw in read_all(tmp_path / "out3")] == [str(secret), str(data / "in.png")]


def test_root_says_what_paths_are_relative_to(tmp_path: Path) -> None:
    names = pictures(tmp_path / "images", 2)
    (tmp_path / "tables").mkdir()
    source = table(tmp_path / "tables/t.csv", [{"image": name, "caption": name} for name in names])
    with pytest.raises(UserError, match="2 of 2 rows are bad"):
        build_shards([source], tmp_path / "out")
    build_shards([source], tmp_path / "out", root=tmp_path / "images")
    assert [raw.caption for raw in read_all(tmp_path / "out")] == names
    assert not (tmp_path / "out/build_failed.json").exists()


def test_too_many_bad_rows_stop_the_build_and_leave_no_shards(tmp_path: Path) -> None:
    names = [*pictures(tmp_path, 9), "pics/none.png"]
    source = table(tmp_path / "t.csv", [{"image": name, "caption": "x"} for name in names])
    with pytest.raises(UserError) as error:
        build_shards([source], tmp_path / "out")
    assert "1 of 10 rows are bad (missing 1), the first is row 10 of" in str(error.value)
    assert "--max-bad-fraction" in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [".building", "build_failed.json"]
    failed = json.loads((tmp_path / "out/build_failed.json").read_text())
    assert [bad["row"] for bad in failed["bad_rows"]] == [10]
    build_shards([source], tmp_path / "out", max_bad_fraction=0.1)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "00000.idx", "00000.tar", "build_report.json", "manifest.jsonl", "quarantine.jsonl", "sizes.json"
    ]  # fmt: skip


def test_a_hopeless_build_stops_early(tmp_path: Path) -> None:
    source = table(tmp_path / "t.csv", [{"image": "none.png", "caption": "x"}] * 5000)
    with pytest.raises(UserError, match="of 1000 rows are bad"):
        build_shards([source], tmp_path / "out")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("t.csv", b"", "is empty"),
        ("t.csv", b"image,caption\n", "no rows"),
        ("t.csv", b"image,caption,caption\nx,y,z\n", "names a column twice"),
        ("t.xlsx", b"PK", "cannot read '.xlsx' files"),
        ("t.parquet", b"PAR1 not really", "cannot be read as Parquet"),
        ("t.jsonl", b"", "no rows"),
    ],
)
def test_a_source_that_is_none_is_one_sentence(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as error:
        build_shards([tmp_path / name], tmp_path / "out")
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert str(tmp_path / name) in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="there is no"):
        build_shards([tmp_path / "absent.csv"], tmp_path / "out")


def test_decoding_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "cut.png").write_bytes(picture(size=(60, 60))[:-600])
    source = table(tmp_path / "t.csv", [{"image": "cut.png", "caption": "x"}])
    assert build_shards([source], tmp_path / "out", decode=False).written == 1


def test_sidecars_that_are_no_json_and_large_files_are_bad_rows(tmp_path: Path) -> None:
    pictures(tmp_path / "s", 3)
    for number, text in enumerate(["{", '{"caption": 3}', '{"caption": "fine"}']):
        (tmp_path / f"s/pics/p{number}.json").write_text(text)
    report = build_shards([tmp_path / "s"], tmp_path / "out", max_bad_fraction=0.9)
    assert reasons(report) == [(1, "json"), (2, "caption")]
    with pytest.raises(UserError, match="size 1"):
        build_shards([tmp_path / "s"], tmp_path / "large", limits=Limits(max_image_bytes=20))


def test_a_fifo_is_no_image(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "ok.png").write_bytes(picture())
    rows = [{"image": name, "caption": "x"} for name in ("pipe.png", "ok.png")]
    report = build_shards([table(tmp_path / "t.csv", rows)], tmp_path / "out", max_bad_fraction=0.5)
    assert reasons(report) == [(1, "missing")]


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=150))
def test_any_text_makes_a_key_that_readers_take(text: str) -> None:
    key = safe_key(text)
    check_key(key)
    assert safe_key(key) == key


def test_fit_keys_stay_and_long_ones_stay_different() -> None:
    assert safe_key("a/b-c d_\N{CAT FACE}") == "a/b-c d_\N{CAT FACE}"
    assert safe_key("x" * 200) != safe_key("x" * 201)


def test_pictures_are_stored_as_they_are(tmp_path: Path) -> None:
    Image.new("CMYK", (8, 8)).save(tmp_path / "x.jpg")
    source = table(tmp_path / "t.csv", [{"image": "x.jpg", "caption": "print colours"}])
    build_shards([source], tmp_path / "out")
    assert read_all(tmp_path / "out")[0].image == (tmp_path / "x.jpg").read_bytes()
