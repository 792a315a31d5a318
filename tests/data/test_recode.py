"""Images made smaller and re-encoded while shards are built, against Pillow and against their own bytes."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.configs.errors import UserError
from diptych.data.build import build_shards
from diptych.data.decode import decode_image
from diptych.data.image_header import MAX_PIXELS, read_header
from diptych.data.recode import Recode, recode
from diptych.data.shards import RawSample

from .images import photo
from .pictures import encoded
from .test_build import read_all, table


def made(data: bytes, **wish: Any) -> bytes:
    return recode(data, read_header(data), Recode(**wish), max_pixels=MAX_PIXELS)


def pixels(data: bytes) -> np.ndarray:
    return decode_image(data, max_pixels=MAX_PIXELS).permute(1, 2, 0).numpy().astype(float)


def psnr(one: np.ndarray, two: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / max(np.mean((one - two) ** 2), 1e-9)))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_what_is_as_wished_stays_byte_for_byte(kind: str) -> None:
    data = encoded(photo(60, 40), kind)
    own = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp"}[kind]
    for wish in (
        {},
        {"image_size": 40},
        {"image_size": 500},
        {"format": own},
        {"format": own, "image_size": 41},
    ):
        assert made(data, **wish) is data
    if kind == "PNG":
        assert made(data, quality=50) is data  # it has none


@pytest.mark.parametrize("size", [(600, 400), (401, 903), (500, 500), (3000, 17)])
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_the_shorter_side_is_what_was_asked_for(size: tuple[int, int], kind: str) -> None:
    source = photo(*size)
    target = min(size) // 3
    data = made(encoded(source, kind), image_size=target)
    scale = target / min(size)
    expected = (round(size[0] * scale), round(size[1] * scale))
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, image.format) == (expected, kind)
    reference = np.asarray(source.resize(expected, Image.Resampling.LANCZOS), dtype=float)
    assert psnr(pixels(data), reference) > (33 if target > 10 else 15)
    assert made(encoded(source, kind), image_size=target) == data


@pytest.mark.parametrize("kind", ["jpg", "png", "webp"])
def test_formats_are_changed_and_quality_counts(kind: Any) -> None:
    source = photo(120, 90)
    data = made(encoded(source), format=kind, quality=90)
    assert read_header(data).format == kind
    assert psnr(pixels(data), pixels(encoded(source))) > 32
    if kind != "png":
        assert len(made(encoded(source), format=kind, quality=20)) < len(data)


def test_pixels_are_those_that_training_sees() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    turned = encoded(photo(90, 60), exif=exif.tobytes())
    data = made(turned, image_size=30, format="png")
    with Image.open(io.BytesIO(data)) as image:
        assert (image.size, 0x0112 in image.getexif()) == ((30, 45), False)
    assert np.array_equal(pixels(made(turned, format="png")), pixels(turned))
    clear = encoded(Image.new("RGBA", (50, 40), (255, 0, 0, 0)), "PNG")
    assert (pixels(made(clear, image_size=20)) == 255).all()
    inks = encoded(Image.new("CMYK", (50, 40), (0, 255, 255, 0)))
    assert np.allclose(pixels(made(inks, format="png")), pixels(inks))


def test_a_picture_that_the_format_cannot_hold_is_a_bad_row(tmp_path: Path) -> None:
    Image.new("L", (17000, 2)).save(tmp_path / "wide.png")
    photo(20, 20).save(tmp_path / "ok.png")
    (tmp_path / "cut.png").write_bytes(encoded(photo(60, 60), "PNG")[:-500])
    rows = [{"image": name, "caption": name} for name in ("wide.png", "ok.png", "cut.png")]
    report = build_shards(
        [table(tmp_path / "t.csv", rows)],
        tmp_path / "out",
        recode=Recode(format="webp"),
        max_bad_fraction=0.9,
        decode=False,
    )
    assert [(bad["row"], bad["reason"]) for bad in report.bad] == [(1, "decode"), (3, "decode")]
    assert report.bad[0]["detail"] == "17000 x 2 pixels cannot be written as webp"


def test_a_build_keeps_small_images_and_makes_large_ones_smaller(tmp_path: Path) -> None:
    names = []
    for number, size in enumerate([(300, 200), (64, 64), (50, 400)]):
        photo(*size, seed=number).save(tmp_path / f"{number}.jpg")
        names.append(f"{number}.jpg")
    source = table(tmp_path / "t.csv", [{"image": name, "caption": name} for name in names])
    build_shards([source], tmp_path / "out", recode=Recode(image_size=64))
    got: list[RawSample] = read_all(tmp_path / "out")
    assert [read_header(raw.image).width for raw in got] == [96, 64, 50]
    assert [raw.image == (tmp_path / name).read_bytes() for raw, name in zip(got, names, strict=True)] == [
        False, True, True
    ]  # fmt: skip


def test_the_same_images_are_held_back_at_any_size(tmp_path: Path) -> None:
    rows = []
    for number in range(20):
        photo(90, 60, seed=number).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "caption": f"{number}"})
    source = table(tmp_path / "t.csv", rows)
    held: list[list[str]] = []
    for out, wish in (("a", Recode()), ("b", Recode(image_size=20)), ("c", Recode(format="jpg", quality=50))):
        build_shards([source], tmp_path / out, recode=wish, val_fraction=0.4)
        held.append([raw.caption for raw in read_all(tmp_path / out / "val")])
    assert held[0] == held[1] == held[2]


def test_wishes_that_make_no_sense_are_one_sentence() -> None:
    with pytest.raises(UserError, match="--quality 101 must be from 1 to 100"):
        Recode(quality=101)
    with pytest.raises(UserError, match="--image-size 0 must be at least 1"):
        Recode(image_size=0)
