"""Fetching the icon corpus: the same every time, interrupted and taken up again, and every failure named."""

import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from diptych.configs.errors import UserError
from diptych.data.corpora import icons, naming, sets
from diptych.data.corpora.galleries import gallery_hash
from diptych.data.corpora.icons import fetch_icons
from diptych.data.corpora.pins import EMOJI_SETS, TIERS, Tier

from . import icon_packages
from .icon_packages import use_small_packages

DEMO = TIERS["demo"]  # before the small one takes its place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Generator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        use_small_packages(patch, tmp_path_factory.mktemp("cache"))
        yield fetch_icons()


def figures(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "corpus.json").read_text())


def test_the_same_packages_give_the_same_bytes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_packages(monkeypatch, tmp_path / "cache")
    monkeypatch.setattr("diptych.data.corpora.render.CHUNK", 8)  # two processes even for so few
    again = fetch_icons(out=tmp_path / "deeper" / "again")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    for path in files:
        assert (folder / path).read_bytes() == (again / path).read_bytes(), path


def test_a_finished_corpus_is_not_made_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    monkeypatch.setenv("PATH", "")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIPTYCH_CACHE", str(folder.parents[1]))
        assert fetch_icons() == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_an_interrupted_fetch_goes_on_and_leaves_no_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_small_packages(monkeypatch, tmp_path / "cache")
    out = tmp_path / "corpus"

    def interrupt(what: str, done: int, total: int) -> None:
        if what == "draw lines":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fetch_icons(out=out, progress=interrupt)
    assert not out.exists()
    drawn = {
        path.name: path.stat().st_mtime_ns for path in tmp_path.glob(".corpus.partial/pictures/*.parquet")
    }
    assert len(drawn) == 6, "the sets before that one"
    seen: list[str] = []
    fetch_icons(out=out, progress=lambda what, done, total: seen.append(what))
    assert [what for what in seen if what.startswith("draw")] == ["draw lines", "draw copycat"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "corpus"]


def test_a_changed_recipe_replaces_the_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_packages(monkeypatch, tmp_path / "cache")
    out = fetch_icons(out=tmp_path / "corpus")
    monkeypatch.setattr(icons, "RECIPE", 99)
    assert fetch_icons(out=tmp_path / "corpus") == out
    assert figures(out)["made_of"]["recipe"] == 99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "corpus"]


def test_pinned_galleries_are_checked(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = json.loads((folder / "galleries.json").read_text())["openmoji"]["keys"]
    use_small_packages(monkeypatch, tmp_path / "cache", galleries={"openmoji": gallery_hash(keys)})
    fetch_icons(out=tmp_path / "right")
    use_small_packages(monkeypatch, tmp_path / "cache", galleries={"openmoji": gallery_hash(keys[1:])})
    with pytest.raises(
        UserError, match=r"gallery openmoji has \d+ pictures .*pip install resvg-py==.* fetch again"
    ):
        fetch_icons(out=tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_the_demo_tiers_galleries_are_pinned() -> None:
    assert set(DEMO.galleries) == {"openmoji_no_people", "openmoji", "icon_park", "test_word"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tier": "demoo"}, "no tier 'demoo'; choose one of demo, full"),
        ({"image_size": 4}, "image size 4 is not between 16 and 1024"),
    ],
)
def test_wrong_settings_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fetch_icons(**settings)


def test_other_peoples_files_are_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_packages(monkeypatch, tmp_path / "cache")
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other things than a corpus"):
        fetch_icons(out=mine)
    with pytest.raises(UserError, match=r"thesis.txt is a file; give another place"):
        fetch_icons(out=mine / "thesis.txt")
    assert (mine / "thesis.txt").read_text() == "years of work"


def test_a_full_disk_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_small_packages(monkeypatch, tmp_path / "cache")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(icons, "write_tasks", full)
    with pytest.raises(UserError, match=r"No space left on device; make room .* DIPTYCH_CACHE"):
        fetch_icons(out=tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_the_full_tier_reads_sets_of_one_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents: dict[str, Any] = {}
    for documents_of_set in icon_packages.demo_sets():
        info = documents_of_set["info.json"]
        body = documents_of_set["icons.json"] | documents_of_set["metadata.json"]
        documents[f"json/{info['prefix']}.json"] = body | {
            "info": info,
            "chars": documents_of_set["chars.json"],
        }
    logos = icon_packages.line_set("some-logos", ["acme"])
    documents["json/some-logos.json"] = logos["icons.json"] | {
        "info": logos["info.json"] | {"category": "Logos"}
    }
    no_profit = icon_packages.line_set("no-profit", ["acme"])
    no_profit["info.json"]["license"] = {"title": "CC BY-NC 4.0", "spdx": "CC-BY-NC-4.0"}
    documents["json/no-profit.json"] = no_profit["icons.json"] | {"info": no_profit["info.json"]}
    cache = tmp_path / "cache"
    _, labels = icon_packages.small_tier(cache)
    package = icon_packages.store(cache, "@iconify/json", documents)
    monkeypatch.setenv("DIPTYCH_CACHE", str(cache))
    monkeypatch.setitem(TIERS, "full", Tier("full", (package,), icon_packages.RULES, {}))
    monkeypatch.setattr(icons, "EMOJIBASE", labels)
    monkeypatch.setattr(naming, "EMOJI_SETS", EMOJI_SETS | {"alpha"})
    out = fetch_icons(tier="full")
    assert out == cache / "corpora" / "icons-full"
    facts = figures(out)
    assert facts["left_out"] == {"some-logos": "brand logos", "no-profit": "licence CC-BY-NC-4.0"}
    assert sum(split["samples"] for split in facts["splits"].values()) > 200
    assert sets.why_left_out("iconmind", {"license": {"spdx": "MIT"}})
