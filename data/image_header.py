"""Format, size and orientation of an image from its headers: nothing is decoded, so nothing can blow up."""

import struct
from dataclasses import dataclass

__all__ = [
    "EXTENSIONS",
    "FORMATS",
    "MAX_IMAGE_BYTES",
    "MAX_PIXELS",
    "HeaderError",
    "ImageHeader",
    "read_header",
]

FORMATS = ("", "jpg", "png", "webp")
"""Formats by the number that the index stores."""
EXTENSIONS = {"jpg": "jpg", "jpeg": "jpg", "png": "png", "webp": "webp"}
"""Member extensions that are images, each with its format, in the order in which one is chosen."""
MAX_PIXELS = 89_478_485
"""Images with more pixels are refused before decoding (Pillow's own limit for a warning)."""
MAX_IMAGE_BYTES = 256 * 1024 * 1024
"""Image files with more bytes are refused before reading."""


class HeaderError(ValueError):
    """The bytes do not begin like a JPEG, PNG or WebP image."""


@dataclass(frozen=True)
class ImageHeader:
    """What an image says of itself. ``width`` and ``height`` are those of the stored pixels; ``orientation``
    is EXIF's, 1 to 8: how a viewer has to turn or mirror them (1: not at all). ``cmyk``: a JPEG in printers'
    colours."""

    format: str
    width: int
    height: int
    orientation: int = 1
    cmyk: bool = False

    @property
    def rotated(self) -> bool:
        """Whether the stored pixels are not the way that they are to be seen."""
        return self.orientation > 1

    @property
    def seen(self) -> tuple[int, int]:
        """Width and height as a viewer shows the image: exchanged if it is turned by a quarter."""
        return (self.height, self.width) if self.orientation > 4 else (self.width, self.height)


def read_header(data: bytes) -> ImageHeader:
    """Format, size and orientation of a JPEG, PNG or WebP image; HeaderError for anything else. The
    orientation of a PNG or WebP may stand at its end, so ``data`` is the whole file."""
    try:
        if data[:8] == b"\x89PNG\r\n\x1a\n":
            header = _png(data)
        elif data[:2] == b"\xff\xd8":
            header = _jpeg(data)
        elif data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            header = _webp(data)
        else:
            raise HeaderError("neither JPEG, PNG nor WebP")
    except (struct.error, IndexError) as error:
        raise HeaderError("the image ends inside its header") from error
    if header.width == 0 or header.height == 0:
        raise HeaderError("the image has no pixels")
    return header


def _png(data: bytes) -> ImageHeader:
    if data[12:16] != b"IHDR":
        raise HeaderError("a PNG without IHDR")
    width, height = struct.unpack_from(">II", data, 16)
    return ImageHeader("png", width, height, _png_orientation(data))


def _png_orientation(data: bytes) -> int:
    at = 33
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if kind == b"eXIf":
            return _orientation(data[at + 8 : at + 8 + size])
        if kind == b"IEND":
            break
        at += 12 + size
    return 1


def _jpeg(data: bytes) -> ImageHeader:
    at, orientation = 2, 0
    while True:
        if data[at] != 0xFF:
            raise HeaderError("a JPEG without a frame header")
        while data[at] == 0xFF:  # fill bytes
            at += 1
        marker = data[at]
        at += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:  # no length follows
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, at + 3)
            return ImageHeader("jpg", width, height, orientation or 1, data[at + 7] == 4)
        if marker in (0xD9, 0xDA) or length < 2:
            raise HeaderError("a JPEG without a frame header")
        if marker == 0xE1 and data[at + 2 : at + 8] == b"Exif\0\0" and not orientation:
            orientation = _orientation(data[at + 8 : at + length])
        at += length


def _orientation(tiff: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 where the block has none or is damaged."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (count,) = struct.unpack_from(order + "H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(order + "HH", tiff, entry)
            if tag == 0x0112 and kind == 3:
                (value,) = struct.unpack_from(order + "H", tiff, entry + 8)
                return value if 1 <= value <= 8 else 1
    except struct.error:
        return 1
    return 1


def _webp(data: bytes) -> ImageHeader:
    kind = data[12:16]
    if kind == b"VP8X":
        orientation = _webp_orientation(data) if data[20] & 0x08 else 1
        width = 1 + int.from_bytes(_exactly(data, 24, 3), "little")
        height = 1 + int.from_bytes(_exactly(data, 27, 3), "little")
        return ImageHeader("webp", width, height, orientation)
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return ImageHeader("webp", (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return ImageHeader("webp", width & 0x3FFF, height & 0x3FFF)
    raise HeaderError("a WebP without pixels")


def _webp_orientation(data: bytes) -> int:
    at = 12
    while at + 8 <= len(data):
        kind, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        if kind == b"EXIF":
            return _orientation(data[at + 8 : at + 8 + size].removeprefix(b"Exif\0\0"))
        at += 8 + size + (size & 1)
    return 1


def _exactly(data: bytes, at: int, size: int) -> bytes:
    if len(data) < at + size:
        raise IndexError(at)
    return data[at : at + size]
