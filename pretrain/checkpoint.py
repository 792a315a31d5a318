"""Checkpoint folders: complete and verified, or not there.

``step_00001000/`` is written under a temporary name, synced, described by ``manifest.json`` (size and
sha256 of every file) and renamed; only then are older ones removed. Tensors are safetensors, the rest is
JSON: nothing is ever unpickled.
"""

import json
import logging
import secrets
import shutil
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..configs import documents
from ..configs.errors import UserError, unwritable
from ..configs.files import TEMPORARY, fsync_folder, temporary_name
from .manifest import MANIFEST, scan, seal, verify
from .retention import superseded
from .tensor_file import MEND, FileFacts, TensorFile, specs, write_tensors, write_text

__all__ = [
    "MANIFEST",
    "OPTIMIZER_NAME",
    "PARTS",
    "RNG_NAME",
    "as_text",
    "complete",
    "folder_name",
    "newest_checkpoint",
    "newest_or_none",
    "newest_step",
    "partial_mend",
    "read_document",
    "read_tensors",
    "remove",
    "remove_leftovers",
    "save",
    "unfinished_name",
    "verify",
    "write_files",
]

log = logging.getLogger(__name__)
RNG_NAME, OPTIMIZER_NAME = "rng.safetensors", "optimizer.safetensors"
PARTS = (OPTIMIZER_NAME, RNG_NAME)
"""What a run can begin anew, if it must (``resume.allow_partial``)."""


def folder_name(step: int) -> str:
    """``step_00001000``."""
    return f"step_{step:08d}"


def unfinished_name(step: int, token: str) -> str:
    """The name under which a checkpoint is written, which ``remove_leftovers`` knows."""
    return f".{folder_name(step)}.{token}.tmp"


def as_text(document: Any) -> str:
    """A JSON document as it is stored."""
    return json.dumps(document, indent=1) + "\n"


def save(
    run: Path,
    step: int,
    *,
    tensors: Mapping[str, Mapping[str, Tensor]],
    documents: Mapping[str, Any],
    write_more: Callable[[Path], None] | None = None,
    keep: int = 2,
) -> Path:
    """Write ``run/checkpoints/step_..`` with one .safetensors file per entry of ``tensors``, one JSON file
    per entry of ``documents`` and whatever ``write_more`` puts into the folder; then remove all but the
    ``keep`` newest whole checkpoints. Returns the folder. Raises UserError if the disk is full or not
    writable; then nothing has changed.
    """
    parent = run / "checkpoints"
    final = parent / folder_name(step)
    temporary = parent / unfinished_name(step, secrets.token_hex(6))
    try:
        parent.mkdir(parents=True, exist_ok=True)
        texts = {name: as_text(document) for name, document in documents.items()}
        files = write_files(temporary, tensors, texts)
        if write_more is not None:
            write_more(temporary)
        complete(temporary, final, {"step": step}, files)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise unwritable(final, error, then="then start the same command") from error
    for old in superseded(scan(run), keep=keep, newest=step):
        remove(old.folder)
    return final


def write_files(
    folder: Path, tensors: Mapping[str, Mapping[str, Tensor]], texts: Mapping[str, str]
) -> dict[str, FileFacts]:
    """Write and sync files into ``folder``, made if it is absent and its parent is there. Returns what the
    manifest must know of them. Raises OSError."""
    folder.mkdir(exist_ok=True)
    files = {
        name: write_tensors(folder / name, specs(part), part.__getitem__) for name, part in tensors.items()
    }
    return files | {name: write_text(folder / name, text) for name, text in texts.items()}


def complete(temporary: Path, final: Path, facts: Mapping[str, Any], files: Mapping[str, FileFacts]) -> None:
    """Write the manifest of a folder whose files are durable, and give it its name. Raises OSError."""
    seal(temporary, facts, files)
    if final.exists():  # left by a run that was told to start over, or damaged
        remove(final)
    temporary.rename(final)
    fsync_folder(final.parent)


def remove(folder: Path) -> None:
    """Delete a checkpoint: first its name, so that at no moment half of one stands there. Raises OSError;
    nothing happens if it is gone already."""
    hidden = temporary_name(folder)
    try:
        folder.rename(hidden)
    except FileNotFoundError:  # somebody else was faster
        return
    shutil.rmtree(hidden)


def newest_checkpoint(run: Path, *, before: int | None = None, without: Collection[str] = ()) -> Path | None:
    """The newest checkpoint that is whole, of a step before ``before`` if that is given; damaged ones are
    passed over, each named in a warning. Files called as in ``without`` may be missing. None if there is
    none. Raises UserError for one that a newer version of the program has written."""
    for found in scan(run, strict=True, without=without):
        if before is not None and found.step >= before:
            continue
        problem = found.problem or verify(found.folder, without=without)
        if problem is None:
            return found.folder
        log.warning("%s; going back to an older checkpoint", problem)
    return None


def newest_or_none(run: Path, *, without: Collection[str] = ()) -> Path | None:
    """As ``newest_checkpoint``, but raises UserError where there are checkpoints and none is whole: a run
    does not start over by mistake."""
    newest = newest_checkpoint(run, without=without)
    if newest is None and (found := scan(run)):
        partly = next((mend for one in found if (mend := partial_mend(one.folder))), "")
        raise UserError(
            f"{run / 'checkpoints'} holds {len(found)} checkpoints of which none is whole; remove that "
            f"folder to start the run from its beginning, or put a whole one there{partly}"
        )
    return newest


def partial_mend(folder: Path) -> str:
    """How to go on from a checkpoint that lacks some of the ``PARTS``, as the end of a sentence; "" if it
    lacks none, or is not whole without them."""
    missing = [name for name in PARTS if not (folder / name).exists()]
    if not missing or verify(folder, without=PARTS) is not None:
        return ""
    return f", or set resume.allow_partial=true to go on without {', '.join(missing)}"


def newest_step(run: Path) -> tuple[int, Path] | None:
    """Step and folder of the newest finished checkpoint, whose files' hashes are not looked at; None if there
    is none."""
    return next(((one.step, one.folder) for one in scan(run) if one.problem is None), None)


def remove_leftovers(run: Path) -> None:
    """Delete what interrupted writes left behind: checkpoints, and files beside those that they were to
    replace."""
    for path in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)
    for path in run.glob(".*.tmp"):
        if TEMPORARY.fullmatch(path.name) and path.is_file():  # all else is the user's
            path.unlink(missing_ok=True)
    for path in run.glob(".seen_*"):
        with suppress(OSError):
            path.rmdir()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, on the CPU; UserError if it cannot be read."""
    file = TensorFile(path)
    return {name: file.read(name) for name in sorted(file.names)}


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint; UserError if it cannot be read."""
    return documents.read_document(path, MEND)
