"""Where a fetched corpus lies: there whole or not at all, and never over other people's files."""

import errno
import json
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ...configs.files import fsync_folder

__all__ = ["STAMP", "put_in_place", "refuse_other_things", "stamp_of", "told_of_space"]

STAMP = "corpus.json"
"""What a corpus is made of, and its figures."""


def stamp_of(folder: Path) -> dict[str, Any] | None:
    """The identity of the corpus at ``folder``; None if there is no whole one."""
    try:
        return json.loads((folder / STAMP).read_text(encoding="utf-8"))["made_of"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def refuse_other_things(folder: Path, sign: str) -> None:
    """UserError unless ``folder`` is new, empty or a corpus, which holds the file ``sign``: only that may be
    replaced."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give another place for the corpus")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / sign).is_file():
        raise UserError(f"{folder} holds other things than a corpus; give an empty or a new folder")


def put_in_place(folder: Path, new: Path, staging: Path) -> None:
    """Put the finished corpus in its place, an old one out of the way, and clear the staging folder."""
    if folder.exists():
        folder.rename(staging / "old")
    new.rename(folder)
    fsync_folder(folder.parent)
    shutil.rmtree(staging)


@contextmanager
def told_of_space(folder: Path, needs: str) -> Generator[None]:
    """Turn what the disk says into a UserError; ``needs``: "the demo takes 150 MB on the way"."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            mend = f"make room ({needs}), or choose another place"
        else:
            mend = "choose another place"
        raise UserError(f"{folder}: {error.strerror or error}; {mend} with --out or DIPTYCH_CACHE") from error
