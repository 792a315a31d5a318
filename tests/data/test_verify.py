"""Damage done on purpose, and whether all of it is named."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diptych.configs.errors import UserError
from diptych.data import scanning
from diptych.data.foreign import index_folder
from diptych.data.scanning import Limits
from diptych.data.shards import open_shards
from diptych.data.verify import VerifyReport, verify_folder

from .samples import flip, member_offsets, picture, sample_members, samples, write, write_tar
from .test_foreign import HALF, half_samples


def found(report: VerifyReport) -> list[tuple[str, str, str]]:
    return [(finding.shard, finding.key, finding.reason) for finding in report.findings]


def test_whole_shards_are_all_well(tmp_path: Path) -> None:
    write(tmp_path, samples(10))
    for decode in (False, True):
        report = verify_folder(tmp_path, decode=decode)
        assert (report.findings, report.notes, report.shards, report.samples) == ([], [], 3, 10)
    counts = {"shards": 3, "samples": 10, "copied_images": 0, "reasons": {}, "findings": [], "notes": []}
    assert report.to_json() == {"folder": str(tmp_path), "ok": True, **counts}


@pytest.mark.parametrize("member", ["png", "json", "txt"])
def test_a_flipped_bit_is_found_in_its_sample(tmp_path: Path, member: str) -> None:
    write(tmp_path, samples(8))
    offset, size = member_offsets(tmp_path / "00001.tar")[f"key-0006.{member}"]
    flip(tmp_path / "00001.tar", offset + size - 2, mask=16)
    report = verify_folder(tmp_path)
    assert ("00001.tar", "", "hash") in found(report)
    assert any(key == "key-0006" for _, key, _ in found(report))
    assert {shard for shard, _, _ in found(report)} == {"00001.tar"}
    assert {key for _, key, _ in found(report)} == {"", "key-0006"}


def test_a_flipped_bit_in_padding_is_found_in_its_shard(tmp_path: Path) -> None:
    write(tmp_path, samples(8))
    offset, size = member_offsets(tmp_path / "00001.tar")["key-0006.txt"]
    flip(tmp_path / "00001.tar", offset + size)
    assert found(verify_folder(tmp_path)) == [("00001.tar", "", "hash")]


def test_a_flipped_bit_in_a_header_loses_samples_and_each_is_named(tmp_path: Path) -> None:
    write(tmp_path, samples(8))
    flip(tmp_path / "00001.tar", member_offsets(tmp_path / "00001.tar")["key-0006.json"][0] - 500)
    assert found(verify_folder(tmp_path)) == [
        ("00001.tar", "", "damaged"),
        ("00001.tar", "key-0005", "truncated"),
        ("00001.tar", "", "hash"),
        ("00001.tar", "key-0006", "missing"),
        ("00001.tar", "key-0007", "missing"),
    ]


@pytest.mark.parametrize("where", ["border", "header", "body"])
def test_a_cut_shard_is_found(tmp_path: Path, where: str) -> None:
    write(tmp_path, samples(8))
    offset, size = member_offsets(tmp_path / "00001.tar")["key-0007.jpg"]
    os.truncate(tmp_path / "00001.tar", offset + {"border": -512, "header": -300, "body": size // 2}[where])
    assert found(verify_folder(tmp_path)) == [
        ("00001.tar", "", "truncated"),
        ("00001.tar", "key-0006", "truncated"),
        ("00001.tar", "", "hash"),
        ("00001.tar", "key-0007", "missing"),
    ]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda f: (f / "00001.tar").unlink(), [("00001.tar", "", "missing")]),
        (lambda f: (f / "00001.idx").unlink(), [("00001.tar", "", "index")]),
        (lambda f: flip(f / "00001.idx", 200), [("00001.tar", "", "index")]),
        (lambda f: os.truncate(f / "00001.idx", 99), [("00001.tar", "", "index")]),
        (lambda f: (f / "x.tar").write_bytes((f / "00001.tar").read_bytes()), [("x.tar", "", "unlisted")]),
    ],
)
def test_a_set_that_is_not_whole_is_named_file_by_file(
    tmp_path: Path, damage: Callable[[Path], object], expected: list[tuple[str, str, str]]
) -> None:
    write(tmp_path, samples(8))
    damage(tmp_path)
    got = [entry for entry in found(verify_folder(tmp_path)) if entry[2] != "duplicate"]
    assert got == expected


def test_an_image_that_was_bad_from_the_start_is_found_by_decoding_alone(tmp_path: Path) -> None:
    cut = picture(size=(60, 60))[:-600]
    write(tmp_path, [*samples(3), ("bad", cut, "png", "cut in its pixels", {})])
    assert verify_folder(tmp_path).findings == []
    report = verify_folder(tmp_path, decode=True)
    assert found(report) == [("00000.tar", "bad", "decode")]
    assert verify_folder(tmp_path, decode=True, workers=2).findings == report.findings


def test_too_many_pixels_are_found(tmp_path: Path) -> None:
    write(tmp_path, samples(3))
    assert {reason for _, _, reason in found(verify_folder(tmp_path, limits=Limits(62)))} == {"size"}
    assert verify_folder(tmp_path, limits=Limits(63)).findings == []


def test_foreign_tars_are_verified_before_and_after_indexing(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", half_samples())
    expected = [("a.tar", key, reason) for key, reason in HALF]
    report = verify_folder(tmp_path)
    assert found(report) == expected
    assert "no manifest.jsonl" in report.notes[0]
    index_folder(tmp_path)
    report = verify_folder(tmp_path)
    assert (found(report), report.samples) == (expected, 2)
    assert report.reasons == {"caption": 3, "json": 3, "duplicate": 3, "missing": 1, "decode": 1}


def test_keys_across_shards_are_a_fault_of_built_sets_and_a_note_on_foreign_ones(tmp_path: Path) -> None:
    for name in ("0", "1"):
        write_tar(tmp_path / "foreign" / f"{name}.tar", sample_members(samples(2)))
    index_folder(tmp_path / "foreign")
    report = verify_folder(tmp_path / "foreign")
    assert report.findings == []
    assert report.notes[0] == "2 keys stand in several places; a sample is known by its shard and its key"

    built = write(tmp_path / "built", samples(4), per_shard=2)
    write(tmp_path / "more", samples(2), per_shard=2)
    for ending in ("tar", "idx"):
        os.replace(tmp_path / f"more/00000.{ending}", built / f"00002.{ending}")
    row = json.loads((tmp_path / "more/manifest.jsonl").read_text()) | {"shard": "00002.tar"}
    with (built / "manifest.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    assert len(open_shards(built)) == 6
    assert found(verify_folder(built)) == [
        ("00002.tar", "key-0000", "duplicate"),
        ("00002.tar", "key-0001", "duplicate"),
    ]


def test_copies_of_an_image_are_a_note_and_faults_on_demand(tmp_path: Path) -> None:
    content = samples(9)
    copies = [(f"copy-{i}", content[i][1], content[i][2], "the same picture", {}) for i in (2, 7, 2)]
    copies[2] = ("again", *copies[2][1:])
    write(tmp_path, [*content, *copies])
    report = verify_folder(tmp_path)
    assert report.findings == []
    assert report.notes == [
        "3 images are copies; --duplicates names them all: "
        "sample 'copy-2' of 00002.tar has the image of sample 'key-0002' of 00000.tar, "
        "sample 'copy-7' of 00002.tar has the image of sample 'key-0007' of 00001.tar"
    ]
    assert report.to_json()["copied_images"] == 3
    report = verify_folder(tmp_path, duplicates=True, workers=2)
    assert sorted(found(report)) == [
        ("00002.tar", key, "duplicate-image") for key in ("again", "copy-2", "copy-7")
    ]
    assert report.findings[0].detail == "its image is that of sample 'key-0002' of 00000.tar"
    assert (report.notes, report.reasons) == ([], {"duplicate-image": 3})


def test_large_files_and_blank_captions_are_found(tmp_path: Path) -> None:
    large = picture(size=(60, 60))
    write_tar(
        tmp_path / "0.tar", [("a.png", large), ("a.txt", b"a"), ("b.png", picture()), ("b.txt", b"\t ")]
    )
    report = verify_folder(tmp_path, limits=Limits(max_image_bytes=len(large) - 1))
    assert found(report) == [("0.tar", "a", "size"), ("0.tar", "b", "caption")]
    assert report.findings[0].detail == f"its image has {len(large)} bytes"
    assert found(verify_folder(tmp_path, limits=Limits(max_image_bytes=len(large)))) == [
        ("0.tar", "b", "caption")
    ]


def test_a_verification_that_was_killed_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write(tmp_path / "set", [*samples(20), ("copy", samples(1)[0][1], "png", "x", {})])
    flip(folder / "00001.tar", member_offsets(folder / "00001.tar")["key-0006.txt"][0])
    expected = verify_folder(folder, duplicates=True)
    seen: list[str] = []
    scan = scanning.scan_shard

    def failing(path: Path, **options: Any) -> Any:
        seen.append(path.name)
        if path.name == "00003.tar":
            raise KeyboardInterrupt
        return scan(path, **options)

    monkeypatch.setattr(scanning, "scan_shard", failing)
    with pytest.raises(KeyboardInterrupt):
        verify_folder(folder, duplicates=True)
    monkeypatch.setattr(
        scanning, "scan_shard", lambda path, **o: (seen.append(path.name), scan(path, **o))[1]
    )
    with (
        (tmp_path / "cache/verify")
        .joinpath(os.listdir(tmp_path / "cache/verify")[0], "scans.jsonl")
        .open("a") as log
    ):
        log.write('{"shard": "00004.t')  # the kill came here
    seen.clear()
    report = verify_folder(folder, duplicates=True)
    assert seen == ["00003.tar", "00004.tar", "00005.tar"]
    assert (report.findings, report.samples) == (expected.findings, expected.samples)
    assert report.notes == ["3 of 6 shards were read by a run that was stopped"]
    seen.clear()  # and once it has ended, everything is read again
    verify_folder(folder, decode=True)
    assert len(seen) == 6
    assert os.listdir(tmp_path / "cache/verify") == []


def test_a_folder_without_shards_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no shards"):
        verify_folder(tmp_path)
    with pytest.raises(UserError, match="there is no folder"):
        verify_folder(tmp_path / "no")
