"""Example retrievals as one picture: what a model finds for a few queries, chosen without looking at it."""

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..configs.files import atomic_write_bytes

__all__ = ["Example", "choose_examples", "draw_examples", "png", "thumbnail"]

HIT, MISS, INK, SOFT, PAPER = "#0f7b3f", "#b3362b", "#1d2330", "#667085", "#ffffff"
TILE, GAP, MARGIN = 72, 12, 20
COLUMN = 5 * (TILE + GAP) + MARGIN + 40


@dataclass(frozen=True)
class Example:
    """One query and its best answers, best first.

    ``image`` and the images of ``top`` are PIL pictures where the item is a picture and None where it is a
    caption; ``hits`` says which answers are right.
    """

    direction: str  # "image_to_text" or "text_to_image"
    query: str
    image: Image.Image | None
    captions: list[str]
    images: list[Image.Image | None]
    cosines: list[float]
    hits: list[bool]


def choose_examples(names: Sequence[str], count: int) -> list[int]:
    """Positions of ``count`` queries with the smallest hashes of their names: the same for every model, and
    nobody's choice."""
    digests = [hashlib.sha256(name.encode()).digest() for name in names]
    return sorted(range(len(names)), key=lambda i: (digests[i], i))[:count]


def thumbnail(pixels: Any) -> Image.Image:
    """A picture of uint8 pixels [3, S, S], as the model saw them."""
    return Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), mode="RGB")


def png(image: Image.Image) -> bytes:
    """The picture as PNG bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _font(size: int) -> Any:
    return ImageFont.load_default(size=size)


def _fitted(draw: ImageDraw.ImageDraw, text: str, font: Any, width: int) -> str:
    """The text, cut with dots where it is wider than ``width`` pixels."""
    text = " ".join(text.split()) or "(empty)"
    if draw.textlength(text, font=font) <= width:
        return text
    while text and draw.textlength(text + "...", font=font) > width:
        text = text[:-1]
    return text.rstrip() + "..."


def _tile(canvas: Image.Image, image: Image.Image | None, x: int, y: int, size: int, colour: str) -> None:
    draw = ImageDraw.Draw(canvas)
    if image is not None:
        canvas.paste(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS), (x, y))
    draw.rectangle((x - 2, y - 2, x + size + 1, y + size + 1), outline=colour, width=2)


def _mark(draw: ImageDraw.ImageDraw, x: int, y: int, hit: bool) -> None:
    """A tick or a cross, so that colour is not the only sign."""
    if hit:
        draw.line([(x, y + 5), (x + 4, y + 9), (x + 10, y)], fill=HIT, width=2)
    else:
        draw.line([(x, y), (x + 9, y + 9)], fill=MISS, width=2)
        draw.line([(x, y + 9), (x + 9, y)], fill=MISS, width=2)


def _draw_image_query(canvas: Image.Image, example: Example, x: int, y: int) -> None:
    draw = ImageDraw.Draw(canvas)
    _tile(canvas, example.image, x, y, TILE + 16, SOFT)
    left = x + TILE + 16 + GAP + 4
    for row, (caption, hit) in enumerate(zip(example.captions, example.hits, strict=True)):
        top = y + row * 18
        _mark(draw, left, top + 3, hit)
        text = _fitted(draw, caption, _font(13), COLUMN - (left - x) - 30)
        draw.text((left + 18, top), text, fill=HIT if hit else INK, font=_font(13))
    caption = _fitted(draw, "is: " + example.query, _font(12), COLUMN - 20)
    draw.text((x, y + TILE + 22), caption, fill=SOFT, font=_font(12))


def _draw_text_query(canvas: Image.Image, example: Example, x: int, y: int) -> None:
    draw = ImageDraw.Draw(canvas)
    draw.text((x, y), _fitted(draw, example.query, _font(14), COLUMN - 20), fill=INK, font=_font(14))
    for column, (image, hit) in enumerate(zip(example.images, example.hits, strict=True)):
        _tile(canvas, image, x + 2 + column * (TILE + GAP), y + 26, TILE, HIT if hit else MISS)


def draw_examples(examples: Sequence[Example], path: Path, *, title: str) -> None:
    """Write the grid as PNG: picture queries with their captions left, text queries with their pictures
    right."""
    left = [e for e in examples if e.direction == "image_to_text"]
    right = [e for e in examples if e.direction == "text_to_image"]
    step = TILE + 56
    height = 84 + step * max(len(left), len(right), 1) + MARGIN
    canvas = Image.new("RGB", (2 * COLUMN + 2 * MARGIN, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((MARGIN, 14), title, fill=INK, font=_font(17))
    draw.text((MARGIN, 48), "picture to text: the five best captions", fill=SOFT, font=_font(13))
    draw.text((MARGIN + COLUMN, 48), "text to picture: the five best pictures", fill=SOFT, font=_font(13))
    for row, example in enumerate(left):
        _draw_image_query(canvas, example, MARGIN + 2, 84 + row * step)
    for row, example in enumerate(right):
        _draw_text_query(canvas, example, MARGIN + COLUMN, 84 + row * step)
    atomic_write_bytes(path, png(canvas))
