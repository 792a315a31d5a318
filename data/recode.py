"""Images made smaller or written in another format while shards are built; those that need neither stay as
they are, byte for byte."""

import io
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from ..configs.errors import UserError
from .image_header import ImageHeader

__all__ = ["Recode", "recode"]

QUALITY = 95
_PILLOW = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


@dataclass(frozen=True)
class Recode:
    """What images are to be. None leaves a property as it is."""

    image_size: int | None = None
    """The shorter side's pixels; smaller images stay as they are."""
    format: Literal["jpg", "png", "webp"] | None = None
    quality: int | None = None
    """Of JPEG and WebP, 1 to 100: all of them are written again. None: 95 for those that must be."""

    def __post_init__(self) -> None:
        if self.image_size is not None and self.image_size < 1:
            raise UserError(f"--image-size {self.image_size} must be at least 1")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UserError(f"--quality {self.quality} must be from 1 to 100")


def recode(data: bytes, header: ImageHeader, wish: Recode, *, max_pixels: int) -> bytes:
    """The bytes of the image as ``wish`` wants it; ``data`` itself where that holds already.

    The pixels are those that training sees: turned as EXIF says, transparency on white, 8 bits. Equal bytes
    give equal bytes with one version of Pillow. Raises DecodeError, and ValueError if the format cannot hold
    the image.
    """
    kind = wish.format or header.format
    side = min(header.width, header.height)
    shrinks = wish.image_size is not None and side > wish.image_size
    if not shrinks and kind == header.format and (wish.quality is None or kind == "png"):
        return data
    from .decode import decode_image  # torch, which images that stay do without

    least = 2 * wish.image_size if shrinks and wish.image_size is not None else None
    pixels = decode_image(data, max_pixels=max_pixels, least=least).permute(1, 2, 0)
    image = Image.fromarray(np.ascontiguousarray(pixels.numpy()))
    if shrinks and wish.image_size is not None:
        # from the size in the header: a decoder that reduces rounds it
        wide, high = image.size if header.width == header.height else _turned(header, image)
        scale = wish.image_size / side
        size = (max(1, round(wide * scale)), max(1, round(high * scale)))
        image = image.resize(size, Image.Resampling.LANCZOS)
    options: dict[str, Any] = {} if kind == "png" else {"quality": wish.quality or QUALITY}
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=_PILLOW[kind], **options)
    except (OSError, ValueError, SystemError) as error:  # a side that the format cannot count to
        raise ValueError(f"{image.width} x {image.height} pixels cannot be written as {kind}") from error
    return buffer.getvalue()


def _turned(header: ImageHeader, image: Image.Image) -> tuple[int, int]:
    """Width and height as stored, in the order in which the decoded image has them."""
    lies = image.width > image.height
    long, short = max(header.width, header.height), min(header.width, header.height)
    return (long, short) if lies else (short, long)
