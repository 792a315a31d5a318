"""Bytes to uint8 pixels: guarded decoding, a training image's crop, open_clip's evaluation preprocessing.

Pixels stay uint8 [3, H, W] until they are on the device. Images are turned as their EXIF orientation asks, by
every decoder and in training as in evaluation (docs/decoding.md).
"""

import io
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image, ImageChops, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from torch import Tensor

from .augment import AugmentConfig, Box, crop_box, cut, draw, finish
from .image_header import MAX_PIXELS, HeaderError, ImageHeader, read_header

try:
    import simplejpeg  # the extra "fast"
except ImportError:
    simplejpeg = None

__all__ = [
    "DecodeError",
    "Interpolation",
    "ResizeMode",
    "decode_crop",
    "decode_image",
    "drawn_crop",
    "eval_image",
    "train_pixels",
]

Bytes = NDArray[np.uint8]

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
    """uint8 [3, H, W] of a JPEG, PNG or WebP image the way it is to be seen: turned as its EXIF orientation
    asks, transparency laid on white, the first frame of an animation.

    ``least``: the image may come reduced by 2, 4 or 8 as long as no side falls below it; the reduction is
    part of JPEG decoding and several times faster. The size is checked in the header, before anything is
    decoded. Raises DecodeError.
    """
    header = _header(data, max_pixels)
    shrink = 1
    if least is not None and header.format == "jpg":
        side = min(header.width, header.height)
        shrink = next(factor for factor in (8, 4, 2, 1) if factor == 1 or side >= factor * least)
    return torch.from_numpy(np.ascontiguousarray(_decode(data, header, shrink))).permute(2, 0, 1)


def train_pixels(
    data: bytes, image_size: int, augment: AugmentConfig, rng: Generator, *, max_pixels: int = MAX_PIXELS
) -> Tensor:
    """One augmented training image, uint8 [3, S, S], of the bytes of a JPEG, PNG or WebP image.

    What ``train_image`` makes of ``decode_image``, but a JPEG is decoded at a half, a quarter or an eighth of
    its size where the crop that was drawn still has the target's. The crop is drawn from the size in the
    header, on the grid that is decoded, so that every decoder gives the same one.

    ``rng``: the sample's own random numbers; equal numbers give equal pixels. Raises DecodeError.
    """
    pixels, numbers = decode_crop(data, image_size, augment, rng, max_pixels=max_pixels)
    return finish(pixels, image_size, augment, numbers)


def decode_crop(
    data: bytes, image_size: int, augment: AugmentConfig, rng: Generator, *, max_pixels: int = MAX_PIXELS
) -> tuple[Bytes, list[float]]:
    """The first half of ``train_pixels``: the crop uint8 [H, W, 3], and the numbers for ``augment.finish``.

    For small images it pays to decode some before any is finished: a fifth of the time is that the code of
    one half drives the other's out of the caches.
    """
    header = _header(data, max_pixels)
    numbers = draw(rng)
    shrink, box = drawn_crop(header, image_size, augment, numbers)
    pixels = cut(_decode(data, header, shrink), box)
    # torch knows no backward strides
    return (np.ascontiguousarray(pixels) if header.rotated else pixels), numbers


def drawn_crop(
    header: ImageHeader, image_size: int, augment: AugmentConfig, draws: list[float]
) -> tuple[int, Box]:
    """The largest factor of 1, 2, 4 and 8 by which an image may be reduced so that its crop still covers the
    target, and the crop of the image at that size, as it is to be seen."""
    width, height = header.seen
    if header.format == "jpg":
        for shrink in (8, 4, 2):
            short = min(width, height) // shrink
            if short == 0 or (short + 1) * (1 + augment.margin) + 1 < image_size:  # no crop can cover it
                continue
            box = crop_box(-(-height // shrink), -(-width // shrink), augment, draws)
            if min(box.height, box.width) >= image_size:
                return shrink, box
    return 1, crop_box(height, width, augment, draws)


def _header(data: bytes, max_pixels: int) -> ImageHeader:
    try:
        header = read_header(data)
    except HeaderError as error:
        raise DecodeError(str(error)) from error
    if header.width * header.height > max_pixels:
        raise DecodeError(f"{header.width} x {header.height} pixels are too many", "size")
    return header


def _decode(data: bytes, header: ImageHeader, shrink: int) -> Bytes:
    """uint8 [H, W, 3] as it is to be seen, perhaps a view with backward strides."""
    try:
        pixels = None
        if header.format == "jpg" and not header.cmyk and simplejpeg is not None:
            pixels = _simplejpeg(data, header, shrink)
        if pixels is None:
            pixels = _pillow(data, header, shrink)
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error, zlib.error ...
        raise DecodeError(f"the {header.format} image is damaged: {error}") from error
    if pixels.shape[:2] != (-(-header.height // shrink), -(-header.width // shrink)):
        raise DecodeError(f"the {header.format} image is damaged: its header and its pixels differ in size")
    return _turned(pixels, header.orientation)


def _turned(pixels: Bytes, orientation: int) -> Bytes:
    """[H, W, 3] turned and mirrored as EXIF's orientation asks, without a copy."""
    if orientation > 4:
        pixels = pixels.swapaxes(0, 1)
    down = -1 if orientation in (3, 4, 7, 8) else 1
    right = -1 if orientation in (2, 3, 6, 7) else 1
    return pixels[::down, ::right] if orientation > 1 else pixels


def _simplejpeg(data: bytes, header: ImageHeader, shrink: int) -> Bytes | None:
    """None for what is damaged: Pillow decides, so that the same is refused with simplejpeg and without."""
    least = {"min_height": -(-header.height // shrink), "min_width": -(-header.width // shrink)}
    decode: Any = simplejpeg
    try:
        return decode.decode_jpeg(data, "RGB", **(least if shrink > 1 else {}))
    except ValueError:
        return None


def _pillow(data: bytes, header: ImageHeader, shrink: int) -> Bytes:
    # by plugin: Image.open would try formats of its own accord, some of which start programs
    image = _PLUGINS[header.format](io.BytesIO(data))
    if shrink > 1 and header.format == "jpg":
        image.draft("RGB", (image.width // shrink, image.height // shrink))
    image.load()
    if image.mode != "RGB" or "transparency" in image.info:
        image = _rgb(image, data[24] if header.format == "png" else 8)
    return np.array(image)


def _rgb(image: Image.Image, depth: int) -> Image.Image:
    """Any other mode as RGB. ``depth``: bits per channel that a PNG stores."""
    key = image.info.get("transparency")
    if image.mode.startswith("I"):  # 16 bits of grey: the upper eight
        levels = np.asarray(image)
        grey = (levels >> 8).astype(np.uint8)
        grey[levels == (-1 if key is None else key)] = 255
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "CMYK" and "adobe" not in image.info:  # Pillow takes all for Adobe's, which are inverted
        image = ImageChops.invert(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    # a transparent colour is stored at the file's depth, but Pillow's pixels have eight bits
    if depth in (2, 4) and isinstance(key, int) and image.mode == "L":
        image.info["transparency"] = key * 255 // ((1 << depth) - 1)
    elif depth == 16 and isinstance(key, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in key)
    image = image.convert("RGBA")
    paper = Image.new("RGB", image.size, "white")
    paper.paste(image, mask=image.getchannel("A"))
    return paper


def eval_image(
    image: bytes | Tensor,
    image_size: int,
    *,
    resize_mode: ResizeMode = "shortest",
    interpolation: Interpolation = "bicubic",
    fill_color: int = 0,
    max_pixels: int = MAX_PIXELS,
    resize: int | None = None,
) -> Tensor:
    """One image as open_clip's evaluation transform makes it, bit for bit before its floats: uint8 [3, S, S].

    ``image``: bytes to decode, or uint8 [3, H, W]. ``resize_mode``: shortest side to S and the centre cut out
    ("shortest"), longest side to S and the rest filled with ``fill_color`` ("longest"), or both sides to S
    ("squash"). ``resize``: another length than S that sides are resized to before the centre [S, S] is cut
    out, as timm's evaluation transform does with a ``crop_pct`` below 1. Raises DecodeError.
    """
    if isinstance(image, bytes):
        image = decode_image(image, max_pixels=max_pixels)
    height, width = image.shape[1:]
    length = resize or image_size
    if resize_mode == "squash":
        target = length, length
    elif resize_mode == "shortest":
        short = min(height, width)
        target = tuple(length if side == short else int(length * side / short) for side in (height, width))
    else:
        ratio = max(height / length, width / length)
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
