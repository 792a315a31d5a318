"""Augmentation of training images, keyed by the sample: the same pixels on any number of ranks and workers.

What is not exact by nature is kept out: arithmetic runs element by element, in an order that no thread count
changes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn import functional as F

from ..configs.load import StrictModel

__all__ = ["AugmentConfig", "Box", "crop_box", "cut", "draw", "finish", "train_image"]

Bytes = NDArray[np.uint8]

# every draw of a sample has its place, so that one setting does not shift the draws of another
_ATTEMPTS = 10
_CROP = slice(0, 2 * _ATTEMPTS + 2)
_CHANCES = slice(22, 25)
_MARGIN = slice(25, 28)
_JITTER = slice(28, 36)
_DRAWS = 36

Matrix = tuple[float, ...]  # nine numbers, row by row

_UNIT: Matrix = (1, 0, 0, 0, 1, 0, 0, 0, 1)
_GREY: Matrix = (0.299, 0.587, 0.114) * 3  # luma of Rec. 601, as in torchvision
# hueRotate of SVG (W3C, Filter Effects, feColorMatrix): L + cos (I - L) + sin K
_HUE_L: Matrix = (0.213, 0.715, 0.072) * 3
_HUE_K: Matrix = (-0.213, -0.715, 0.928, 0.143, 0.140, -0.283, -0.787, 0.715, 0.072)


class AugmentConfig(StrictModel):
    """What is done to training images. The defaults are open_clip's."""

    scale: tuple[float, float] = (0.9, 1.0)
    """Area of the random crop as a fraction of the image, least and most."""
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio of the crop, least and most."""
    margin: float = Field(default=0.0, ge=0, le=1)
    """White added around the image before the crop, at most this fraction of its size on each axis; how much
    and on which side is drawn. For icons, whose sets leave different margins."""
    hflip: float = Field(default=0.0, ge=0, le=1)
    """Probability of a mirror image; captions that say left or right forbid it."""
    color_jitter: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    """Strength of brightness, contrast, saturation and hue changes, drawn as in torchvision's ColorJitter:
    factors from 1 - x to 1 + x in a random order, hue by up to x turns."""
    color_jitter_prob: float = Field(default=0.0, ge=0, le=1)
    """Probability of colour jitter."""
    grayscale_prob: float = Field(default=0.0, ge=0, le=1)
    """Probability of a grey image."""

    @model_validator(mode="after")
    def _ordered(self) -> "AugmentConfig":
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"scale: {list(self.scale)} must be two rising numbers in (0, 1]")
        if not 0 < self.ratio[0] <= self.ratio[1] < math.inf:
            raise ValueError(f"ratio: {list(self.ratio)} must be two rising positive numbers")
        if not all(0 <= x < math.inf for x in self.color_jitter) or self.color_jitter[3] > 0.5:
            raise ValueError(f"color_jitter: {list(self.color_jitter)} must not be negative, hue at most 0.5")
        if self.color_jitter_prob and not any(self.color_jitter):
            raise ValueError("color_jitter_prob is set, but color_jitter changes nothing; give it strengths")
        return self


class Box(NamedTuple):
    """What is cut out of an image, in its pixels. With a margin it may reach over the edges, onto white."""

    top: int
    left: int
    height: int
    width: int


def train_image(image: Tensor, image_size: int, augment: AugmentConfig, rng: Generator) -> Tensor:
    """One augmented training image, uint8 [3, S, S], of uint8 [3, H, W].

    ``rng``: the sample's own random numbers; equal numbers give equal pixels.
    """
    numbers = draw(rng)
    pixels: Bytes = image.permute(1, 2, 0).numpy()  # interleaved, as decoders leave them
    box = crop_box(pixels.shape[0], pixels.shape[1], augment, numbers)
    return finish(cut(pixels, box), image_size, augment, numbers)


def draw(rng: Generator) -> list[float]:
    """All random numbers that a sample's augmentation takes."""
    return rng.random(_DRAWS).tolist()


def cut(pixels: Bytes, box: Box) -> Bytes:
    """The box of uint8 [H, W, 3]: a view, or a copy with white where it reaches over the edges."""
    top, left, height, width = box
    inner = pixels[max(0, top) : max(0, top + height), max(0, left) : max(0, left + width)]
    if inner.shape[:2] == (height, width):
        return inner
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)
    down, right = max(0, -top), max(0, -left)
    sheet[down : down + inner.shape[0], right : right + inner.shape[1]] = inner
    return sheet


def finish(pixels: Bytes, image_size: int, augment: AugmentConfig, draws: list[float]) -> Tensor:
    """The crop uint8 [H, W, 3] resized, and mirrored and recoloured as drawn: uint8 [3, S, S]."""
    planes = _resize(pixels, image_size)
    flip, jitter, grey = draws[_CHANCES]
    if flip < augment.hflip:
        planes = planes[:, :, ::-1]
    planes = np.ascontiguousarray(planes)
    jittered, greyed = jitter < augment.color_jitter_prob, grey < augment.grayscale_prob
    if jittered or greyed:
        strength = augment.color_jitter if jittered else (0.0, 0.0, 0.0, 0.0)
        planes = _recolour(planes, *_colour_map(planes, strength, greyed, draws[_JITTER]))
    return torch.from_numpy(planes)


def crop_box(height: int, width: int, augment: AugmentConfig, draws: list[float]) -> Box:
    """The crop of an image: somewhere on the white sheet on which it lies somewhere, if there is a margin."""
    if not augment.margin:
        return _random_crop(height, width, augment, draws[_CROP])
    most, (size, down, right) = augment.margin, draws[_MARGIN]
    more_height, more_width = round(height * most * size), round(width * most * size)
    top, left, *sides = _random_crop(height + more_height, width + more_width, augment, draws[_CROP])
    return Box(top - int((more_height + 1) * down), left - int((more_width + 1) * right), *sides)


def _random_crop(height: int, width: int, augment: AugmentConfig, draws: list[float]) -> Box:
    """Distributed as in torchvision's RandomResizedCrop."""
    least, most = augment.scale
    low, high = math.log(augment.ratio[0]), math.log(augment.ratio[1])
    for attempt in range(_ATTEMPTS):
        area = height * width * (least + (most - least) * draws[2 * attempt])
        aspect = math.exp(low + (high - low) * draws[2 * attempt + 1])
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            down, right = draws[2 * _ATTEMPTS :]
            return Box(int((height - h + 1) * down), int((width - w + 1) * right), h, w)
    if width / height < augment.ratio[0]:
        w, h = width, min(height, max(1, round(width / augment.ratio[0])))
    elif width / height > augment.ratio[1]:
        w, h = min(width, max(1, round(height * augment.ratio[1]))), height
    else:
        w, h = width, height
    return Box((height - h) // 2, (width - w) // 2, h, w)


def _resize(pixels: Bytes, size: int) -> Bytes:
    """uint8 [H, W, 3] to [3, size, size], bicubic and antialiased: the fastest kernel on a CPU, within two
    steps of 255 of Pillow's."""
    if pixels.shape[:2] == (size, size):
        return pixels.transpose(2, 0, 1).copy()
    # what torchvision.transforms.v2.functional.resize runs, without its 20 microseconds of dispatch
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return F.interpolate(batch, size=(size, size), mode="bicubic", antialias=True)[0].numpy()


def _colour_map(
    planes: Bytes, strength: tuple[float, float, float, float], grey: bool, draws: list[float]
) -> tuple[Matrix, float]:
    """All colour changes as one affine map of RGB: a matrix, and what is added to each channel.

    Each change is affine by itself, so composing them costs one pass over the pixels instead of fifty; unlike
    torchvision's it clips once, at the end, and turns hue by a rotation instead of through HSV. Every change
    keeps grey on the grey axis, which is why the addend stays one number.
    """
    matrix, shift = _UNIT, 0.0
    for which in sorted(range(4), key=lambda k: draws[4 + k]):
        if strength[which] == 0:
            continue
        low = -strength[3] if which == 3 else max(0.0, 1 - strength[which])
        high = strength[3] if which == 3 else 1 + strength[which]
        amount = low + (high - low) * draws[which]
        if which == 0:
            matrix, shift = tuple(amount * m for m in matrix), amount * shift
        elif which == 1:  # towards the mean grey of the image as it is by now
            sums = planes.reshape(3, -1).sum(axis=1, dtype=np.int64).tolist()
            luma = _times(_GREY, matrix)[:3]
            mean = sum(m * x for m, x in zip(luma, sums, strict=True)) / (planes.size // 3)
            shift = amount * shift + (1 - amount) * (mean + shift)
            matrix = tuple(amount * m for m in matrix)
        elif which == 2:
            matrix = _times(
                [amount * i + (1 - amount) * g for i, g in zip(_UNIT, _GREY, strict=True)], matrix
            )
        else:
            cos, sin = math.cos(2 * math.pi * amount), math.sin(2 * math.pi * amount)
            parts = zip(_UNIT, _HUE_L, _HUE_K, strict=True)
            matrix = _times([el + cos * (i - el) + sin * k for i, el, k in parts], matrix)
    return (_times(_GREY, matrix) if grey else matrix), shift


def _times(left: Sequence[float], right: Sequence[float]) -> Matrix:
    """The product of two 3 x 3 matrices: in numpy, three such would take longer than all their pixels."""
    a, b, c, d, e, f, g, h, i = right
    rows = (left[:3], left[3:6], left[6:])
    return tuple(
        v for x, y, z in rows for v in (x * a + y * d + z * g, x * b + y * e + z * h, x * c + y * f + z * i)
    )


def _recolour(planes: Bytes, matrix: Matrix, shift: float) -> Bytes:
    """``matrix @ rgb + shift`` of every pixel, rounded and clipped; planes uint8 [3, H, W]."""
    rgb = planes.astype(np.float32)
    m = np.array(matrix, dtype=np.float32).reshape(3, 3, 1, 1)
    # no matrix product: its rounding may depend on the number of threads
    out = rgb[0] * m[:, 0]
    out += rgb[1] * m[:, 1]
    out += rgb[2] * m[:, 2]
    out += np.float32(shift + 0.5)
    np.clip(out, 0, 255, out=out)
    return out.astype(np.uint8)
