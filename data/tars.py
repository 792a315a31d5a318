"""Plain USTAR headers, written the same way every time."""

import tarfile

__all__ = ["BLOCK", "END", "MAX_NAME_BYTES", "member_header", "padding"]

BLOCK = 512
END = bytes(2 * BLOCK)
"""The two zero blocks that close a tar."""
MAX_NAME_BYTES = 100
"""Longest member name that a USTAR header holds in one field."""


def member_header(name: str, size: int) -> bytes:
    """The 512 bytes before a regular file of ``size`` bytes: mode 0644, owner 0, time 0.

    Raises ValueError if ``name`` is longer than ``MAX_NAME_BYTES`` in UTF-8 or ``size`` is 8 GiB or more.
    """
    if len(name.encode("utf-8")) > MAX_NAME_BYTES:
        raise ValueError(f"member name '{name}' is longer than {MAX_NAME_BYTES} bytes")
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = size, 0o644, 0
    return info.tobuf(tarfile.USTAR_FORMAT, "utf-8", "strict")


def padding(size: int, block: int = BLOCK) -> bytes:
    """The zeros that fill ``size`` bytes up to whole blocks."""
    return bytes(-size % block)
