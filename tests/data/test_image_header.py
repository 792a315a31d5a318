"""Sizes from headers, compared with Pillow's."""

import io
import struct
import warnings
import zlib
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

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
    assert read_header(data) == ImageHeader({"JPEG": "jpg"}.get(kind, kind.lower()), *size)


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(10))
def test_an_exif_orientation_is_noticed_and_not_applied(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x010F] = "maker"
    exif[0x0112] = orientation
    header = read_header(saved("RGB", (8, 5), kind, exif=exif))
    assert header == ImageHeader({"JPEG": "jpg"}.get(kind, "webp"), 8, 5, rotated=2 <= orientation <= 8)


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
