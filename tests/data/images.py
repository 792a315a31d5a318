"""Pictures to decode."""

import io
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


def stored(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def planes(image: Any) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)
