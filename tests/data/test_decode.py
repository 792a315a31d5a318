"""Decoding against Pillow and open_clip's own transform; what is damaged, too large or no image is refused
in words."""

import io
import struct
import warnings
import zlib
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from diptych.data import decode
from diptych.data.decode import DecodeError, decode_image, eval_image

from .images import photo, planes, stored

MANY = 10**8


@pytest.mark.parametrize(
    ("kind", "options"), [("PNG", {}), ("JPEG", {"quality": 90}), ("WEBP", {"quality": 80})]
)
@pytest.mark.parametrize("fast", [True, False])
def test_pixels_are_pillows(
    kind: str, options: dict[str, Any], fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    data = stored(photo(83, 61), kind, **options)
    image = decode_image(data, max_pixels=MANY)
    assert image.dtype == torch.uint8
    assert torch.equal(image, planes(Image.open(io.BytesIO(data)).convert("RGB")))


def on_white(rgba: NDArray[np.uint8]) -> NDArray[np.float64]:
    alpha = rgba[..., 3:].astype(float) / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


def test_transparency_lies_on_white() -> None:
    rng = np.random.default_rng(1)
    rgba = rng.integers(0, 256, (12, 15, 4), dtype=np.uint8)
    got = decode_image(stored(Image.fromarray(rgba)), max_pixels=MANY).permute(1, 2, 0).numpy()
    assert np.abs(got - on_white(rgba)).max() <= 1
    grey = rng.integers(0, 256, (12, 15, 2), dtype=np.uint8)
    got = decode_image(stored(Image.fromarray(grey, "LA")), max_pixels=MANY).permute(1, 2, 0).numpy()
    assert np.abs(got - on_white(grey[..., [0, 0, 0, 1]])).max() <= 1
    lossless = stored(Image.fromarray(rgba), "WEBP", lossless=True, exact=True)
    got = decode_image(lossless, max_pixels=MANY).permute(1, 2, 0).numpy()
    assert np.abs(got - on_white(rgba)).max() <= 1


def test_palettes_and_colour_keys_may_be_transparent_too() -> None:
    indexed = Image.new("P", (2, 1))
    indexed.putpalette([10, 20, 30, 200, 100, 50])
    indexed.putpixel((1, 0), 1)
    opaque = decode_image(stored(indexed), max_pixels=MANY)
    assert opaque[:, 0].T.tolist() == [[10, 20, 30], [200, 100, 50]]
    keyed = decode_image(stored(indexed, transparency=1), max_pixels=MANY)
    assert keyed[:, 0].T.tolist() == [[10, 20, 30], [255, 255, 255]]
    rgb = Image.new("RGB", (2, 1), (1, 2, 3))
    rgb.putpixel((0, 0), (9, 9, 9))
    assert decode_image(stored(rgb, transparency=(9, 9, 9)), max_pixels=MANY)[:, 0].T.tolist() == [
        [255, 255, 255],
        [1, 2, 3],
    ]


def test_grey_bits_deep_grey_and_cmyk_become_rgb() -> None:
    levels = np.array([[0, 255, 256, 65535]], dtype=np.uint16)
    assert (
        decode_image(stored(Image.fromarray(levels)), max_pixels=MANY)[:, 0].tolist() == [[0, 0, 1, 255]] * 3
    )
    bits = Image.fromarray(np.array([[0, 255]], dtype=np.uint8)).convert("1")
    assert decode_image(stored(bits), max_pixels=MANY)[:, 0].tolist() == [[0, 255]] * 3
    grey = photo(40, 30).convert("L")
    for kind in ("PNG", "JPEG"):
        data = stored(grey, kind)
        assert torch.equal(
            decode_image(data, max_pixels=MANY), planes(Image.open(io.BytesIO(data)).convert("RGB"))
        )
    cmyk = stored(photo(40, 30).convert("CMYK"), "JPEG")
    truth = planes(Image.open(io.BytesIO(cmyk)).convert("RGB"))
    assert (decode_image(cmyk, max_pixels=MANY).int() - truth.int()).abs().max() <= 1


@pytest.mark.parametrize("fast", [True, False])
def test_jpegs_shrink_while_decoding_only_as_far_as_told(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    image = photo(400, 304)
    data = stored(image, "JPEG", quality=95)
    for least, factor in [(None, 1), (305, 1), (153, 1), (152, 2), (77, 2), (76, 4), (38, 8), (9, 8)]:
        got = decode_image(data, max_pixels=MANY, least=least)
        assert tuple(got.shape[1:]) == (304 // factor, 400 // factor)
        near = planes(image.resize((400 // factor, 304 // factor), Image.Resampling.BOX))
        assert (got.float() - near.float()).abs().mean() < 3
    odd = stored(photo(403, 301), "JPEG")
    assert decode_image(odd, max_pixels=MANY, least=37).shape == (3, 38, 51)
    assert decode_image(stored(image), max_pixels=MANY, least=10).shape == (3, 304, 400)  # a PNG does not


def test_both_jpeg_decoders_agree(require: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    require(decode.simplejpeg is not None, "simplejpeg is not installed")
    for least in (None, 40):
        data = stored(photo(403, 301), "JPEG", quality=92)
        fast = decode_image(data, max_pixels=MANY, least=least)
        with monkeypatch.context() as patch:
            patch.setattr(decode, "simplejpeg", None)
            slow = decode_image(data, max_pixels=MANY, least=least)
        assert (fast.int() - slow.int()).abs().max() <= 1


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("fast", [True, False])
def test_cut_images_are_damaged(kind: str, fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    data = stored(photo(60, 50), kind)
    for part in (0.98, 0.5, 0.1, 0.02):
        with pytest.raises(DecodeError) as caught:
            decode_image(data[: int(len(data) * part)], max_pixels=MANY)
        assert caught.value.reason == "decode"


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",  # Pillow alone would start a program
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        stored(photo(9, 9), "GIF"),
        stored(photo(9, 9), "TIFF"),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"\xff\xd8\xff\xe0" + bytes(100),
        b"RIFF\x00\x00\x00\x00WEBPVP8 " + bytes(100),
    ],
)
def test_what_is_no_jpeg_png_or_webp_is_refused(data: bytes) -> None:
    with pytest.raises(DecodeError) as caught:
        decode_image(data, max_pixels=MANY)
    assert caught.value.reason == "decode"


def bomb(width: int, height: int) -> bytes:
    """A small PNG that claims to be huge."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


def test_pixels_are_counted_before_they_are_decoded() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for size in [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (10_000, 10_001)]:
            with pytest.raises(DecodeError, match="too many") as caught:
                decode_image(bomb(*size), max_pixels=MANY)
            assert caught.value.reason == "size"
    data = stored(photo(30, 20))
    assert decode_image(data, max_pixels=600).shape == (3, 20, 30)
    with pytest.raises(DecodeError):
        decode_image(data, max_pixels=599)


SIZES = [
    (64, 64),
    (100, 37),
    (37, 100),
    (17, 201),
    (201, 17),
    (224, 224),
    (64, 48),
    (33, 32),
    (32, 33),
    (9, 9),
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_evaluation_sees_what_open_clips_transform_makes(size: tuple[int, int], resize_mode: Any) -> None:
    for interpolation, fill in (("bicubic", 0), ("bilinear", 128)):
        transform = open_clip.image_transform(
            32,
            is_train=False,
            mean=(0, 0, 0),
            std=(1, 1, 1),
            resize_mode=resize_mode,
            interpolation=interpolation,
            fill_color=fill,
        )
        image = photo(*size, seed=sum(size))
        truth: Any = transform(image)
        got = eval_image(
            stored(image), 32, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill
        )
        assert (got.dtype, got.shape, got.is_contiguous()) == (torch.uint8, (3, 32, 32), True)
        assert torch.equal(got, (255 * truth).round().to(torch.uint8))
        assert torch.equal(
            got,
            eval_image(
                planes(image), 32, resize_mode=resize_mode, interpolation=interpolation, fill_color=fill
            ),
        )


def test_an_image_of_the_right_size_passes_unchanged() -> None:
    image = planes(photo(32, 32))
    assert torch.equal(eval_image(image, 32), image)


def test_evaluation_keeps_to_the_limit_of_pixels() -> None:
    with pytest.raises(DecodeError, match="30 x 20"):
        eval_image(stored(photo(30, 20)), 8, max_pixels=599)
