"""Packages of Debian: downloaded by apt without root, read without unpacking, and nothing of them is run.

A ``.deb`` is an ``ar`` archive whose member ``data.tar.*`` holds the files (deb(5)). It is read as a stream
with caps on every size, so an archive that claims to be small and unfolds to terabytes is refused early.
"""

import io
import lzma
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

from ...configs.errors import UserError

__all__ = ["download_package", "read_members"]

MAX_MEMBER = 1 << 24  # bytes of one file; the largest drawing of openclipart has 1.7 MB
MAX_ARCHIVE = 1 << 30  # bytes of all files; openclipart has 180 MB
MAX_MEMORY = 1 << 28  # bytes that an xz dictionary may take; Debian's take 8 to 64 MiB
TIMEOUT_S = 900
_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


def download_package(name: str, folder: Path) -> Path:
    """The ``.deb`` of ``name`` in ``folder``, of the version that apt's sources have. ``apt-get download``
    checks it against the signed lists, needs no root and installs nothing.

    Raises UserError: no apt, no network, no such package.
    """
    instead = f"give a {name} .deb that you have with --deb FILE (any mirror: pool/main/o/openclipart/)"
    command = shutil.which("apt-get")
    if command is None:
        raise UserError(f"there is no apt-get on this machine to fetch Debian's {name} with; {instead}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".apt-", dir=folder) as temporary:
        try:
            done = subprocess.run(
                [command, "download", "-q", name],
                cwd=temporary,
                capture_output=True,
                text=True,
                timeout=TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"apt-get download {name} took more than {TIMEOUT_S} s; look at the network, or {instead}"
            ) from error
        found = sorted(Path(temporary).glob(f"{name}_*.deb"))
        if done.returncode != 0 or not found:
            said = " ".join(line.removeprefix("E: ") for line in done.stderr.splitlines() if line[:2] == "E:")
            raise UserError(
                f"apt-get download {name} failed: {said[:200] or 'no message'}; run `apt-get update` as root "
                f"where its lists are old, or {instead}"
            )
        path = folder / found[-1].name
        found[-1].replace(path)
    return path


def read_members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """(path, bytes) of the plain files of a ``.deb`` whose path (without ``./``) is wanted, in its order.

    Links are passed over. Raises UserError: no ``.deb``, cut, a path that is absolute or leads upwards, a
    file of more than 16 MiB, more than a gigabyte in all.
    """
    try:
        with (
            archive.open("rb") as file,
            io.BufferedReader(_data_tar(file, archive)) as stream,
            tarfile.open(fileobj=stream, mode="r|") as tar,
        ):
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts:
                    raise _wrong(archive, f"its member {member.name[:100]!r} leads out of the package")
                if not member.isfile() or not wanted(str(path)):
                    continue
                if member.size > MAX_MEMBER:
                    raise _wrong(archive, f"{path} has {member.size} bytes")
                content = tar.extractfile(member)
                assert content is not None, "a plain file has content"
                yield str(path), content.read()
    except (tarfile.TarError, EOFError, OSError, lzma.LZMAError) as error:
        raise UserError(
            f"{archive} cannot be read ({error}); give another with --deb, or remove it and fetch"
        ) from error


def _wrong(archive: Path, why: str) -> UserError:
    return UserError(
        f"{archive} is not the package it should be: {why}; give another with --deb, or remove it and fetch"
    )


def _data_tar(file: IO[bytes], archive: Path) -> "_Unpacked":
    """The uncompressed ``data.tar`` of an open ``.deb``."""
    if file.read(len(_AR_MAGIC)) != _AR_MAGIC:
        raise _wrong(archive, "it is no .deb")
    while header := file.read(_AR_HEADER):
        name = header[:16].rstrip(b" /").decode("ascii", "replace")
        size = header[48:58].strip()
        if header[58:] != b"`\n" or not size.isdigit():
            raise _wrong(archive, "its ar header is damaged")
        if name == "data.tar.xz":
            return _Unpacked(file, int(size), archive)
        if name.startswith("data.tar"):
            raise _wrong(archive, f"{name} is not compressed by xz, as Debian's are")
        file.seek(int(size) + int(size) % 2, io.SEEK_CUR)  # members begin at even places
    raise _wrong(archive, "it has no data.tar.xz")


class _Unpacked(io.RawIOBase):
    """The next ``size`` bytes of ``file``, which are xz, decompressed little by little."""

    def __init__(self, file: IO[bytes], size: int, archive: Path) -> None:
        self._file, self._left, self._archive = file, size, archive
        self._xz = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=MAX_MEMORY)
        self._given = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        while not data and not self._xz.eof:
            packed = b""
            if self._xz.needs_input:
                packed = self._file.read(min(self._left, 1 << 16))
                self._left -= len(packed)
                if not packed:
                    raise EOFError("the archive is cut")
            data = self._xz.decompress(packed, max_length=len(buffer))
        self._given += len(data)
        if self._given > MAX_ARCHIVE:
            raise _wrong(self._archive, f"it unfolds to more than {MAX_ARCHIVE} bytes")
        buffer[: len(data)] = data
        return len(data)
