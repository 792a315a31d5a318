"""Encoders that were trained apart, one of pictures and one of texts: the classic ResNet and BERT.

They have no space in common: what compares a picture with a text (``similarity``, contrastive training,
zero-shot) is not for them. Towers are open_clip's adapters around timm's and Hugging Face's models, so that
all that is done to a dual encoder's towers is done to them alike.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...configs.errors import UserError
from ...pretrain.cpu_linear import quick_linears
from ...pretrain.lean_timm import lean_last_block
from ...pretrain.lean_vision import encode_image
from ...pretrain.model import (
    Encoders,
    LoadedModel,
    load_model,
    normalise_pixels,
    pixel_statistics,
    wants_channels_last,
)
from ...pretrain.packing import encode_text
from ...pretrain.towers import write_open_clip
from ..config.source import ImageEncoderConfig, SourceConfig, TextEncoderConfig
from .hf_tower import hf_tower
from .timm_tower import timm_tower
from .tower import Tower, reason

__all__ = ["NOTE", "SeparateEncoders", "open_saved", "open_source"]

NOTE = "encoders.json"


class Towers(nn.Module):
    """Both encoders side by side, named as open_clip names them; either may be missing."""

    def __init__(self, visual: nn.Module | None, text: nn.Module | None) -> None:
        super().__init__()
        self.visual, self.text = visual, text


class SeparateRoot(nn.Module):
    """Pictures and packed texts to features, each encoder for itself; see ``pretrain.model.Root``."""

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, clip: Towers, image: Tower | None, text: Tower | None) -> None:
        super().__init__()
        self.clip = clip
        self.normalize = {"image": image and image.normalize, "text": text and text.normalize}
        self.pad_id = text.tokenizer.pad_id if text and text.tokenizer else None
        self.channels_last = clip.visual is not None and wants_channels_last(clip.visual)
        if image and image.preprocess:
            for name, value in pixel_statistics(image.preprocess).items():
                self.register_buffer(name, value.float(), persistent=False)

    def pixels(self, image: Tensor) -> Tensor:
        """uint8 pixels as normalised floats on the encoders' device; floats pass unchanged."""
        return normalise_pixels(image, self.image_mean, self.image_std, channels_last=self.channels_last)

    def encode_image(self, image: Tensor) -> Tensor:
        """Features [b, D] of uint8 pixels or already normalised floats, [b, 3, S, S]."""
        assert self.clip.visual is not None
        return self._scaled("image", encode_image(self.clip.visual, self.pixels(image)))

    def encode_text(self, token_ids: Tensor, seq_lens: Tensor) -> Tensor:
        """Features [b, D] of packed texts."""
        assert self.clip.text is not None
        return self._scaled("text", encode_text(self.clip.text, token_ids, seq_lens, pad_id=self.pad_id))

    def _scaled(self, kind: str, features: Tensor) -> Tensor:
        return F.normalize(features, dim=-1) if self.normalize[kind] else features


class SeparateEncoders(Encoders):
    """Encoders without a common space, of a width each, open for inference."""

    def __init__(self, image: Tower | None, text: Tower | None, device: str | torch.device) -> None:
        super().__init__(text and text.tokenizer)
        self.device = torch.device(device)
        self.towers = {k: one for k, one in (("image", image), ("text", text)) if one is not None}
        self.clip = Towers(image and image.module, text and text.module).to(device).eval()
        quick_linears(self.clip)
        lean_last_block(getattr(self.clip.visual, "trunk", nn.Identity()))
        self.model = SeparateRoot(self.clip, image, text).to(device).eval()
        self.widths = {k: one.width for k, one in self.towers.items()}
        self.normalized = frozenset(k for k, one in self.towers.items() if one.normalize)
        self.image_size = image.image_size if image else 0
        self.config = {k: one.config | {"normalize": one.normalize} for k, one in self.towers.items()}
        self.config["preprocess_cfg"] = image and image.preprocess

    def write(self, folder: Path) -> None:
        """Write every encoder into a folder named as its modality, as timm, transformers or open_clip read
        it, and ``encoders.json``, which ``open_saved`` reads."""
        entries: dict[str, dict[str, Any]] = {}
        for k, one in self.towers.items():
            (folder / k).mkdir()
            entries[k] = one.keep(folder / k) | {"normalize": one.normalize}
        (folder / NOTE).write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")


def open_source(config: SourceConfig, device: str | torch.device = "cpu") -> Encoders:
    """The encoders of a config, for inference. Raises UserError with the key and the reason if they cannot be
    had."""
    if config.checkpoint is not None:
        return load_model(config.checkpoint, device)
    image = None if config.image is None else _image_tower(config.image)
    text = None if config.text is None else _text_tower(config.text)
    return SeparateEncoders(image, text, device)


def open_saved(folder: Path, device: str | torch.device = "cpu") -> Encoders:
    """Encoders that were kept with ``SeparateEncoders.write``; UserError if the folder is damaged."""
    path = folder / NOTE
    try:
        config = SourceConfig.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({reason(error)}); make the run again") from error
    placed: dict[str, Any] = {}
    for k, one, key in (("image", config.image, "timm"), ("text", config.text, "hf")):
        if one is not None:
            key = key if one.checkpoint is None else "checkpoint"
            weights = {"weights": "pretrained"} if key == "timm" else {}
            placed[k] = one.model_copy(update={key: str(folder / k), **weights})
    return open_source(config.model_copy(update=placed), device)


def _dual(name: str, key: str) -> tuple[LoadedModel, Callable[[Path], dict[str, Any]]]:
    """A dual encoder, and what keeps it."""
    try:
        model = load_model(name)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error

    def keep(folder: Path) -> dict[str, Any]:
        write_open_clip(model.clip, folder)
        return {"checkpoint": folder.name}

    return model, keep


def _image_tower(config: ImageEncoderConfig) -> Tower:
    if config.checkpoint is None:
        return timm_tower(config)
    model, keep = _dual(config.checkpoint, "model.image.checkpoint")
    known = model.config
    return Tower(
        model.clip.visual, model.embed_dim, config.normalize, known["model_cfg"], keep,
        image_size=model.image_size, preprocess=known["preprocess_cfg"],
    )  # fmt: skip


def _text_tower(config: TextEncoderConfig) -> Tower:
    if config.checkpoint is None:
        return hf_tower(config)
    model, keep = _dual(config.checkpoint, "model.text.checkpoint")
    return Tower(
        model.clip.text, model.embed_dim, config.normalize, model.config["model_cfg"], keep,
        tokenizer=model.tokenizer,
    )  # fmt: skip
