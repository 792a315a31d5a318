"""Tars as the source of a build: sharded anew, with nothing lost, nothing changed and every fault named."""

import json
from pathlib import Path

import pytest

from diptych.configs.errors import UserError
from diptych.data import tar_source
from diptych.data.build import build_shards
from diptych.data.foreign import index_folder
from diptych.data.recode import Recode
from diptych.data.shards import open_shards
from diptych.data.sources import Columns
from diptych.data.verify import verify_folder

from .samples import as_dict, flip, member_offsets, picture, sample_members, samples, write, write_tar
from .test_build import read_all, reasons, table
from .test_foreign import HALF, half_samples
from .test_foreign_layouts import img2dataset


@pytest.mark.parametrize("how", ["folder", "tars", "built"])
def test_resharding_keeps_every_sample_as_it_is(tmp_path: Path, how: str) -> None:
    content = samples(11)
    folder = tmp_path / "old"
    if how == "built":
        write(folder, content, per_shard=4)
    else:
        for number in range(3):
            write_tar(folder / f"{number}.tar", sample_members(content[4 * number : 4 * number + 4]))
    sources = sorted(folder.glob("*.tar")) if how == "tars" else [folder]
    report = build_shards(sources, tmp_path / "new", samples_per_shard=3)
    assert (report.rows, report.bad) == (11, [])
    assert open_shards(tmp_path / "new").shard_sizes.tolist() == [3, 3, 3, 2]
    got = [as_dict(raw) for raw in read_all(tmp_path / "new")]
    assert got == [
        dict(zip(("key", "image", "extension", "caption", "meta"), s, strict=True)) for s in content
    ]


def test_resharding_a_set_into_itself_sized_shards_gives_its_bytes(tmp_path: Path) -> None:
    write(tmp_path / "old", samples(11), per_shard=4)
    build_shards([tmp_path / "old"], tmp_path / "new", samples_per_shard=4, workers=2)
    assert open_shards(tmp_path / "new").fingerprint == open_shards(tmp_path / "old").fingerprint


@pytest.mark.parametrize("damage", ["image", "caption", "idx", "tar"])
def test_an_index_spares_reading_and_is_not_believed_more_than_the_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    old = write(tmp_path / "old", samples(6), per_shard=3)
    scanned = list[str]()
    scan = tar_source.scan_shard
    monkeypatch.setattr(
        tar_source, "scan_shard", lambda path, **o: (scanned.append(path.name), scan(path, **o))[1]
    )
    build_shards([old], tmp_path / "whole", samples_per_shard=3)
    assert scanned == []
    assert open_shards(tmp_path / "whole").fingerprint == open_shards(old).fingerprint
    record = open_shards(old).records(1)[1]
    if damage == "idx":
        flip(old / "00001.idx", 100)
    elif damage == "tar":
        (old / "00001.tar").write_bytes((old / "00001.tar").read_bytes()[:-512])
    else:
        flip(old / "00001.tar", int(record[f"{damage}_offset"]) + 3)
    report = build_shards([old], tmp_path / "new", samples_per_shard=3, max_bad_fraction=0.5)
    assert scanned == (["00001.tar"] if damage in ("idx", "tar") else [])
    assert reasons(report) == ([(5, "hash")] if damage in ("image", "caption") else [])
    assert len(read_all(tmp_path / "new")) == 6 - len(report.bad)


def test_faults_of_tars_are_bad_rows(tmp_path: Path) -> None:
    write_tar(tmp_path / "old/a.tar", half_samples())
    cut = write_tar(tmp_path / "old/b.tar", sample_members(samples(3)))
    cut.write_bytes(cut.read_bytes()[: member_offsets(cut)["key-0002.json"][0] + 2])
    report = build_shards([tmp_path / "old"], tmp_path / "new", max_bad_fraction=0.9)
    assert [reason for _, reason in reasons(report)] == [
        *(reason for _, reason in HALF),
        "truncated",
        "truncated",
    ]
    assert report.bad[0]["detail"] == "a.tar: sample 'b-image': it has no '.txt'"
    assert "b.tar: the tar ends at byte" in report.bad[-1]["detail"]
    assert [raw.caption for raw in read_all(tmp_path / "new")][:2] == ["good", "jpg comes first"]


def test_captions_come_from_the_json_of_tars(tmp_path: Path) -> None:
    metas = [{"alt": "an alt", "title": "a title"}, {"title": "only a title"}, {"alt": " ", "n": 1}]
    members: list[tuple[str, bytes]] = []
    for number, meta in enumerate(metas):
        members += [(f"k{number}.png", picture(number)), (f"k{number}.json", json.dumps(meta).encode())]
    write_tar(tmp_path / "old/0.tar", members)
    one = build_shards(
        [tmp_path / "old"], tmp_path / "a", columns=Columns(caption="alt"), max_bad_fraction=0.9
    )
    assert reasons(one) == [(2, "caption"), (3, "caption")]
    assert read_all(tmp_path / "a")[0].meta == metas[0]
    two = build_shards(
        [tmp_path / "old"], tmp_path / "b", columns=Columns(caption=["alt", "title"]), max_bad_fraction=0.9
    )
    assert reasons(two) == [(3, "caption")]
    assert two.bad[0]["detail"] == "0.tar: sample 'k2': columns 'alt', 'title' hold no text"
    got = read_all(tmp_path / "b")
    assert [(raw.caption, raw.meta["captions"]) for raw in got] == [
        ("an alt", ["an alt", "a title"]), ("only a title", ["only a title"])
    ]  # fmt: skip
    # a folder that was indexed with a caption key is read with it
    index_folder(tmp_path / "old", caption_key="title")
    build_shards([tmp_path / "old"], tmp_path / "c", max_bad_fraction=0.9)
    assert [raw.caption for raw in read_all(tmp_path / "c")] == ["a title", "only a title"]


def test_img2datasets_output_is_sharded_anew_and_made_smaller(tmp_path: Path) -> None:
    folder = img2dataset(tmp_path / "old")
    report = build_shards([folder], tmp_path / "new", recode=Recode(image_size=5, format="webp"))
    assert (report.written, report.bad) == (12, [])
    shards = open_shards(tmp_path / "new")
    assert {raw.extension for raw in read_all(tmp_path / "new")} == {"webp"}
    assert {int(height) for height in shards.records(0)["height"]} == {5}
    assert verify_folder(tmp_path / "new", decode=True).findings == []


def test_keys_that_repeat_from_tar_to_tar_are_named_and_can_be_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_tar(tmp_path / f"old/{name}.tar", sample_members(samples(2)))
    with pytest.raises(UserError, match="2 of 4 rows are bad"):
        build_shards([tmp_path / "old"], tmp_path / "new", samples_per_shard=2)
    columns = Columns(prefix_keys=True)
    build_shards([tmp_path / "old"], tmp_path / "new", columns=columns, samples_per_shard=2)
    assert open_shards(tmp_path / "new").keys() == ["a/key-0000", "a/key-0001", "b/key-0000", "b/key-0001"]


def test_a_tar_that_changes_while_it_is_read_gives_no_wrong_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diptych.data import parts

    path = write_tar(tmp_path / "old/0.tar", sample_members(samples(3)))
    offset, size = member_offsets(path)["key-0001.jpg"]
    read, calls = parts._read, list[int]()

    def changing(*arguments: object) -> bytes:
        if not calls:
            flip(path, offset + size // 2)
        calls.append(1)
        return read(*arguments)

    monkeypatch.setattr(parts, "_read", changing)
    report = build_shards([tmp_path / "old"], tmp_path / "new", max_bad_fraction=0.9)
    assert reasons(report) == [(2, "hash")]
    assert [raw.key for raw in read_all(tmp_path / "new")] == ["key-0000", "key-0002"]


def test_several_caption_columns_of_a_table(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(picture())
    rows = [
        {"image": "x.png", "short": "short", "long": "a longer one", "other": 1},
        {"image": "x.png", "short": "", "long": "long alone", "other": 2},
        {"image": "x.png", "short": " ", "long": "", "other": 3},
    ]
    columns = Columns(caption=("short", "long"))
    report = build_shards(
        [table(tmp_path / "t.csv", rows)], tmp_path / "out", columns=columns, max_bad_fraction=0.9
    )
    assert report.bad[0]["detail"] == "columns 'short', 'long' hold no text"
    assert [(raw.caption, raw.meta) for raw in read_all(tmp_path / "out")] == [
        ("short", {"captions": ["short", "a longer one"], "image": "x.png", "other": "1"}),
        ("long alone", {"captions": ["long alone"], "image": "x.png", "other": "2"}),
    ]
    with pytest.raises(UserError, match="has no column 'none'"):
        build_shards([tmp_path / "t.csv"], tmp_path / "no", columns=Columns(caption=["short", "none"]))


@pytest.mark.parametrize(
    ("name", "words"), [("x.tar.gz", "unpack it to .tar"), ("x.zip", "cannot read '.zip' files")]
)
def test_other_archives_are_refused(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / name).write_bytes(b"\x1f\x8b")
    with pytest.raises(UserError, match=words):
        build_shards([tmp_path / name], tmp_path / "out")
    write_tar(tmp_path / "x.tar", sample_members(samples(1)))
    with pytest.raises(UserError, match="tars have no columns"):
        build_shards([tmp_path / "x.tar"], tmp_path / "out", columns=Columns(key="id"))
