"""Sizes from headers, compared with Pillow's."""

import io
import struct
import warnings
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from diptych.data.image_header import FORMATS, HeaderError, ImageHeader, read_header

from .samples import picture


def saved(mode: str, size: tuple[int, int], kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, format=kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [
        ("PNG", "RGB", {}),
        ("PNG", "P", {}),
        ("PNG", "RGBA", {}),
        ("PNG", "I;16", {}),
        ("JPEG", "RGB", {}),
        ("JPEG", "L", {}),
        ("JPEG", "CMYK", {}),
        ("JPEG", "RGB", {"progressive": True}),
        ("JPEG", "RGB", {"icc_profile": bytes(70_000), "comment": b"\xff\xc0\xff\xd9"}),
        ("WEBP", "RGB", {}),
        ("WEBP", "RGBA", {}),
        ("WEBP", "RGB", {"lossless": True}),
        ("WEBP", "RGB", {"icc_profile": bytes(100)}),
    ],
)
@pytest.mark.parametrize("size", [(1, 1), (300, 7), (5, 1025)])
def test_pillow_sees_the_same_size(
    kind: str, mode: str, options: dict[str, Any], size: tuple[int, int]
) -> None:
    data = saved(mode, size, kind, **options)
    assert Image.open(io.BytesIO(data)).size == size
    named = {"JPEG": "jpg"}.get(kind, kind.lower())
    assert read_header(data) == ImageHeader(named, *size, cmyk=mode == "CMYK")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_exifs_orientation_is_told_beside_the_stored_size(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    exif[0x0112] = orientation
    data = saved("RGB", (8, 5), kind, exif=exif)
    header = read_header(data)
    known = orientation if 1 <= orientation <= 8 else 1
    assert header == ImageHeader({"JPEG": "jpg"}.get(kind, kind.lower()), 8, 5, known)
    assert header.rotated == (known > 1)
    assert header.seen == ImageOps.exif_transpose(Image.open(io.BytesIO(data))).size


def test_a_pngs_orientation_may_stand_behind_its_pixels() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, turned = saved("RGB", (8, 5), "PNG"), saved("RGB", (8, 5), "PNG", exif=exif)
    at = turned.index(b"eXIf") - 4
    chunk = turned[at : at + 12 + int.from_bytes(turned[at : at + 4], "big")]
    assert read_header(plain[:-12] + chunk + plain[-12:]).orientation == 6
    assert read_header(plain + chunk).orientation == 1  # behind the end
    for end in range(at, at + len(chunk)):
        assert read_header(turned[:end]).orientation in (1, 6)


def test_the_first_exif_of_a_jpeg_counts() -> None:
    one, two = Image.Exif(), Image.Exif()
    one[0x0112], two[0x0112] = 1, 6
    data, other = (saved("RGB", (8, 5), "JPEG", exif=exif) for exif in (one, two))
    at = other.index(b"Exif\0\0") - 4
    block = other[at : at + 2 + int.from_bytes(other[at + 2 : at + 4], "big")]
    assert read_header(data[:2] + block + data[2:]).orientation == 6
    end = data.index(b"Exif\0\0") - 4 + 2
    end += int.from_bytes(data[end : end + 2], "big")
    assert read_header(data[:end] + block + data[end:]).orientation == 1


def test_big_endian_and_damaged_exif() -> None:
    plain = saved("RGB", (8, 5), "JPEG")

    def with_exif(tiff: bytes) -> ImageHeader:
        block = b"Exif\0\0" + tiff
        return read_header(plain[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + plain[2:])

    entry = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0)
    assert with_exif(b"MM\0*" + struct.pack(">IH", 8, 1) + entry).rotated
    for damaged in (
        b"",
        b"XX",
        b"MM\0*",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*" + struct.pack(">IH", 8, 9) + entry[:4],
    ):
        assert with_exif(damaged) == ImageHeader("jpg", 8, 5)


@pytest.mark.parametrize("extension", FORMATS[1:])
def test_a_cut_header_is_an_error_and_never_anything_else(extension: str) -> None:
    data = picture(extension=extension)
    right = read_header(data)
    for end in range(len(data)):
        try:
            assert read_header(data[:end]) == right
        except HeaderError:
            continue


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from(
        [b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"RIFF\0\0\0\0WEBPVP8X", b"RIFF\0\0\0\0WEBPVP8 ", b""]
    ),
    st.binary(max_size=200),
)
def test_any_bytes_give_a_size_or_a_header_error(start: bytes, rest: bytes) -> None:
    try:
        header = read_header(start + rest)
    except HeaderError:
        return
    assert header.width > 0
    assert header.height > 0


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FORMATS[1:]), st.integers(0, 60), st.integers(0, 255))
def test_where_pillow_and_the_header_both_read_a_damaged_file_they_agree(
    extension: str, at: int, value: int
) -> None:
    data = bytearray(picture(extension=extension))
    data[at] = value
    if extension == "png":  # Pillow proves the header's checksum
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            size = Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP"]).size
        header = read_header(bytes(data))
    except (HeaderError, OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return
    assert (header.width, header.height) == size


@pytest.mark.parametrize(
    "data", [b"", b"GIF89a", b"BM", b"<svg/>", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n" + bytes(30)]
)
def test_what_is_no_image_is_refused(data: bytes) -> None:
    with pytest.raises(HeaderError):
        read_header(data)


def test_an_image_without_pixels_is_refused() -> None:
    data = bytearray(picture())
    data[16:20] = bytes(4)
    with pytest.raises(HeaderError, match="no pixels"):
        read_header(bytes(data))
