"""Bytes to uint8 pixels: guarded decoding, keyed augmentation, and open_clip's evaluation preprocessing.

Pixels stay uint8 [3, H, W] until they are on the device. Resizing is torch's antialiased uint8 kernel, the
fastest on a CPU, within one step of 255 of Pillow's. The orientation that a camera noted in EXIF is not
applied, as open_clip does not.
"""

import io
import math
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, JpegImagePlugin, PngImagePlugin, WebPImagePlugin
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from ..configs.load import StrictModel
from .image_header import MAX_PIXELS, HeaderError, read_header

try:
    import simplejpeg  # the extra "fast"
except ImportError:
    simplejpeg = None

__all__ = [
    "AugmentConfig",
    "DecodeError",
    "decode_image",
    "eval_image",
    "least_side",
    "resize",
    "train_image",
]

_PLUGINS: dict[str, Callable[[Any], Image.Image]] = {
    "png": PngImagePlugin.PngImageFile,
    "jpg": JpegImagePlugin.JpegImageFile,
    "webp": WebPImagePlugin.WebPImageFile,
}
ResizeMode = Literal["shortest", "longest", "squash"]
Interpolation = Literal["bicubic", "bilinear"]


class DecodeError(ValueError):
    """Bytes that are no image to train on. ``reason`` is "decode" (damaged) or "size" (too many pixels)."""

    def __init__(self, message: str, reason: Literal["decode", "size"] = "decode") -> None:
        super().__init__(message)
        self.reason = reason


class AugmentConfig(StrictModel):
    """What is done to training images. All of it is keyed by (seed, epoch, sample id): the same pixels on any
    number of ranks and workers. The defaults are open_clip's."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop as a fraction of the image, least and most; equal to (1, 1): a centre crop."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, least and most."""
    margin: float = Field(default=0.0, ge=0, le=1)
    """White added around the image before the crop, at most this fraction of its size on each axis; how much
    and on which side is drawn. For icons, whose sets leave different margins."""
    hflip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a mirror image; captions that say left or right forbid it."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation and hue changes, as torchvision's ColorJitter."""
    color_jitter_prob: float = Field(default=0.0, ge=0, le=1)
    """Probability of colour jitter."""
    grayscale_prob: float = Field(default=0.0, ge=0, le=1)
    """Probability of a grey image."""

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: {list(self.scale)} must be two rising numbers in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            raise ValueError(f"ratio: {list(self.ratio)} must be two rising positive numbers")
        if min(self.color_jitter) < 0 or self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter: {list(self.color_jitter)} must not be negative, hue at most 0.5")
        return self


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
    if image.mode != "RGB":
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


def resize(image: Tensor, height: int, width: int, *, mode: str = "bicubic") -> Tensor:
    """Antialiased resize of uint8 [3, H, W]."""
    if tuple(image.shape[1:]) == (height, width):
        return image
    # what torchvision.transforms.v2.functional.resize runs, without its 20 microseconds of dispatch
    return F.interpolate(image[None], size=(height, width), mode=mode, antialias=True)[0]


def train_image(image: Tensor, image_size: int, augment: AugmentConfig, rng: Generator) -> Tensor:
    """One augmented training image, uint8 [3, S, S], of uint8 [3, H, W].

    ``rng``: the sample's own random numbers; equal numbers give equal pixels.
    """
    # every draw has its place, so that one setting does not shift the draws of another
    draws: list[float] = rng.random(_DRAWS).tolist()
    if augment.margin:
        image = _on_paper(image, augment.margin, draws[_MARGIN])
    top, left, height, width = _crop_box(image.shape[1], image.shape[2], augment, draws[_CROP])
    image = resize(image[:, top : top + height, left : left + width], image_size, image_size)
    flip, jitter, grey = draws[_CHANCES]
    if flip < augment.hflip:
        image = image.flip(2)
    if jitter < augment.color_jitter_prob:
        image = _colour_jitter(image, augment.color_jitter, draws[_JITTER])
    if grey < augment.grayscale_prob:
        image = transforms.rgb_to_grayscale(image, num_output_channels=3)
    return image


_ATTEMPTS = 10
_CROP = slice(0, 2 * _ATTEMPTS + 2)
_CHANCES = slice(22, 25)
_MARGIN = slice(25, 28)
_JITTER = slice(28, 36)
_DRAWS = 36


def least_side(image_size: int, augment: AugmentConfig) -> int:
    """The shorter side of an image whose every crop is at least ``image_size`` wide and high: what
    ``decode_image`` may reduce it to."""
    narrowest = min(augment.ratio[0], 1 / augment.ratio[1])
    return math.ceil(image_size / math.sqrt(augment.scale[0] * narrowest))


def _on_paper(image: Tensor, most: float, draws: list[float]) -> Tensor:
    """The image somewhere on a larger white sheet."""
    height, width = image.shape[1:]
    more_height, more_width = round(height * most * draws[0]), round(width * most * draws[0])
    top, left = int((more_height + 1) * draws[1]), int((more_width + 1) * draws[2])
    # pixels stay interleaved, as decoders leave them and the resize kernel likes them
    sheet = image.new_full((height + more_height, width + more_width, 3), 255).permute(2, 0, 1)
    sheet[:, top : top + height, left : left + width] = image
    return sheet


def _crop_box(
    height: int, width: int, augment: AugmentConfig, draws: list[float]
) -> tuple[int, int, int, int]:
    """Top, left, height and width, distributed as in torchvision's RandomResizedCrop."""
    least, most = augment.scale
    low, high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for attempt in range(_ATTEMPTS):
        area = height * width * (least + (most - least) * draws[2 * attempt])
        aspect = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            down, right = draws[2 * _ATTEMPTS :]
            return int((height - h + 1) * down), int((width - w + 1) * right), h, w
    if width / height < augment.ratio[0]:
        w, h = width, min(height, max(1, round(width / augment.ratio[0])))
    elif width / height > augment.ratio[1]:
        w, h = min(width, max(1, round(height * augment.ratio[1]))), height
    else:
        w, h = width, height
    return (height - h) // 2, (width - w) // 2, h, w


def _colour_jitter(image: Tensor, strength: tuple[float, float, float, float], draws: list[float]) -> Tensor:
    """Brightness, contrast, saturation and hue changed in a drawn order, as torchvision's ColorJitter."""
    for which in sorted(range(4), key=lambda k: draws[4 + k]):
        amount, draw = strength[which], draws[which]
        if amount == 0:
            continue
        if which == 3:
            image = transforms.adjust_hue(image, amount * (2 * draw - 1))
        else:
            lowest = max(0.0, 1 - amount)
            change = (transforms.adjust_brightness, transforms.adjust_contrast, transforms.adjust_saturation)
            image = change[which](image, lowest + (1 + amount - lowest) * draw)
    return image


def eval_image(
    image: bytes | Tensor,
    image_size: int,
    *,
    resize_mode: ResizeMode = "shortest",
    interpolation: Interpolation = "bicubic",
    fill_color: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """One image as open_clip's evaluation transform makes it, but for its floats: uint8 [3, S, S].

    ``image``: bytes to decode, or uint8 [3, H, W]. ``resize_mode``: shortest side to S and the centre cut out
    ("shortest"), longest side to S and the rest filled with ``fill_color`` ("longest"), or both sides to S
    ("squash"). Raises DecodeError.
    """
    if isinstance(image, bytes):
        image = decode_image(image, max_pixels=max_pixels)
    height, width = image.shape[1:]
    if resize_mode == "squash":
        return resize(image, image_size, image_size, mode=interpolation).contiguous()
    if resize_mode == "shortest":
        short = min(height, width)
        target = [image_size if side == short else int(image_size * side / short) for side in (height, width)]
    else:
        ratio = max(height / image_size, width / image_size)
        target = [max(1, round(side / ratio)) for side in (height, width)]
    image = resize(image, *target, mode=interpolation)
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
