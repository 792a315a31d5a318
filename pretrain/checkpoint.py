"""Checkpoint folders: complete and verified, or not there.

``step_00001000/`` is written under a temporary name, synced, described by ``manifest.json`` (size and
sha256 of every file) and renamed; only then are older ones removed. Tensors are safetensors, the rest is
JSON: nothing is ever unpickled.
"""

import hashlib
import json
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..configs.errors import UserError
from ..configs.files import fsync_folder

__all__ = [
    "MANIFEST",
    "newest_checkpoint",
    "read_document",
    "read_tensors",
    "remove_leftovers",
    "save",
    "verify",
]

log = logging.getLogger(__name__)
MANIFEST = "manifest.json"
_CHUNK = 1 << 20


def folder_name(step: int) -> str:
    """``step_00001000``."""
    return f"step_{step:08d}"


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


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
    ``keep`` newest checkpoints. Returns the folder. Raises UserError if the disk is full or not writable;
    then nothing has changed.
    """
    parent = run / "checkpoints"
    final = parent / folder_name(step)
    temporary = parent / f".{final.name}.{secrets.token_hex(6)}.tmp"
    try:
        temporary.mkdir(parents=True)
        for name, values in tensors.items():
            save_file({k: v.detach().cpu().contiguous() for k, v in values.items()}, temporary / name)
        for name, document in documents.items():
            (temporary / name).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if write_more is not None:
            write_more(temporary)
        _seal(temporary, step)
        if final.exists():  # left by a run that was told to start over, or damaged
            shutil.rmtree(final)
        temporary.rename(final)
        fsync_folder(parent)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"{final} cannot be written ({error}); make room, then start the same command"
        ) from error
    for old in [folder for _, folder in _by_step(parent)][keep:]:
        shutil.rmtree(old)
    return final


def _seal(folder: Path, step: int) -> None:
    """Sync every file and write the manifest last."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = folder / MANIFEST
    manifest.write_text(json.dumps({"step": step, "files": files}, indent=1) + "\n", encoding="utf-8")
    with manifest.open("rb") as file:
        os.fsync(file.fileno())
    fsync_folder(folder)


def _read_manifest(folder: Path) -> dict[str, Any] | None:
    try:
        data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        return data if isinstance(data["step"], int) and isinstance(data["files"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _by_step(parent: Path) -> list[tuple[int, Path]]:
    """Finished checkpoints, newest first, by the step in their manifest and not by name."""
    found: list[tuple[int, Path]] = []
    for folder in parent.glob("step_*"):
        manifest = _read_manifest(folder)
        if manifest is not None:
            found.append((manifest["step"], folder))
    return sorted(found, reverse=True)


def verify(folder: Path) -> str | None:
    """None if every file is there and has its size and hash; else what is wrong."""
    manifest = _read_manifest(folder)
    if manifest is None:
        return f"{folder} has no readable {MANIFEST}"
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != entry["bytes"]:
            return f"{path} has {path.stat().st_size} bytes instead of {entry['bytes']}"
        if _sha256(path) != entry["sha256"]:
            return f"{path} is damaged (its sha256 differs)"
    return None


def newest_checkpoint(run: Path, *, before: int | None = None) -> Path | None:
    """The newest checkpoint that is whole, of a step before ``before`` if that is given; damaged ones are
    passed over with a warning. None if there is none."""
    for step, folder in _by_step(run / "checkpoints"):
        if before is not None and step >= before:
            continue
        problem = verify(folder)
        if problem is None:
            return folder
        log.warning("%s; going back to an older checkpoint", problem)
    return None


def remove_leftovers(run: Path) -> None:
    """Delete what interrupted writes left behind."""
    for path in (run / "checkpoints").glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a .safetensors file, on the CPU; UserError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove its folder to use an older one") from error


def read_document(path: Path) -> dict[str, Any]:
    """A JSON file; UserError if it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); remove its folder to use an older one") from error
