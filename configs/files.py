"""Files that are whole or absent: atomic writes, and where caches live."""

import os
import secrets
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError

__all__ = [
    "atomic_write_bytes",
    "atomic_write_text",
    "cache_dir",
    "fsync_folder",
    "resolve_data_path",
    "temporary_beside",
]


def cache_dir() -> Path:
    """Where downloads and corpora are kept: ``DIPTYCH_CACHE``, else ``diptych`` in the user's cache folder
    (``XDG_CACHE_HOME``, by default ``~/.cache``). It may not exist yet."""
    if own := os.environ.get("DIPTYCH_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "diptych"


def resolve_data_path(text: str | Path) -> Path:
    """The path that a config names: ``corpus:NAME/REST`` lies in the cache's ``corpora`` folder, anything
    else is a path as it stands (``~`` is the home folder). A URL comes back as a path too, which names no
    file of this machine; ``open_shards`` understands it.

    Raises UserError for a corpus that was not fetched and for a name that leaves the folder of corpora.
    """
    name = str(text)
    if not name.startswith("corpus:"):
        return Path(name).expanduser()
    inside = Path(name.removeprefix("corpus:"))
    if inside.is_absolute() or not inside.parts or ".." in inside.parts:
        raise UserError(f"'{name}' must be corpus:NAME/REST, for instance corpus:icons-demo/train")
    corpora = cache_dir() / "corpora"
    if not (corpora / inside.parts[0]).is_dir():
        missing = f"there is no corpus {inside.parts[0]} in {corpora}"
        corpus = "clipart" if inside.parts[0] == "clipart" else "icons"
        raise UserError(f"'{name}': {missing}; fetch it with `diptych data fetch {corpus}`")
    return corpora / inside


def fsync_folder(folder: Path) -> None:
    """Make renames inside ``folder`` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def temporary_beside(path: Path) -> Generator[Path]:
    """A temporary name in ``path``'s folder. What is written there becomes ``path`` when the block ends well,
    synced to disk; after an error it is removed and ``path`` is as it was."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
        fsync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def atomic_write_bytes(path: str | Path, data: bytes) -> None:
    """Write ``data``; at every moment ``path`` holds the old content or all of the new."""
    with temporary_beside(Path(path)) as temporary:
        temporary.write_bytes(data)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 ``text`` with its line ends as they are; see ``atomic_write_bytes``."""
    atomic_write_bytes(path, text.encode("utf-8"))
