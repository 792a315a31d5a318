"""Pictures to decode."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A smooth picture with some edges, as photos have."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).copy()
    pixels[height // 4 : height // 2, width // 3 : width // 2] = rng.integers(0, 256, 3)
    return Image.fromarray(pixels)


def icon(seed: int) -> Image.Image:
    """64 pixels square: discs on white, every fourth one transparent, made by integer arithmetic alone."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:64, :64]
    pixels = np.full((64, 64, 4), 255, dtype=np.uint8)
    pixels[..., 3] = 0 if seed % 4 == 0 else 255
    for _ in range(5):
        cx, cy, radius = rng.integers(8, 56, 3)
        inside = (x - cx) ** 2 + (y - cy) ** 2 <= (radius // 2) ** 2
        pixels[inside] = [*rng.integers(0, 256, 3), 255 if seed % 8 else 128]
    return Image.fromarray(pixels if seed % 4 == 0 else pixels[..., :3].copy())


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, body: bytes) -> bytes:
    """One chunk of a PNG."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def png(width: int, height: int, depth: int, colour: int, pixels: bytes, *more: bytes) -> bytes:
    """A PNG of rows as they are stored, with more chunks before them."""
    rows = [pixels[i : i + len(pixels) // height] for i in range(0, len(pixels), len(pixels) // height)]
    return b"".join(
        [
            b"\x89PNG\r\n\x1a\n",
            chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)),
            *more,
            chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))),
            chunk(b"IEND", b""),
        ]
    )


def turned(image: Image.Image, kind: str, orientation: int, **options: Any) -> bytes:
    """The image stored with an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return stored(image, kind, exif=exif, **options)


def planes(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
