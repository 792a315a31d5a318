"""Decoding against Pillow and open_clip's own transform; what is damaged, too large or no image is refused
in words."""

import io
import struct
import warnings
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diptych.data import decode
from diptych.data.decode import DecodeError, decode_image, eval_image

from .images import chunk, photo, planes, png, stored, turned

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


DEPTHS = [
    *((depth, 0) for depth in (1, 2, 4, 8, 16)),
    *((depth, 3) for depth in (1, 2, 4, 8)),
    *((depth, colour) for depth in (8, 16) for colour in (2, 4, 6)),
]


@pytest.mark.parametrize(("depth", "colour"), DEPTHS)
@pytest.mark.parametrize("keyed", [False, True])
def test_pngs_of_every_kind_are_what_their_numbers_say(depth: int, colour: int, keyed: bool) -> None:
    """Against the standard's arithmetic: samples to eight bits, colour keys at the file's depth."""
    rng = np.random.default_rng(depth * 8 + colour)
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    values = rng.integers(0, 2**depth, (6, 8, channels))
    bits = (values.reshape(6, -1, 1) >> np.arange(depth)[::-1]) & 1
    rows = np.packbits(bits.reshape(6, -1).astype(np.uint8), axis=1).tobytes()
    palette = rng.integers(0, 256, (2 ** min(depth, 8), 4), dtype=np.uint8)
    more: list[bytes] = []
    levels = values >> 8 if depth == 16 else values * 255 // (2**depth - 1)
    rgb, alpha = levels[..., [0, 0, 0]], np.full((6, 8), 255)
    if colour in (2, 6):
        rgb = levels[..., :3]
    if colour in (4, 6):
        alpha = levels[..., -1]
    if colour == 3:
        rgb = palette[values[..., 0], :3]
        more.append(chunk(b"PLTE", palette[:, :3].tobytes()))
        if keyed:
            more.append(chunk(b"tRNS", palette[:-1, 3].tobytes()))  # what it leaves out is opaque
            alpha = np.append(palette[:-1, 3], 255)[values[..., 0]]
    elif keyed and colour in (0, 2):
        key = values[2, 3]
        more.append(chunk(b"tRNS", struct.pack(f">{channels}H", *key)))
        alpha = np.where((values == key).all(-1), 0, 255)
    got = decode_image(png(8, 6, depth, colour, rows, *more), max_pixels=MANY).permute(1, 2, 0).numpy()
    assert np.abs(got - on_white(np.dstack([rgb, alpha]))).max() <= 1
    if alpha.min() == 255:
        assert np.array_equal(got, rgb)


def test_grey_jpegs_are_pillows() -> None:
    data = stored(photo(40, 30).convert("L"), "JPEG")
    truth = planes(Image.open(io.BytesIO(data)).convert("RGB"))
    assert torch.equal(decode_image(data, max_pixels=MANY), truth)


def without_adobe(jpeg: bytes) -> bytes:
    at = jpeg.index(b"\xff\xee")
    return jpeg[:at] + jpeg[at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big") :]


@pytest.mark.parametrize("fast", [True, False])
def test_printers_colours_inverted_by_adobe_or_not(fast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    y, x = np.mgrid[:32, :48]
    ink = np.dstack([x * 5, y * 7, 255 - x * 5, y * 3]).astype(np.uint8)
    truth = (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255
    inverted = stored(Image.fromarray(ink, "CMYK"), "JPEG", quality=100)
    straight = without_adobe(stored(Image.fromarray(255 - ink, "CMYK"), "JPEG", quality=100))
    for data in (inverted, straight):
        got = decode_image(data, max_pixels=MANY).permute(1, 2, 0).numpy()
        assert np.abs(got - truth).max() <= 4


def test_printers_colours_as_luma_and_chroma(require: Any) -> None:
    require(decode.simplejpeg is not None, "simplejpeg is not installed")
    encode: Any = decode.simplejpeg
    y, x = np.mgrid[:32, :48]
    ink = np.dstack([x * 5, y * 7, 255 - x * 5, y * 3]).astype(np.uint8)
    data = encode.encode_jpeg(255 - ink, quality=100, colorspace="CMYK")  # YCCK, with Adobe's mark
    got = decode_image(data, max_pixels=MANY).permute(1, 2, 0).numpy()
    assert np.abs(got - (255.0 - ink[..., :3]) * (255.0 - ink[..., 3:]) / 255).max() <= 6


@pytest.mark.parametrize("kind", ["PNG", "WEBP"])
def test_of_moving_pictures_the_first_is_taken(kind: str) -> None:
    frames = [photo(40, 30, seed) for seed in range(3)]
    data = stored(frames[0], kind, save_all=True, append_images=frames[1:], lossless=True, duration=40)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert torch.equal(decode_image(data, max_pixels=MANY), planes(frames[0]))


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("fast", [True, False])
def test_images_are_turned_as_exif_asks(
    orientation: int, kind: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    data = turned(photo(83, 61), kind, orientation)
    truth = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = decode_image(data, max_pixels=MANY)
    assert torch.equal(image, planes(truth))
    assert image.stride()[0] == 1  # interleaved: what the resizing takes without a copy
    assert torch.equal(eval_image(data, 32), eval_image(planes(truth), 32))
    if kind == "JPEG":
        height, width = decode_image(data, max_pixels=MANY, least=30).shape[1:]
        assert (width, height) == tuple(-(-side // 2) for side in truth.size)


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


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_jpeg_that_lacks_its_last_bytes_is_damaged(
    options: dict[str, Any], mode: str, fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fast:
        monkeypatch.setattr(decode, "simplejpeg", None)
    data = stored(photo(70, 50).convert(mode), "JPEG", **options)
    decode_image(data + b"what follows is no part of it", max_pixels=MANY)
    for end in [*range(len(data) - 40, len(data)), *range(2, len(data), 37)]:
        for least in (None, 10):
            with pytest.raises(DecodeError):
                decode_image(data[:end], max_pixels=MANY, least=least)


def test_a_header_that_lies_about_the_size_is_damage(monkeypatch: pytest.MonkeyPatch) -> None:
    data = stored(photo(70, 50), "JPEG")
    frame = data.index(b"\xff\xc0")
    twice = data[:frame] + data[frame : frame + 5] + struct.pack(">HH", 9, 9) + data[frame + 9 : frame + 19]
    for fast in (True, False):
        if not fast:
            monkeypatch.setattr(decode, "simplejpeg", None)
        with pytest.raises(DecodeError, match="damaged"):
            decode_image(twice + data[frame:], max_pixels=MANY)


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
    small = png(1, 1, 8, 2, bytes(3))
    start = small[:8] + chunk(b"IHDR", struct.pack(">II", width, height) + small[24:29])
    return start + small[33:]


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
