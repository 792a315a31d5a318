"""A contact sheet: pictures above their captions, to see at a glance what a folder of shards holds."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..configs.errors import UserError
from ..configs.files import temporary_beside
from .decode import DecodeError, decode_image
from .image_header import MAX_PIXELS
from .shards import DamagedSample, ShardSet, open_shards

__all__ = ["write_sheet"]

TILE, GAP, PER_ROW = 144, 12, 6
LINE, LINES = 15, 3
PAPER, INK, SOFT, CARD = "#f4f4f2", "#1d1d1f", "#6e6e73", "#ffffff"


def write_sheet(folder: str | Path, path: str | Path, *, count: int = 24) -> Path:
    """A PNG of ``count`` evenly spaced samples, each above its caption and its key.

    The same samples every time; damaged ones are left out. Raises UserError as ``open_shards`` does, or if
    ``path`` is no ``.png``.
    """
    path = Path(path).expanduser()
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: the sheet is a PNG; name it {path.with_suffix('.png')}")
    shards = open_shards(folder)
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(max(count, 1), len(shards))).round().astype(int))
    tiles = [tile for sample_id in chosen if (tile := _tile(shards, int(sample_id))) is not None]
    font, small = ImageFont.load_default(12), ImageFont.load_default(10)
    texts = [wrap(caption, lambda text: font.getlength(text) <= TILE) for _, caption, _ in tiles]
    lines = max(map(len, texts), default=1)
    height = TILE + LINE * (lines + 1) + 8
    rows = -(-max(len(tiles), 1) // PER_ROW)
    columns = min(max(len(tiles), 1), PER_ROW)
    sheet = Image.new("RGB", (columns * (TILE + GAP) + GAP, rows * (height + GAP) + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for number, (picture, _, key) in enumerate(tiles):
        x = GAP + number % PER_ROW * (TILE + GAP)
        y = GAP + number // PER_ROW * (height + GAP)
        draw.rectangle((x, y, x + TILE - 1, y + TILE - 1), fill=CARD)
        sheet.paste(picture, (x + (TILE - picture.width) // 2, y + (TILE - picture.height) // 2))
        for line, text in enumerate(texts[number]):
            draw.text((x, y + TILE + 5 + LINE * line), text, fill=INK, font=font)
        name = wrap(key, lambda text: small.getlength(text) <= TILE, 1)[0]
        draw.text((x, y + TILE + 6 + LINE * lines), name, fill=SOFT, font=small)
    with temporary_beside(path) as temporary:
        sheet.save(temporary, format="PNG")
    return path


def _tile(shards: ShardSet, sample_id: int) -> tuple[Image.Image, str, str] | None:
    try:
        raw = shards.read(sample_id)
        pixels = decode_image(raw.image, max_pixels=MAX_PIXELS, least=TILE)
    except (DamagedSample, DecodeError):
        return None
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    scale = TILE / max(picture.size)
    size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    return picture.resize(size, Image.Resampling.BICUBIC), raw.caption, raw.key


def wrap(text: str, fits: Callable[[str], bool], lines: int = LINES) -> list[str]:
    """``text`` in at most ``lines`` lines that fit, broken at spaces, else within words; what is left out
    is shown by dots."""
    words, out = " ".join(text.split())[:400], list[str]()
    while words and len(out) < lines:
        end = len(words)
        while end > 1 and not fits(words[:end]):
            space = words.rfind(" ", 0, end)
            end = space if space > 0 else end - 1
        out.append(words[:end])
        words = words[end:].lstrip()
    if words:
        last = out[-1]
        while last and not fits(last + "..."):
            last = last[:-1]
        out[-1] = last.rstrip() + "..."
    return out or [""]
