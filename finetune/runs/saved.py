"""A fine-tuning run on disk: safetensors and JSON, whole or absent, and complete in itself.

``encoder/`` is the pretrained checkpoint as an open_clip folder, or encoders trained apart, each in a folder
of its own (``unimodal``); ``heads/NAME/`` holds per seed the head
(``seed_0.safetensors``) and, where they were trained, the encoders (``encoder_seed_0/``); ``run.json`` says
what a prediction needs. Nothing is unpickled and nothing outside the folder is needed.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...configs.documents import as_written, read_document
from ...configs.errors import UserError, unwritable
from ...configs.files import fsync_folder, temporary_name
from ...pretrain.model import Encoders, LoadedModel, load_model
from ...pretrain.towers import write_open_clip
from ..config import HeadConfig
from ..encoders.unimodal import NOTE, SeparateEncoders, open_saved
from ..fusion.operators import Head, build_head
from ..tasks.task import Task

__all__ = [
    "SavedHead",
    "device_of",
    "file_hash",
    "head_folder",
    "read_head",
    "read_json",
    "save_encoder",
    "save_head",
    "write_folder"
]  # fmt: skip


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let ``fill`` write into a temporary folder that then takes the place of ``folder``; after an error
    everything is as it was. UserError if the disk is full or not writable."""
    temporary = temporary_name(folder)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in temporary.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        fsync_folder(temporary)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
        fsync_folder(folder.parent)
    except OSError as error:
        raise unwritable(folder, error, then="then start the same command") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def file_hash(path: Path) -> str:
    """sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a fine-tuning run; UserError with the path if it is none."""
    return read_document(path, "give a fine-tuning run, or make it again")


def write_encoder(model: Encoders, folder: Path) -> None:
    """Write the encoders into an existing folder: a dual encoder as open_clip reads it, others as
    ``SeparateEncoders.write`` says."""
    if isinstance(model, LoadedModel):
        write_open_clip(model.clip, folder)
    else:
        assert isinstance(model, SeparateEncoders)
        model.write(folder)


def save_encoder(model: Encoders, folder: Path, fingerprint: str) -> None:
    """Keep the pretrained encoders in the run; if they are there already, do nothing."""
    note = folder / "fingerprint.json"
    if note.is_file() and read_json(note).get("sha256") == fingerprint:
        return

    def fill(temporary: Path) -> None:
        write_encoder(model, temporary)
        (temporary / note.name).write_text(json.dumps({"sha256": fingerprint}) + "\n", encoding="utf-8")

    write_folder(folder, fill)


@dataclass(frozen=True)
class SavedHead:
    """A trained head of one seed. ``encoder``: the folder of its own encoders, or None for the run's."""

    head: Head
    scale: float
    shift: float
    encoder: Path | None

    def calibrated(self, logits: Tensor) -> Tensor:
        """Logits whose probabilities are calibrated."""
        return self.scale * logits.double() + self.shift


def save_head(
    folder: Path, document: dict[str, Any], members: list[tuple[int, Head, Encoders | None]]
) -> None:
    """Write ``heads/NAME``: ``head.json`` and each seed's tensors with their hashes."""

    def fill(temporary: Path) -> None:
        files: dict[str, str] = {}
        for seed, head, model in members:
            name = f"seed_{seed}.safetensors"
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in head.state_dict().items()}, temporary / name
            )
            files[name] = file_hash(temporary / name)
            if model is not None:
                (temporary / f"encoder_seed_{seed}").mkdir()
                write_encoder(model, temporary / f"encoder_seed_{seed}")
        text = json.dumps(document | {"files": files}, indent=1) + "\n"
        (temporary / "head.json").write_text(text, encoding="utf-8")

    write_folder(folder, fill)


def head_folder(run: Path, name: str) -> Path:
    """Where a run keeps the head of a name. UserError for one that leads out of the run."""
    if name != Path(name).name:
        raise UserError(f"{run / 'run.json'}: '{name}' is no name of a head; make the run again")
    return run / "heads" / name


def read_head(
    folder: Path,
    widths: dict[str, int],
    token_widths: dict[str, int] | None,
    task: Task,
    pooled: Sequence[str] = (),
) -> list[SavedHead]:
    """The trained heads of all seeds, in eval mode, for the outputs of a task. Raises UserError for a damaged
    or foreign file."""
    with as_written(folder / "head.json", f"remove {folder} and fine-tune again"):
        return list(_read_seeds(folder, widths, token_widths, task, pooled))


def _read_seeds(
    folder: Path,
    widths: dict[str, int],
    token_widths: dict[str, int] | None,
    task: Task,
    pooled: Sequence[str],
) -> Iterator[SavedHead]:
    document = read_json(folder / "head.json")
    config = HeadConfig.model_validate_json(json.dumps(document["config"]))
    for seed in document["seeds"]:
        path = folder / f"seed_{int(seed['seed'])}.safetensors"
        head = build_head(config, widths, task.outputs, token_widths, task.link, pooled)
        try:
            if file_hash(path) != document["files"][path.name]:
                raise UserError(
                    f"{path} is damaged (its sha256 differs); remove {folder} and fine-tune again"
                )
            head.load_state_dict(load_file(path))
        except (OSError, SafetensorError, RuntimeError, KeyError) as error:
            raise UserError(
                f"{path} cannot be read ({error}); remove {folder} and fine-tune again"
            ) from error
        encoder = folder / f"encoder_seed_{int(seed['seed'])}"
        own = encoder if encoder.is_dir() else None
        yield SavedHead(head.eval(), float(seed["scale"]), float(seed["shift"]), own)


def open_encoder(folder: Path, device: str | torch.device = "cpu") -> Encoders:
    """The encoders kept in a run."""
    return open_saved(folder, device) if (folder / NOTE).is_file() else load_model(folder, device)


def device_of(name: str) -> torch.device:
    """The device of a name, ``auto`` being the GPU where there is one. UserError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or (device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count()):
        raise UserError(f"device: '{name}' cannot be used here; give auto or cpu")
    return device
