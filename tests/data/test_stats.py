"""Figures of shards against figures counted by hand, and the sheet looked at."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diptych.configs.errors import UserError
from diptych.data.foreign import index_folder
from diptych.data.shards import open_shards
from diptych.data.sheet import wrap, write_sheet
from diptych.data.stats import shard_stats

from .samples import flip, picture, samples, write, write_tar
from .test_foreign import half_samples


def opened(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def test_figures_are_those_of_the_samples(tmp_path: Path) -> None:
    content = [
        (
            f"k{i}",
            picture(i % 3, size=(20 * (i + 1), 70)),
            "png",
            ("word " * (i + 1)).strip(),
            {"i": i, "a": "x"},
        )
        for i in range(5)
    ]
    content.append(("copy", content[0][1], "png", "word", {"a": "y", "deep": ["1", "2", "", {}, "1"]}))
    write(tmp_path, content)
    got = shard_stats(tmp_path)
    assert (got["samples"], got["shards"], got["left_out"], got["formats"]) == (6, 2, 0, {"png": 6})
    assert got["fingerprint"] == open_shards(tmp_path).fingerprint
    sides = [min(20 * (i + 1), 70) for i in range(5)] + [20]
    assert got["shorter_side"]["mean"] == pytest.approx(np.mean(sides), abs=0.01)
    assert (got["shorter_side"]["p0"], got["shorter_side"]["p100"]) == (20, 70)
    assert {k: n for k, n in got["shorter_side"]["histogram"].items() if n} == {"0-63": 4, "64-127": 2}
    lengths = [5 * (i + 1) - 1 for i in range(5)] + [4]
    assert got["caption_characters"]["mean"] == pytest.approx(np.mean(lengths), abs=0.01)
    assert sum(got["caption_characters"]["histogram"].values()) == 6
    assert (got["caption_words"]["p0"], got["caption_words"]["p100"]) == (1, 5)
    assert got["copied_images"] == {"count": 1, "rate": pytest.approx(1 / 6, abs=1e-6)}
    assert got["repeated_captions"]["count"] == 1
    assert got["commonest_captions"] == {"word": 2}
    assert got["repeated_keys"]["count"] == 0
    assert got["json"]["a"] == {"in": 1.0, "distinct": 2, "commonest": {"x": 5, "y": 1}}
    assert got["json"]["deep"] == {
        "in": pytest.approx(1 / 6, abs=1e-4),
        "distinct": 2,
        "commonest": {"1": 2, "2": 1},
    }


def test_samples_that_were_left_out_are_not_counted(tmp_path: Path) -> None:
    write_tar(tmp_path / "0.tar", half_samples())
    index_folder(tmp_path)
    got = shard_stats(tmp_path)
    assert (got["samples"], got["left_out"], got["formats"]) == (2, 11, {"jpg": 1, "png": 1})


def test_damaged_samples_are_counted_and_left_off_the_sheet(tmp_path: Path) -> None:
    write(tmp_path / "s", samples(4))
    flip(tmp_path / "s/00000.tar", int(open_shards(tmp_path / "s").records(0)[1]["image_offset"]) + 30)
    assert shard_stats(tmp_path / "s")["damaged"] == 1
    assert opened(write_sheet(tmp_path / "s", tmp_path / "sheet.png")).width == 3 * (144 + 12) + 12


def test_the_sheet_shows_the_pictures_in_order(tmp_path: Path) -> None:
    colours = ["red", "lime", "blue", "yellow", "cyan", "magenta", "black"]
    folder = tmp_path / "source"
    folder.mkdir()
    content = []
    for number, colour in enumerate(colours):
        Image.new("RGB", (30, 20), colour).save(folder / f"{colour}.png")
        content.append((f"k{number}", (folder / f"{colour}.png").read_bytes(), "png", f"a {colour} flag", {}))
    write(tmp_path / "shards", content)
    path = write_sheet(tmp_path / "shards", tmp_path / "sheet.png")
    first = path.read_bytes()
    sheet = opened(path)
    for number, colour in enumerate(colours):
        x, y = 12 + number % 6 * 156 + 72, 12 + number // 6 * (144 + 2 * 15 + 8 + 12) + 72
        assert sheet.getpixel((x, y)) == Image.new("RGB", (1, 1), colour).getpixel((0, 0))
    assert write_sheet(tmp_path / "shards", path).read_bytes() == first
    small = opened(write_sheet(tmp_path / "shards", tmp_path / "two.png", count=2))
    assert small.width == 2 * 156 + 12
    with pytest.raises(UserError, match=r"sheet\.png"):
        write_sheet(tmp_path / "shards", tmp_path / "sheet.jpg")


def test_captions_are_wrapped_at_words_and_cut_with_dots() -> None:
    def fits(text: str) -> bool:
        return len(text) <= 10

    assert wrap("a short", fits) == ["a short"]
    assert wrap("one two three four", fits) == ["one two", "three four"]
    assert wrap("one two three four five six", fits) == ["one two", "three four", "five six"]
    assert wrap("one two three four five sixes seven", fits) == ["one two", "three four", "five si..."]
    assert wrap("x" * 25, fits) == ["x" * 10, "x" * 10, "x" * 5]
    assert wrap("", fits) == [""]
    assert wrap("wide", lambda text: False, 2) == ["w", "..."]
