"""Tars that others wrote: webdataset, img2dataset, GNU and PAX headers, cuts, half samples."""

import json
import tarfile
from functools import partial, partialmethod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from diptych.configs.errors import UserError
from diptych.data import scanning
from diptych.data.foreign import IndexReport, index_folder
from diptych.data.index import OK
from diptych.data.scanning import Limits
from diptych.data.shards import open_shards
from diptych.data.writer import ShardWriter

from .samples import (
    WEBDATASET,
    by_webdataset,
    flip,
    member_offsets,
    picture,
    sample_members,
    samples,
    write,
    write_tar,
)


def captions(folder: Path) -> list[str]:
    shards = open_shards(folder)
    return [shards.read(sample_id).caption for sample_id in range(len(shards))]


def problems(report: IndexReport) -> list[tuple[str, str, str]]:
    return [(finding.shard, finding.key, finding.reason) for finding in report.findings]


@WEBDATASET
def test_shards_of_webdatasets_writer_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    for shard in range(2):
        with webdataset.TarWriter(str(tmp_path / f"cc3m-{shard:04d}.tar")) as tar:
            for i in range(4):  # keys repeat across shards
                extension = ("jpg", "jpeg", "png", "webp")[i]
                image = picture(10 * shard + i, "jpg" if extension == "jpeg" else extension)
                meta = {"url": f"https://x/{i}", "width": 9}
                tar.write(
                    {"__key__": f"{i:03d}", extension: image, "txt": f"caption {shard} {i}", "json": meta}
                )
    report = index_folder(tmp_path)
    assert (report.findings, report.reasons) == ([], {})
    shards = open_shards(tmp_path)
    expected = by_webdataset([str(path) for path in sorted(tmp_path.glob("*.tar"))])
    assert len(shards) == len(expected) == 8
    for sample_id, sample in enumerate(expected):
        raw = shards.read(sample_id)
        image = next(sample[e] for e in ("jpg", "jpeg", "png", "webp") if e in sample)
        assert (raw.key, raw.image) == (sample["__key__"], image)
        assert (raw.caption, raw.meta) == (sample["txt"].decode(), json.loads(sample["json"]))
    assert all(row.foreign for row in shards.rows)
    with pytest.raises(KeyError, match="2 samples of that key"):
        shards.find("001")


def test_captions_can_come_from_a_key_of_the_json(tmp_path: Path) -> None:
    members: list[tuple[str, bytes]] = []
    for i, caption in enumerate(["a dog", "a cat", None, " "]):
        members.append((f"{i:09d}.jpg", picture(i, "jpg")))
        meta = {"caption": caption, "alt": "other words", "similarity": float("nan"), "n": i}
        members.append((f"{i:09d}.json", json.dumps(meta).encode()))
    write_tar(tmp_path / "00000.tar", members)
    with pytest.raises(
        UserError, match="the JSON has text under alt, caption: choose with --caption-key"
    ) as error:
        index_folder(tmp_path)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["00000.tar"]
    report = index_folder(tmp_path, caption_key="caption")
    assert problems(report) == [
        ("00000.tar", "000000002", "caption"),
        ("00000.tar", "000000003", "caption"),
    ]
    assert captions(tmp_path) == ["a dog", "a cat"]
    assert open_shards(tmp_path).rows[0].caption_key == "caption"
    with pytest.raises(UserError, match="no sample has a caption in 'text' of the JSON"):
        index_folder(tmp_path, caption_key="text", overwrite=True)
    assert captions(tmp_path) == ["a dog", "a cat"]  # a failed attempt leaves the old index


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_nested_names_are_read_in_every_format(tmp_path: Path, kind: int) -> None:
    key = "folder.v1/" + "n" * (85 if kind == tarfile.USTAR_FORMAT else 150) + "-\N{CAT FACE}"
    write_tar(tmp_path / "a.tar", [(f"{key}.PNG", picture()), (f"{key}.txt", b"a cat")], kind)
    assert index_folder(tmp_path).findings == []
    assert open_shards(tmp_path).key_of(0) == key
    assert captions(tmp_path) == ["a cat"]


def test_members_that_are_no_samples_are_passed_over(tmp_path: Path) -> None:
    members = [("__info__", b"{"), ("README", b"hello"), ("0.png", picture()), ("0.cls", b"3"),
               ("0.seg.png", b"a mask"), ("0.txt", b"zero"), ("__x__/1.png", picture())]  # fmt: skip
    write_tar(tmp_path / "a.tar", members)
    assert index_folder(tmp_path).findings == []
    assert captions(tmp_path) == ["zero"]


def half_samples() -> list[tuple[str, bytes]]:
    good = picture()
    return [
        ("a-good.png", good), ("a-good.txt", b"good"),
        ("b-image.png", good),
        ("c-text.txt", b"no image"),
        ("d-blank.png", good), ("d-blank.txt", b" \n"),
        ("e-latin.png", good), ("e-latin.txt", b"caf\xe9"),
        ("f-broken.png", b"no image at all"), ("f-broken.txt", b"broken"),
        ("g-json.png", good), ("g-json.txt", b"json"), ("g-json.json", b"{"),
        ("h-list.png", good), ("h-list.txt", b"list"), ("h-list.json", b"[1]"),
        ("i-twice.png", good), ("i-twice.txt", b"one"), ("i-twice.txt", b"two"),
        ("b-image.txt", b"not beside its image"),
        ("a-good.png", picture(1)), ("a-good.txt", b"a second sample of the key"),
        ("j-both.png", picture(2)), ("j-both.jpg", picture(3, "jpg")), ("j-both.txt", b"jpg comes first"),
        ("k-deep.png", good), ("k-deep.txt", b"deep"), ("k-deep.json", b"[" * 200_000),
    ]  # fmt: skip


HALF = [
    ("b-image", "caption"), ("c-text", "missing"), ("d-blank", "caption"), ("e-latin", "caption"),
    ("f-broken", "decode"), ("g-json", "json"), ("h-list", "json"), ("i-twice", "duplicate"),
    ("b-image", "duplicate"), ("a-good", "duplicate"), ("k-deep", "json"),
]  # fmt: skip


def test_half_and_spoilt_samples_are_named_and_left_out(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", half_samples())
    report = index_folder(tmp_path)
    assert problems(report) == [("a.tar", key, reason) for key, reason in HALF]
    assert captions(tmp_path) == ["good", "jpg comes first"]
    shards = open_shards(tmp_path)
    assert shards.keys() == ["a-good", "j-both"]
    assert shards.read(1).extension == "jpg"
    assert (shards.rows[0].num_ok, shards.rows[0].num_bad) == (2, len(HALF))
    assert np.count_nonzero(shards.records(0)["flags"] & OK) == 2
    assert shards.locate(1) == (0, 11)
    assert shards.find("j-both") == 1
    assert json.loads((tmp_path / "sizes.json").read_text()) == {"a.tar": 2}
    written = json.loads((tmp_path / "index_report.json").read_text())
    assert (written["samples"], written["bad"], len(written["findings"])) == (2, len(HALF), len(HALF))


@pytest.mark.parametrize("where", ["border", "sample border", "header", "image", "text"])
def test_a_cut_tar_keeps_what_is_whole_and_names_the_cut(tmp_path: Path, where: str) -> None:
    content = samples(5)
    path = write_tar(tmp_path / "00001.tar", sample_members(content))
    write_tar(tmp_path / "00002.tar", sample_members(content))
    places = member_offsets(path)
    (first, _), (image, size), (text, _) = (places[f"key-0003.{e}"] for e in ("json", "png", "txt"))
    cut = {
        "border": text - 512,
        "sample border": first - 512,
        "header": text - 100,
        "image": image + size // 2,
        "text": text + 3,
    }[where]
    data = path.read_bytes()
    path.write_bytes(data[:cut])
    report = index_folder(tmp_path)
    # at the border between two samples nothing says whether the last one is whole
    last = "key-0002" if where == "sample border" else "key-0003"
    assert problems(report) == [("00001.tar", "", "truncated"), ("00001.tar", last, "truncated")]
    whole = int(last[-1])
    assert captions(tmp_path) == [s[3] for s in content[:whole]] + [s[3] for s in content]
    shards = open_shards(tmp_path)
    for sample_id, sample in enumerate([*content[:whole], *content]):
        assert shards.read(sample_id).image == sample[1]


def test_a_damaged_header_ends_a_shard_and_is_named(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00001.tar", sample_members(samples(5)))
    flip(path, member_offsets(path)["key-0003.json"][0] - 510)
    report = index_folder(tmp_path)
    assert problems(report) == [("00001.tar", "", "damaged"), ("00001.tar", "key-0002", "truncated")]
    assert len(open_shards(tmp_path)) == 2


def test_members_behind_the_end_are_named_and_what_is_before_is_kept(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "00001.tar", sample_members(samples(2)))
    path.write_bytes(path.read_bytes() * 2)
    report = index_folder(tmp_path)
    assert problems(report) == [("00001.tar", "", "trailing")]
    assert len(open_shards(tmp_path)) == 2


def test_large_images_are_left_out(tmp_path: Path) -> None:
    members = [("a.png", picture(size=(40, 30))), ("a.txt", b"a"), ("b.png", picture()), ("b.txt", b"b")]
    write_tar(tmp_path / "0.tar", members)
    assert problems(index_folder(tmp_path, limits=Limits(1199))) == [("0.tar", "a", "size")]


def test_members_far_apart_and_large_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    members = [("0.png", picture()), ("0.npy", bytes(50_000)), ("0.txt", b"far"), ("0.json", b'{"n": 1}'),
               ("1.txt", b"c" * 200), ("1.png", picture(1))]  # fmt: skip
    write_tar(tmp_path / "0.tar", members)
    assert index_folder(tmp_path).findings == []
    raw = open_shards(tmp_path).read(0)
    assert (raw.image, raw.caption, raw.meta) == (picture(), "far", {"n": 1})
    monkeypatch.setattr("diptych.data.scan.MAX_TEXT_BYTES", 100)
    assert problems(index_folder(tmp_path, overwrite=True)) == [("0.tar", "1", "size")]


def test_an_empty_tar_beside_others_does_no_harm(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", [])
    write_tar(tmp_path / "1.tar", sample_members(samples(2)))
    assert index_folder(tmp_path).findings == []
    assert open_shards(tmp_path).shard_sizes.tolist() == [0, 2]
    assert open_shards(tmp_path).read(0).shard == "1.tar"


def test_indexing_a_built_folder_again_gives_the_same_files(tmp_path: Path) -> None:
    write(tmp_path, samples(10))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    fingerprint = open_shards(tmp_path).fingerprint
    index_folder(tmp_path, overwrite=True)
    (tmp_path / "index_report.json").unlink()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    # and where manifest and indexes are lost, the data set is still the same one
    for path in [*tmp_path.glob("*.idx"), tmp_path / "manifest.jsonl"]:
        path.unlink()
    index_folder(tmp_path)
    assert open_shards(tmp_path).fingerprint == fingerprint


def test_several_processes_give_the_same_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        for shard in range(3):
            write_tar(tmp_path / name / f"{shard}.tar", half_samples()[shard:])
    one, two = index_folder(tmp_path / "a"), index_folder(tmp_path / "b", workers=2)
    assert (one.rows, one.findings) == (two.rows, two.findings)


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample_members(samples(2)))
    (tmp_path / "0.idx").write_text("v1.2 1\n")  # DALI's
    with pytest.raises(UserError, match="index of another program"):
        index_folder(tmp_path)
    index_folder(tmp_path, overwrite=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert index_folder(tmp_path).kept == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(UserError, match=r"indexed with captions from '\.txt'; give --overwrite"):
        index_folder(tmp_path, caption_key="caption")
    with pytest.raises(UserError, match="only indexed"), ShardWriter(tmp_path, overwrite=True) as writer:
        writer.write(*samples(1)[0])
    assert captions(tmp_path) == [sample[3] for sample in samples(2)]


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "holds no .tar files"),
        ({"0.tar.gz": b"x"}, "0.tar.gz is compressed"),
        ({"0.tar": b""}, "no usable sample"),
        ({"0.tar": b"not a tar at all" * 100}, "no usable sample"),
    ],
)
def test_nothing_to_index_is_one_sentence(tmp_path: Path, files: dict[str, bytes], words: str) -> None:
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as error:
        index_folder(tmp_path)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    with pytest.raises(UserError, match="there is no folder"):
        index_folder(tmp_path / "no")


def read_by(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tars that are scanned from now on."""
    seen: list[str] = []
    scan = scanning.scan_shard

    def told(path: Path, **options: Any) -> Any:
        seen.append(path.name)
        return scan(path, **options)

    monkeypatch.setattr(scanning, "scan_shard", told)
    return seen


def test_tars_that_came_since_are_added_and_the_others_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("1", "3"):
        write_tar(tmp_path / f"{name}.tar", half_samples())
    first = index_folder(tmp_path)
    seen = read_by(monkeypatch)
    for name in ("0", "2"):
        write_tar(tmp_path / f"{name}.tar", sample_members(samples(3)))
    report = index_folder(tmp_path)
    assert (seen, report.kept) == (["0.tar", "2.tar"], 2)
    assert report.findings == first.findings
    assert json.loads((tmp_path / "index_report.json").read_text())["bad"] == 2 * len(HALF)
    fingerprint = open_shards(tmp_path).fingerprint
    index_folder(tmp_path, overwrite=True)
    assert (seen[2:], open_shards(tmp_path).fingerprint) == (
        ["0.tar", "1.tar", "2.tar", "3.tar"],
        fingerprint,
    )


def test_a_tar_that_was_touched_is_read_again_and_one_that_changed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("0", "1"):
        write_tar(tmp_path / f"{name}.tar", sample_members(samples(3)))
    index_folder(tmp_path)
    seen = read_by(monkeypatch)
    (tmp_path / "1.tar").touch()
    assert (index_folder(tmp_path).kept, seen) == (1, ["1.tar"])
    (tmp_path / "0.idx").unlink()
    assert (index_folder(tmp_path).kept, seen) == (1, ["1.tar", "0.tar"])
    data = (tmp_path / "1.tar").read_bytes()
    flip(tmp_path / "1.tar", 600)
    manifest = (tmp_path / "manifest.jsonl").read_bytes()
    with pytest.raises(UserError, match=r"1\.tar has other bytes than when it was indexed"):
        index_folder(tmp_path)
    (tmp_path / "1.tar").write_bytes(data[:-512])
    with pytest.raises(UserError, match=r"1\.tar has \d+ bytes, \d+ when it was indexed; copy it again"):
        index_folder(tmp_path)
    (tmp_path / "1.tar").unlink()
    with pytest.raises(UserError, match=r"names 1\.tar, which is missing"):
        index_folder(tmp_path)
    assert (tmp_path / "manifest.jsonl").read_bytes() == manifest
    assert len(index_folder(tmp_path, overwrite=True).rows) == 1


@pytest.mark.parametrize("when", ["scanning", "moving"])
def test_a_kill_while_indexing_leaves_no_manifest_and_the_rest_is_done_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    for name in ("0", "1", "2"):
        write_tar(tmp_path / f"{name}.tar", half_samples())
    if when == "moving":
        index_folder(tmp_path)
    replace: Any = Path.replace
    scan: Any = scanning.scan_shard

    def failing(real: Any, self: Path, *target: Path, **options: Any) -> Any:
        if self.name in ("1.idx" if when == "moving" else "1.tar"):
            raise KeyboardInterrupt
        return real(self, *target, **options)

    monkeypatch.setattr(Path, "replace", partialmethod(lambda self, target: failing(replace, self, target)))
    monkeypatch.setattr(scanning, "scan_shard", partial(failing, scan))
    with pytest.raises(KeyboardInterrupt):
        index_folder(tmp_path, overwrite=True)
    monkeypatch.undo()
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match="has tars but no"):
        open_shards(tmp_path)
    seen = read_by(monkeypatch)
    report = index_folder(tmp_path)
    assert seen == (["0.tar"] if when == "moving" else ["1.tar", "2.tar"])
    assert problems(report) == [(f"{n}.tar", key, reason) for n in range(3) for key, reason in HALF]
    assert not list(tmp_path.glob(".*"))


def test_two_processes_do_not_index_one_folder(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", sample_members(samples(2)))
    log = scanning.ScanLog(tmp_path / ".indexing", {})
    assert log.lock()
    with pytest.raises(UserError, match="another process indexes"):
        index_folder(tmp_path)
    log.clear()
    index_folder(tmp_path)
