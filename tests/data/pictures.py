"""Pictures with the statistics of photographs: the power of a frequency falls with its square."""

import io
from typing import Any

import numpy as np
from PIL import Image


def natural(seed: int, width: int = 320, height: int = 240) -> Image.Image:
    """A picture like no other."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(width), np.fft.fftfreq(height)))
    frequency[0, 0] = 1
    planes = []
    for _ in range(3):
        plane = np.fft.ifft2(np.fft.fft2(rng.normal(size=(height, width))) / frequency).real
        planes.append((plane - plane.mean()) / plane.std())
    mixed = np.stack([planes[0] * 0.8 + plane * 0.4 for plane in planes], axis=-1)
    return Image.fromarray(np.clip(128 + 50 * mixed, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def cropped(image: Image.Image, left: float, top: float, right: float, bottom: float) -> Image.Image:
    """Without these shares of its sides."""
    width, height = image.size
    return image.crop(
        (round(left * width), round(top * height), round((1 - right) * width), round((1 - bottom) * height))
    )
