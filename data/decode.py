"""Bytes to uint8 pixels: guarded decoding, and open_clip's evaluation preprocessing.

Pixels stay uint8 [3, H, W] until they are on the device. The orientation that a camera noted in EXIF is not
applied, as open_clip does not.
"""

import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from torch import Tensor

from .image_header import MAX_PIXELS, HeaderError, read_header

try:
    import simplejpeg  # the extra "fast"
except ImportError:
    simplejpeg = None

__all__ = ["DecodeError", "Interpolation", "ResizeMode", "decode_image", "eval_image"]

_PLUGINS: dict[str, Callable[[Any], Image.Image]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
ResizeMode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]

_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}


class DecodeError(ValueError):
    """Bytes that are no image to train on. ``reason`` is "decode" (damaged) or "size" (too many pixels)."""

    def __init__(self, message: str, reason: Literal["decode", "size"] = "decode") -> None:
        super().__init__(message)
        self.reason = reason


def decode_image(data: bytes, *, max_pixels: int, least: int | None = None) -> Tensor:
    """uint8 [3, H, W] of a JPEG, PNG or WebP image, transparency laid on white.

    ``least``: the image may come reduced by 2, 4 or 8 as long as no side falls below it; the reduction is
    part of JPEG decoding and several times faster. The size is checked in the header, before anything is
    decoded. Raises DecodeError.
    """
    try:
        header = read_header(data)
    except HeaderError as error:
        raise DecodeError(str(error)) from error
    if header.width * header.height > max_pixels:
        raise DecodeError(f"{header.width} x {header.height} pixels are too many", "size")
    shrink = _shrink(min(header.width, header.height), least)
    try:
        if header.format == "jpg" and simplejpeg is not None:
            try:
                return _simplejpeg(data, header.width, header.height, shrink)
            except ValueError:  # CMYK, or damage; Pillow decides
                pass
        return _pillow(data, header.format, shrink)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise DecodeError(f"the {header.format} image is damaged: {error}") from error


def _shrink(side: int, least: int | None) -> int:
    """The largest factor of 1, 2, 4 and 8 by which a side may shrink."""
    if least is None:
        return 1
    return next(factor for factor in (8, 4, 2, 1) if factor == 1 or side >= factor * least)


def _pillow(data: bytes, kind: str, shrink: int) -> Tensor:
    # by plugin: Image.open would try formats of its own accord, some of which start programs
    image = _PLUGINS[kind](io.BytesIO(data))
    if shrink > 1 and kind == "jpg":
        image.draft("RGB", (image.width // shrink, image.height // shrink))
    image.load()
    if image.mode != "RGB" or "transparency" in image.info:
        image = _rgb(image)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "I;16" or image.mode.startswith("I"):  # 16 bits of grey: the upper eight
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image.getchannel("A"))
    return paper


def _simplejpeg(data: bytes, width: int, height: int, shrink: int) -> Tensor:
    reduced = {"min_height": -(-height // shrink), "min_width": -(-width // shrink)} if shrink > 1 else {}
    decode: Any = simplejpeg
    return torch.from_numpy(decode.decode_jpeg(data, "RGB", **reduced)).permute(2, 0, 1)


def eval_image(
    image: bytes | Tensor,
    image_size: int,
    *,
    resize_mode: ResizeMode = "shortest",
    interpolation: Interpolation = "bicubic",
    fill_color: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """One image as open_clip's evaluation transform makes it, bit for bit before its floats: uint8 [3, S, S].

    ``image``: bytes to decode, or uint8 [3, H, W]. ``resize_mode``: shortest side to S and the centre cut out
    ("shortest"), longest side to S and the rest filled with ``fill_color`` ("longest"), or both sides to S
    ("squash"). Raises DecodeError.
    """
    if isinstance(image, bytes):
        image = decode_image(image, max_pixels=max_pixels)
    height, width = image.shape[1:]
    if resize_mode == "squash":
        target = image_size, image_size
    elif resize_mode == "shortest":
        short = min(height, width)
        target = tuple(
            image_size if side == short else int(image_size * side / short) for side in (height, width)
        )
    else:
        ratio = max(height / image_size, width / image_size)
        target = max(1, round(height / ratio)), max(1, round(width / ratio))
    if target != (height, width):
        # Pillow's own, as in open_clip: torch's differs by up to two steps of 255
        pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy()))
        pixels = pixels.resize((target[1], target[0]), _FILTERS[interpolation])
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return _centre(image, image_size, fill_color).contiguous()


def _centre(image: Tensor, size: int, fill: int) -> Tensor:
    """The middle [3, size, size], filled where the image is smaller."""
    for axis in (1, 2):
        side = image.shape[axis]
        if side < size:
            shape = list(image.shape)
            before, after = (size - side) // 2, (size - side + 1) // 2
            parts = [image.new_full([*shape[:axis], n, *shape[axis + 1 :]], fill) for n in (before, after)]
            image = torch.cat([parts[0], image, parts[1]], dim=axis)
        else:
            image = image.narrow(axis, round((side - size) / 2.0), size)
    return image
