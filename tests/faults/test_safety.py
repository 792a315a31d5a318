"""Tars made to do harm: what they claim is not believed, what they hold is not run, and nothing leaves its
folder."""

import gzip
import io
import json
import pickle
import resource
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from diptych.configs.errors import UserError
from diptych.data.build import build_shards
from diptych.data.foreign import index_folder
from diptych.data.index import map_index
from diptych.data.scan import scan_shard
from diptych.data.shards import open_shards
from diptych.data.verify import verify_folder

from ..data.samples import flip, member_offsets, picture, sample_members, samples, write, write_tar

GOOD = sample_members(samples(2))


def findings(folder: Path) -> list[tuple[str, str]]:
    return [(finding.key, finding.reason) for finding in verify_folder(folder).findings]


def with_header(name: str, size: int, kind: int = tarfile.GNU_FORMAT, **fields: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(kind)


@pytest.mark.parametrize("size", [2**32, 2**40, 2**62, 2**70])
@pytest.mark.parametrize("name", ["k.png", "k.txt", "k.json", "k.bin"])
def test_huge_claimed_sizes_cost_nothing(tmp_path: Path, size: int, name: str) -> None:
    data = write_tar(tmp_path / "0.tar", GOOD).read_bytes().rstrip(b"\0")
    data += bytes(-len(data) % 512) + with_header(name, size)
    (tmp_path / "0.tar").write_bytes(data + b"little")
    tracemalloc.start()
    found = findings(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found[0] == ("", "truncated")
    assert peak < 20 * 2**20
    assert len(index_folder(tmp_path).findings) == 2
    assert open_shards(tmp_path).keys() == ["key-0000"]


def test_a_size_of_thousands_of_digits_in_a_pax_header_is_no_number(tmp_path: Path) -> None:
    info = tarfile.TarInfo("k.png")
    info.size, info.pax_headers = 3, {"size": "9" * 5000}
    header = info.tobuf(tarfile.PAX_FORMAT)
    (tmp_path / "0.tar").write_bytes(header + b"abc" + bytes(509 + 1024))
    assert [reason for _, reason in findings(tmp_path)] in (
        ["decode"],
        ["missing"],
        ["truncated"],
        ["damaged"],
    )


@pytest.mark.parametrize("how", ["type", "pax 0.1", "pax 1.0"])
def test_sparse_members_are_not_taken_for_what_they_are_not(tmp_path: Path, how: str) -> None:
    data = b"".join(
        [
            with_header("k.txt", 512, type=b"S")
            if how == "type"
            else with_header(
                "k.txt",
                512,
                tarfile.PAX_FORMAT,
                pax_headers={"GNU.sparse.map": "0,3"} if how == "pax 0.1" else {"GNU.sparse.major": "1"},
            ),
            b"1\n0\n3\n".ljust(512, b"\0"),
            bytes(1024),
        ]
    )
    (tmp_path / "0.tar").write_bytes(data)
    report = verify_folder(tmp_path)
    assert [finding.reason for finding in report.findings] == ["damaged"]
    assert "has a sparse member" in report.findings[0].detail


def test_members_that_are_links_or_lead_out_of_the_folder_touch_nothing(tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("a secret")
    path = tmp_path / "set/0.tar"
    path.parent.mkdir()
    with tarfile.open(path, "w") as tar:
        for name, kind in (("a.txt", tarfile.SYMTYPE), ("b.txt", tarfile.LNKTYPE)):
            image = tarfile.TarInfo(name.replace("txt", "png"))
            image.size = len(picture())
            tar.addfile(image, io.BytesIO(picture()))
            link = tarfile.TarInfo(name)
            link.type, link.linkname = kind, "../secret.txt"
            tar.addfile(link)
        for name in ("../../out.png", "../../out.txt", "/etc/out.png", "/etc/out.txt"):
            data = picture() if name.endswith("png") else b"a caption"
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    report = index_folder(path.parent)
    assert [finding.reason for finding in report.findings[:2]] == ["caption", "caption"]
    assert "a secret" not in (path.parent / "index_report.json").read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret.txt", "set"]
    write_tar(
        path,
        [("../../../x.png", picture()), ("../../../x.txt", b"up"), ("/y.png", picture()), ("/y.txt", b"y")],
    )
    built = build_shards([path], tmp_path / "built")
    assert built.written == 2
    keys = open_shards(tmp_path / "built").keys()
    assert not any(key.startswith(("/", ".")) for key in keys)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["built", "secret.txt", "set"]


def test_compressed_tars_are_never_unpacked(tmp_path: Path) -> None:
    bomb = gzip.compress(bytes(200 * 2**20))
    assert len(bomb) < 2**20
    (tmp_path / "0.tar").write_bytes(bomb)
    tracemalloc.start()
    report = verify_folder(tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10 * 2**20
    assert [str(finding) for finding in report.findings] == [
        "0.tar: damaged: the tar is compressed; unpack it"
    ]
    (tmp_path / "0.tar").rename(tmp_path / "0.tar.gz")
    with pytest.raises(UserError, match=r"0\.tar\.gz is compressed .* unpack it"):
        index_folder(tmp_path)


class Harmful:
    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path("harmed"),)


def test_members_that_others_unpickle_are_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    payload = pickle.dumps(Harmful())
    endings = ("pyd", "pkl", "pickle", "pth", "npy", "ten")
    members = [*GOOD[:3], *((f"key-0000.{ending}", payload) for ending in endings)]
    write_tar(tmp_path / "set/0.tar", members)
    assert index_folder(tmp_path / "set").findings == []
    assert open_shards(tmp_path / "set").read(0).caption == samples(1)[0][3]
    assert verify_folder(tmp_path / "set", decode=True).findings == []
    build_shards([tmp_path / "set"], tmp_path / "built")
    assert not (tmp_path / "harmed").exists()


@pytest.mark.parametrize("extension", ["png", "jpg"])
def test_images_that_claim_to_be_huge_are_found_without_decoding(tmp_path: Path, extension: str) -> None:
    image = bytearray(picture(extension=extension))
    if extension == "png":
        image[16:24] = (50_000).to_bytes(4, "big") * 2
    else:
        at = image.index(b"\xff\xc0") + 5
        image[at : at + 4] = (60_000).to_bytes(2, "big") * 2
    write_tar(tmp_path / "set/0.tar", [(f"a.{extension}", bytes(image)), ("a.txt", b"a"), *GOOD])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    report = verify_folder(tmp_path / "set", decode=True)
    assert [(f.key, f.reason) for f in report.findings] == [("a", "size")]
    built = build_shards([tmp_path / "set"], tmp_path / "built", max_bad_fraction=0.5)
    assert [bad["reason"] for bad in built.bad] == ["size"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # KiB


def test_names_of_any_length_and_letters_leave_the_index_right(tmp_path: Path) -> None:
    long, latin = "n" * 70_000, b"caf\xe9".decode("utf-8", "surrogateescape")
    members = [*GOOD[:3], (f"{long}.png", picture()), (f"{long}.txt", b"long"), *GOOD[3:]]
    members += [(f"{latin}.png", picture(7)), (f"{latin}.txt", b"not UTF-8")]
    write_tar(tmp_path / "0.tar", members, tarfile.GNU_FORMAT)
    report = index_folder(tmp_path)
    assert [(f.key[:5], f.reason, f.detail) for f in report.findings] == [
        ("nnnnn", "size", "its name has 70000 characters")
    ]
    shards = open_shards(tmp_path)
    assert shards.keys() == ["key-0000", "key-0001", latin]
    assert shards.read(2).caption == "not UTF-8"
    assert map_index(tmp_path / "0.idx").keys() == scan_shard(tmp_path / "0.tar").keys
    json.loads((tmp_path / "index_report.json").read_text())


def test_json_that_is_too_deep_or_too_long_a_number_spoils_its_sample_alone(tmp_path: Path) -> None:
    members = list(GOOD)
    for key, text in (
        ("deep", b"[" * 100_000),
        ("digits", b'{"n": ' + b"9" * 10_000 + b"}"),
        ("nan", b'{"x": NaN}'),
    ):
        members += [(f"{key}.png", picture()), (f"{key}.json", text), (f"{key}.txt", b"text")]
    write_tar(tmp_path / "old/0.tar", members)
    report = index_folder(tmp_path / "old")
    assert [(f.key, f.reason) for f in report.findings] == [("deep", "json"), ("digits", "json")]
    built = build_shards([tmp_path / "old"], tmp_path / "new", max_bad_fraction=0.5)
    assert [bad["reason"] for bad in built.bad] == ["json", "json"]
    assert open_shards(tmp_path / "new").keys() == ["key-0000", "key-0001", "nan"]


def test_no_path_in_a_manifest_leads_out_of_its_folder(tmp_path: Path) -> None:
    write(tmp_path / "other", samples(2))
    folder = write(tmp_path / "set", samples(2))
    text = (folder / "manifest.jsonl").read_text()
    for name in ("../other/00000.tar", "/etc/passwd", "a/b.tar", "..\\\\x.tar", "x\\u0000.tar", "x"):
        (folder / "manifest.jsonl").write_text(text.replace("00000.tar", name))
        with pytest.raises(UserError, match=r"manifest\.jsonl: line 1"):
            open_shards(folder)


def test_a_flipped_bit_is_no_harm_to_the_next_sample(tmp_path: Path) -> None:
    folder = write(tmp_path, samples(4))
    flip(folder / "00000.tar", member_offsets(folder / "00000.tar")["key-0001.json"][0] - 512 + 124 + 10)
    report = verify_folder(folder)
    assert {finding.shard for finding in report.findings} == {"00000.tar"}
    assert open_shards(folder).read(3).key == "key-0003"
