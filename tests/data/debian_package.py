"""Small ``.deb`` archives made by hand."""

import io
import lzma
import tarfile
from collections.abc import Mapping

__all__ = ["ar", "data_tar", "deb"]

ROOT = "./usr/share/openclipart/svg/"


def data_tar(files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    """A tar of files and symbolic links by their names as they stand, uncompressed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
        for name, target in (links or {}).items():
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            tar.addfile(member)
    return buffer.getvalue()


def ar(members: Mapping[str, bytes]) -> bytes:
    """An ar archive, as dpkg-deb writes it."""
    out = b"!<arch>\n"
    for name, data in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(data):<10}`\n".encode()
        out += data + b"\n" * (len(data) % 2)
    return out


def deb(files: Mapping[str, bytes], links: Mapping[str, str] | None = None) -> bytes:
    """A package of ``files``."""
    control = lzma.compress(data_tar({"./control": b"Package: openclipart-svg\n"}))
    data = lzma.compress(data_tar(files, links))
    return ar({"debian-binary": b"2.0\n", "control.tar.xz": control, "data.tar.xz": data})
