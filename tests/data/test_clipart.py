"""Fetching the clip art: what a hand-made package becomes, and archives that are not what they say."""

import io
import json
import lzma
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.data.corpora import clipart, debian
from diptych.data.corpora.clipart import fetch_clipart
from diptych.data.shards import open_shards

from .debian_package import ROOT, ar, data_tar, deb
from .icon_packages import drawing

WORK = """<metadata><rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work rdf:about=""><dc:title>{title}</dc:title>
 <dc:subject><rdf:Bag><rdf:li>a keyword</rdf:li></rdf:Bag></dc:subject>
 <dc:publisher><cc:Agent><dc:title>The Library</dc:title></cc:Agent></dc:publisher>
 <dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator>
 <cc:license rdf:resource="http://web.resource.org/cc/{licence}"/></cc:Work></rdf:RDF></metadata>"""


def svg(
    title: str, author: str, body: str, *, licence: str = "PublicDomain", head: str = "", box: str = "100 100"
) -> bytes:
    said = WORK.format(title=title, author=author, licence=licence)
    root = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f'{head}<svg {root} viewBox="0 0 {box}">{said}{body}</svg>'.encode()


def library() -> tuple[dict[str, bytes], dict[str, str], set[str]]:
    """The files and links of a package, and the keys that the corpus should have."""
    files: dict[str, bytes] = {}
    kept: set[str] = set()

    def add(key: str, data: bytes, *, keep: bool = False) -> None:
        files[f"{ROOT}{key}.svg"] = data
        if keep:
            kept.add(key.replace(".", "_"))

    for i in range(25):
        add(f"animals/beast_{i:02d}", svg(f"beast {i}", f"A{i % 4}", drawing(f"beast {i}")), keep=True)
        add(f"food/dish_{i}_a.b._0", svg(f"dish_{i}", "Ann (a@b.c)", drawing(f"dish {i}")), keep=True)
        add(f"food/fruit/fruit_{i}", svg(f"fruit {i}", "Ben", drawing(f"fruit {i}"), box="50 100"), keep=True)
    add("animals/lizard", svg("L&amp;Atilde;&amp;copy;zard vert", "A1", drawing("lizard")), keep=True)
    add("animals/by", svg("Clipart by A1 - green_frog", "A1", drawing("frog")), keep=True)
    for i in range(7):
        add(f"food/theme_{i}", svg("Lemon SVG theme", "Cid", drawing(f"theme {i}")))
    add("food/blank", svg("nothing", "Ben", ""))
    add("food/later", svg("fruit again", "Ben", drawing("dish 0")))  # dish_0 comes first by name
    add("animals/two", svg("chicken", "A1", drawing("chicken")))
    add("food/two", svg("roast chicken", "Ben", drawing("chicken")))
    add("animals/same", svg("Beast 0!", "Someone else", drawing("other beast")))
    add("food/own", svg("own work", "Cid", drawing("own"), licence="by-nc"))
    add("food/untitled", svg("", "Cid", drawing("untitled")))
    add("food/anonymous", svg("cake", "", drawing("cake")))
    add("food/vain", svg("Cid", "Cid", drawing("vain")))
    add("food/broken", b"<svg")
    add("food/disk", svg("my disk", "Cid", '<image x="0" xlink:href="/etc/hostname" width="9" height="9"/>'))
    bomb = '<!DOCTYPE svg [<!ENTITY a "ha"><!ENTITY b "&a;&a;">]>'
    add("food/bomb", svg("laughs", "Cid", drawing("laughs") + "&b;", head=bomb))
    names = '<!DOCTYPE svg [<!ENTITY ns "http://ns.adobe.com/">]>'
    add("food/adobe", svg("pear", "Ben", drawing("pear") + '<g x="&ns;"/>', head=names), keep=True)
    add("special/cd", svg("compact disc", "Dan", drawing("disc")))
    add("tools/saw", svg("saw", "Dan", drawing("saw")))
    files["./usr/share/doc/openclipart-svg/copyright"] = b"public domain"
    files[f"{ROOT}README.svg"] = svg("no category", "Dan", drawing("none"))
    return files, {f"{ROOT}animals/dish.svg": "../food/dish_0_a.b._0.svg"}, kept


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files, links, _ = library()
    path = tmp_path_factory.mktemp("deb") / "openclipart-svg_1_all.deb"
    path.write_bytes(deb(files, links))
    return path


@pytest.fixture(scope="module")
def folder(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fetch_clipart(deb=package, image_size=32, out=tmp_path_factory.mktemp("out") / "clipart")


def rows(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "clipart.parquet").to_pylist()


def test_what_a_package_becomes(folder: Path) -> None:
    table = {row["id"]: row for row in rows(folder)}
    assert set(table) == library()[2]
    assert len(table) == len(rows(folder)) == 78
    assert Counter(row["category"] for row in table.values()) == {"animals": 27, "food": 51}
    assert set(table["food/adobe"]) == {"id", "image", "title", "category", "author"}
    assert table["animals/lizard"]["title"] == "Lézard vert"
    assert table["animals/by"]["title"] == "green frog"
    assert table["food/dish_3_a_b__0"] == {
        "id": "food/dish_3_a_b__0",
        "image": "pictures#food/dish_3_a_b__0",
        "title": "dish 3",
        "category": "food",
        "author": "ann",
    }
    figures = json.loads((folder / "corpus.json").read_text())
    assert figures["dropped"] == {
        "blank or not drawable": 1,
        "category of fewer than 25": 1,
        "entities that hold markup": 1,
        "folder that names no subject": 1,
        "in two categories": 2,
        "looks like another one": 1,
        "no title in Latin letters, no author or not in the public domain": 5,
        "shows a file of its author's disk": 1,
        "title of a whole collection": 7,
        "title that another author gave too": 1,
    }
    assert (figures["drawings"], figures["pinned"]) == (78, False)
    card = (folder / "README.md").read_text()
    assert "| animals | 27 |" in card
    assert "| title of a whole collection | 7 |" in card


def test_pictures_are_square_and_nothing_is_cut(folder: Path) -> None:
    shards = open_shards(folder / "pictures")
    assert len(shards) == 78
    for row in rows(folder):
        sample = shards.read(shards.find(row["image"].removeprefix("pictures#")))
        assert (sample.caption, sample.meta["category"]) == (row["title"], row["category"])
        picture = np.asarray(Image.open(io.BytesIO(sample.image)))
        assert picture.shape == (32, 32, 3)
        if "/fruit/" in row["id"]:  # drawings of 50 x 100 stand in the middle
            assert (picture[:, :8] == 255).all()
            assert (picture[:, 24:] == 255).all()
            assert (picture[:, 8:24] < 128).any()


def test_a_finished_corpus_is_not_made_again(
    folder: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setenv("PATH", "")
    for deb_file in (None, package):
        assert fetch_clipart(deb=deb_file, image_size=32, out=folder) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_fetch_goes_on_and_gives_the_same_bytes(
    folder: Path, package: Path, tmp_path: Path
) -> None:
    out = tmp_path / "clipart"

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "draw food":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_clipart(deb=package, image_size=32, out=out, progress=interrupt)
    assert not out.exists()
    seen: list[str] = []
    fetch_clipart(deb=package, image_size=32, out=out, progress=lambda what, *_: seen.append(what))
    assert [what for what in seen if what.startswith("draw")] == ["draw food", "draw tools"]
    assert [path.name for path in tmp_path.iterdir()] == ["clipart"]
    for path in folder.rglob("*"):
        if path.is_file():
            assert path.read_bytes() == (out / path.relative_to(folder)).read_bytes()


def bomb() -> bytes:
    """9 MB of zeros, which are 2 kB as xz."""
    return ar({"debian-binary": b"2.0\n", "data.tar.xz": lzma.compress(data_tar({"./x": bytes(9 << 20)}))})


def cut(data: bytes) -> bytes:
    return data[: len(data) - 3000]


def plain(name: str) -> bytes:
    return ar({"data.tar.xz": lzma.compress(data_tar({name: b"root:x:0:0"}))})


HOSTILE = {
    "upwards": (lambda: plain("./../../etc/passwd"), "leads out of the package"),
    "hidden": (lambda: plain(f"{ROOT}../../../../../etc/passwd"), "leads out of the package"),
    "absolute": (lambda: plain("/etc/passwd"), "leads out of the package"),
    "bomb": (bomb, "unfolds to more than 8388608 bytes"),
    "large": (lambda: deb({f"{ROOT}food/x.svg": bytes((1 << 20) + 1)}), "has 1048577 bytes"),
    "cut": (lambda: cut(deb(library()[0])), "the archive is cut"),
    "no deb": (lambda: b"PK\3\4 a zip", "it is no .deb"),
    "no ar": (lambda: b"!<arch>\n" + b"x" * 60, "its ar header is damaged"),
    "half ar": (lambda: b"!<arch>\ndebian", "its ar header is damaged"),
    "no data": (lambda: ar({"debian-binary": b"2.0\n"}), "has no data.tar.xz"),
    "other": (lambda: ar({"data.tar.zst": b"(\xb5/\xfd"}), "data.tar.zst is not compressed by xz"),
    "no xz": (lambda: ar({"data.tar.xz": b"plainly not"}), "cannot be read"),
    "no tar": (lambda: ar({"data.tar.xz": lzma.compress(b"no tar" * 99)}), "cannot be read"),
    "nothing": (lambda: deb({"./usr/bin/true": b""}), "holds no drawings"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_archives_that_are_not_the_package_are_refused(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = HOSTILE[kind]
    monkeypatch.setattr(debian, "MAX_MEMBER", 1 << 20)
    monkeypatch.setattr(debian, "MAX_ARCHIVE", 1 << 23)
    path = tmp_path / "openclipart-svg_1_all.deb"
    path.write_bytes(make())
    assert main(["data", "fetch", "clipart", "--deb", str(path), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.startswith(f"error: {path}")
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
    assert not Path("/etc/passwd.svg").exists()


def apt_get(folder: Path, script: str) -> Path:
    """A command of the name apt-get in an otherwise empty PATH."""
    folder.mkdir()
    command = folder / "apt-get"
    command.write_text(f"#!{sys.executable}\nimport shutil, sys\n{script}\n")
    command.chmod(0o755)
    return folder


def test_apt_fetches_it_once(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = (
        "assert sys.argv[1:] == ['download', '-q', 'openclipart-svg'], sys.argv\n"
        f"shutil.copy({str(package)!r}, 'openclipart-svg_1%3a7-2_all.deb')"
    )
    monkeypatch.setenv("PATH", str(apt_get(tmp_path / "bin", script)))
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    folder = fetch_clipart(image_size=32)
    assert folder == tmp_path / "cache" / "corpora" / "clipart"
    assert json.loads((folder / "corpus.json").read_text())["package"] == "openclipart-svg_1%3a7-2_all.deb"
    assert len(rows(folder)) == 78
    os.unlink(tmp_path / "bin" / "apt-get")
    fetch_clipart(image_size=40)  # another size from the same package
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == ["corpora", "debian"]
    assert [path.name for path in (tmp_path / "cache" / "corpora").iterdir()] == ["clipart"]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (None, r"no apt-get on this machine .* with --deb FILE"),
        ("sys.exit('E: Unable to locate package openclipart-svg')", r"Unable to locate .*--deb FILE"),
        ("pass", r"failed: no message; run `apt-get update`"),
    ],
)
def test_without_a_package_one_sentence_names_the_way_out(
    script: str | None, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "" if script is None else str(apt_get(tmp_path / "bin", script)))
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=expected):
        fetch_clipart()
    assert not (tmp_path / "cache" / "corpora").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["clipart", "--tier", "demo"], "--tier demo: clipart has no tiers"),
        (["icons", "--deb", "x.deb"], "--deb x.deb: icons come from npm packages"),
        (["clipart", "--deb", "x.deb"], "--deb x.deb: there is no such file"),
        (["clipart", "--image-size", "4"], "image size 4 is not between 16 and 1024"),
    ],
)
def test_wrong_arguments_are_named(
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["data", "fetch", *words]) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


def test_other_peoples_files_are_not_replaced(package: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other things than a corpus"):
        fetch_clipart(deb=package, image_size=32, out=tmp_path)
    assert clipart.PINNED != "", "the pinned version has a hash"
