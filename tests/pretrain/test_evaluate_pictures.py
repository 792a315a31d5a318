"""Example pictures: chosen by nobody, drawn inside the frame, the same every time."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from diptych.pretrain.pictures import HIT, MISS, Example, choose_examples, draw_examples, thumbnail


def example(direction: str, hits: list[bool], name: str = "red fox") -> Example:
    pictures: list[Image.Image | None] = [Image.new("RGB", (72, 72), "#eee") for _ in hits]
    image = Image.new("RGB", (48, 48), "#36c")
    texts = [f"{name} {i}" for i in range(len(hits))]
    if direction == "image_to_text":
        return Example(direction, name, image, texts, [], [0.5] * len(hits), hits)
    return Example(direction, name, None, texts, pictures, [0.5] * len(hits), hits)


def pixels_of(path: Path, colour: str) -> int:
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((np.asarray(Image.open(path).convert("RGB")) == wanted).all(-1).sum())


def test_examples_are_chosen_by_hash_and_do_not_depend_on_their_order() -> None:
    names = [f"sample-{i}" for i in range(100)]
    chosen = {names[i] for i in choose_examples(names, 6)}
    backwards = names[::-1]
    assert {backwards[i] for i in choose_examples(backwards, 6)} == chosen
    assert len(chosen) == 6
    assert choose_examples(["a", "a"], 5) != []
    assert choose_examples([], 3) == []


def test_hits_and_misses_differ_in_colour_and_the_file_is_the_same_every_time(tmp_path: Path) -> None:
    for direction in ("image_to_text", "text_to_image"):
        path = tmp_path / f"{direction}.png"
        draw_examples([example(direction, [True, False, False])], path, title="pets")
        first = path.read_bytes()
        assert pixels_of(path, HIT) > 20
        assert pixels_of(path, MISS) > 20
        draw_examples([example(direction, [True, False, False])], path, title="pets")
        assert path.read_bytes() == first
        draw_examples([example(direction, [False] * 3)], path, title="pets")
        assert pixels_of(path, HIT) == 0


def test_long_names_and_other_scripts_are_cut_and_drawn(tmp_path: Path) -> None:
    path = tmp_path / "long.png"
    names = ["a very long name " * 30, "", "\u0444\u043e\u043a\u0441", "\u72d0\u72f8", "two\nlines"]
    draw_examples(
        [example(d, [True, False], n) for n in names for d in ("image_to_text", "text_to_image")],
        path,
        title="x",
    )
    with Image.open(path) as image:
        assert image.width < 1200
        right = np.asarray(image.convert("RGB"))[:, -8:]
    assert (right == 255).all()  # nothing runs over the edge


def test_a_thumbnail_shows_the_models_pixels() -> None:
    pixels = torch.arange(3 * 4 * 4, dtype=torch.uint8).view(3, 4, 4)
    image = thumbnail(pixels)
    assert image.size == (4, 4)
    assert image.getpixel((1, 2)) == (9, 25, 41)
