"""Decoding and crop in one: the crop that was drawn, on the grid that is decoded, in every decoder alike."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from numpy.random import Generator, Philox
from PIL import Image, ImageOps
from torch import Tensor

from diptych.data import decode
from diptych.data.augment import AugmentConfig, train_image
from diptych.data.decode import DecodeError, decode_image, train_pixels

from .images import icon, photo, planes, stored, turned

MANY = 10**8
OPEN_CLIPS = AugmentConfig()
EVERYTHING = AugmentConfig(
    scale=(0.2, 1.0),
    margin=0.3,
    hflip=0.5,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    grayscale_prob=0.2,
)


def rng(number: int) -> Generator:
    return Generator(Philox(key=[1, 0], counter=[0, number, 0, 0]))


def made(data: bytes, size: int, augment: AugmentConfig, number: int = 0) -> Tensor:
    image = train_pixels(data, size, augment, rng(number), max_pixels=MANY)
    assert (image.shape, image.dtype, image.is_contiguous()) == ((3, size, size), torch.uint8, True)
    return image


@pytest.fixture(params=["fast", "Pillow"])
def decoder(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "Pillow":
        monkeypatch.setattr(decode, "simplejpeg", None)
    return request.param


@pytest.mark.parametrize("augment", [OPEN_CLIPS, EVERYTHING])
@pytest.mark.parametrize("orientation", [1, 2, 5, 6, 8])
def test_it_is_the_crop_of_the_decoded_image(augment: AugmentConfig, orientation: int, decoder: str) -> None:
    for i in range(8):
        pictures = [
            turned(icon(i), "PNG", orientation),
            turned(photo(90, 61, i), "JPEG", orientation),  # too small to be reduced
            turned(photo(90, 61, i), "WEBP", orientation),
            turned(photo(300, 200, i), "PNG", orientation),
        ]
        for data in pictures:
            whole = decode_image(data, max_pixels=MANY)
            assert torch.equal(made(data, 64, augment, i), train_image(whole, 64, augment, rng(i)))


@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_turned_images_give_the_pixels_of_upright_ones(margin: float) -> None:
    augment = AugmentConfig(scale=(0.3, 1.0), margin=margin)
    for orientation in range(1, 9):
        stored_way = photo(75, 50, orientation)
        data = turned(stored_way, "PNG", orientation)
        upright = stored(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert torch.equal(made(data, 32, augment, orientation), made(upright, 32, augment, orientation))


def coordinates(width: int, height: int) -> bytes:
    """A JPEG of its own coordinates: red rises to the right, green downwards."""
    y, x = np.mgrid[:height, :width]
    pixels = np.dstack([x * 255 / (width - 1), y * 255 / (height - 1), 0 * x])
    return stored(Image.fromarray(pixels.round().astype(np.uint8)), "JPEG", quality=95, subsampling=0)


def reductions(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The factors by which images are reduced from now on."""
    seen: list[int] = []
    inner = decode._decode  # type: ignore[reportPrivateUsage]  its inside is what is tested

    def watched(data: bytes, header: Any, shrink: int) -> Any:
        seen.append(shrink)
        return inner(data, header, shrink)

    monkeypatch.setattr(decode, "_decode", watched)
    return seen


@pytest.mark.parametrize("orientation", [1, 6])
def test_every_crop_is_decoded_as_small_as_covers_it(
    orientation: int, decoder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = AugmentConfig(scale=(0.05, 1.0))
    seen = reductions(monkeypatch)
    picture = Image.open(io.BytesIO(coordinates(403, 301)))
    data = turned(picture, "JPEG", orientation, quality=95, subsampling=0)
    sides: dict[int, list[float]] = {}
    for i in range(150):
        image = made(data, 40, augment, i).float()
        span = [float(image[c].max() - image[c].min()) / 255 for c in (0, 1)]
        sides.setdefault(seen[-1], []).append(min(span[0] * 403, span[1] * 301))
    assert sides.keys() == {1, 2, 4}
    for factor, shortest in sides.items():
        assert min(shortest) > 40 * factor - 6 * factor  # the rims of the crop are smoothed
        assert factor == 4 or max(shortest) < 2 * 40 * factor + 6


def test_reduced_or_not_the_crop_is_the_same_place(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = coordinates(403, 301)
    augment = AugmentConfig(scale=(0.3, 1.0))
    seen = reductions(monkeypatch)
    for i in range(40):
        reduced = made(data, 56, augment, i)
        full = train_image(planes(Image.open(io.BytesIO(data))), 56, augment, rng(i))
        # the edge of a box is its place and its length, both in whole pixels of the grid
        assert (reduced.float() - full.float()).abs().max() <= 2 * 255 * seen[-1] / 301 + 3
    assert set(seen) == {2, 4}


@pytest.mark.parametrize("size", [(640, 480), (403, 301), (90, 61), (17, 160)])
def test_both_decoders_crop_the_same_box(
    size: tuple[int, int], require: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    require(decode.simplejpeg is not None, "simplejpeg is not installed")
    data = turned(photo(*size), "JPEG", 8, quality=90)
    for augment in (OPEN_CLIPS, AugmentConfig(scale=(0.1, 1.0), margin=0.2)):
        fast = [made(data, 48, augment, i) for i in range(12)]
        with monkeypatch.context() as patch:
            patch.setattr(decode, "simplejpeg", None)
            slow = [made(data, 48, augment, i) for i in range(12)]
        for one, two in zip(fast, slow, strict=True):
            assert (one.int() - two.int()).abs().max() <= 2


def test_pixels_are_near_pillows_crop_and_resize(decoder: str) -> None:
    """Of the box that Pillow is told in whole pixels of the grid, which nothing rounds."""
    whole = AugmentConfig(scale=(1.0, 1.0), ratio=(1.0, 1.0))
    for side, factor in ((300, 1), (600, 2), (1300, 4)):
        image = photo(side, side)
        data = stored(image, "JPEG", quality=95)
        truth = Image.open(io.BytesIO(data)).resize((224, 224), Image.Resampling.BICUBIC)
        error = (made(data, 224, whole).float() - planes(truth).float()).pow(2).mean()
        assert 10 * torch.log10(255**2 / error) > (60 if factor == 1 else 40)


def test_pixels_do_not_depend_on_the_number_of_threads() -> None:
    pictures = [stored(photo(640, 480), "JPEG"), turned(photo(90, 70), "JPEG", 7), stored(icon(4))]
    threads = torch.get_num_threads()
    try:
        runs: list[list[Tensor]] = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            runs.append([made(data, 48, EVERYTHING, i) for i in range(15) for data in pictures])
    finally:
        torch.set_num_threads(threads)
    for first, *others in zip(*runs, strict=True):
        assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("size", [(1, 1), (1, 90), (90, 1), (2, 3), (7, 9)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_tiny_and_narrow_images_pass(size: tuple[int, int], kind: str, decoder: str) -> None:
    data = stored(photo(*size) if min(size) > 4 else Image.new("RGB", size, (7, 7, 7)), kind)
    for augment in (OPEN_CLIPS, EVERYTHING):
        for target in (1, 3, 16):
            made(data, target, augment)


def test_damage_and_size_are_told_as_in_decoding(decoder: str) -> None:
    data = stored(photo(640, 480), "JPEG")
    with pytest.raises(DecodeError, match="damaged") as caught:
        made(data[:-9], 64, OPEN_CLIPS)
    assert caught.value.reason == "decode"
    with pytest.raises(DecodeError, match="640 x 480 pixels are too many") as caught:
        train_pixels(data, 64, OPEN_CLIPS, rng(0), max_pixels=640 * 480 - 1)
    assert caught.value.reason == "size"
    with pytest.raises(DecodeError, match="neither JPEG"):
        made(b"GIF89a", 64, OPEN_CLIPS)
