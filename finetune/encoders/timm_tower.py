"""timm's models as encoders of pictures: their weights, their pooling, their preprocessing."""

import math
from pathlib import Path
from typing import Any

import timm
import torch
from open_clip.timm_model import TimmModel
from timm.data.config import resolve_data_config
from torch import nn

from ...configs.errors import UserError
from ...pretrain import weights
from ...pretrain.model_check import nearest
from ..config.source import ImageEncoderConfig
from .tower import Tower, reason

__all__ = ["TimmEncoder", "timm_tower"]

FILES = ("model.safetensors", "pytorch_model.bin")


class TimmEncoder(TimmModel):
    """A timm model without its classifier: [b, 3, S, S] to the features [b, D] that timm pools."""

    def __init__(self, trunk: nn.Module, image_size: int) -> None:
        nn.Module.__init__(self)
        self.image_size = (image_size, image_size)
        self.trunk = trunk
        self.head = nn.Sequential()


def timm_tower(config: ImageEncoderConfig) -> Tower:
    """The timm model of a config. Raises UserError with the key and the reason if it cannot be had."""
    assert config.timm is not None
    trunk = _timm_model(config.timm, config.weights)
    preprocess = _timm_preprocess(config, trunk)
    size: int = preprocess["size"]
    tower = TimmEncoder(trunk, size).eval()
    try:
        if size != trunk.pretrained_cfg["input_size"][1] and hasattr(trunk, "set_input_size"):
            trunk.set_input_size((size, size))  # resamples position embeddings
        with torch.inference_mode():
            width = tower(torch.zeros(1, 3, size, size)).shape[1]
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"model.image.image_size: {config.timm} cannot take {size} pixels ({reason(error)}); give another"
        ) from error
    args = {k: v for k, v in timm.models.get_model_args(trunk).items() if k != "num_classes"}

    def keep_timm(folder: Path) -> dict[str, Any]:
        timm.models.save_for_hf(trunk, str(folder), data_config={"img_size": size}, safe_serialization=True)
        return {"timm": folder.name, "image_size": size}

    built = {"timm": trunk.pretrained_cfg["architecture"], "args": args}
    return Tower(tower, width, config.normalize, built, keep_timm, image_size=size, preprocess=preprocess)


def _timm_model(name: str, source: str) -> Any:
    """A timm model without classifier, with its weights."""
    folder = Path(name.removeprefix("local-dir:"))
    local, hub = folder.is_dir(), name.startswith(weights.HUB)
    if not local and not hub and not timm.is_model(name):
        raise UserError(
            f"model.image.timm: '{name}' is neither a model of timm nor a folder"
            f"{nearest(name, timm.list_models())}"
        )
    fetched = source == "pretrained" and not local
    try:
        trunk = timm.create_model(f"local-dir:{folder}" if local else name, pretrained=fetched, num_classes=0)
    except Exception as error:  # the hub client and timm's models have a zoo of them
        hint = "give weights: none or a file" if fetched else "give another"
        raise UserError(f"model.image.timm: {name} cannot be had ({reason(error)}); {hint}") from error
    if local and source == "pretrained":
        found = next((folder / file for file in FILES if (folder / file).is_file()), None)
        if found is None:
            raise UserError(f"model.image.timm: {folder} holds no {FILES[0]}; give weights, a file, or none")
        source = str(found)
    if source not in ("pretrained", "none"):
        weights.load_image(trunk, source, "model.image.weights")
    return trunk


def _timm_preprocess(config: ImageEncoderConfig, trunk: Any) -> dict[str, Any]:
    """How timm's evaluation transform prepares pictures, in open_clip's words; ``resize``: the side before
    the centre is cut out."""
    cfg = resolve_data_config({}, pretrained_cfg=trunk.pretrained_cfg)
    channels, height, width = cfg["input_size"]
    modes = {"center": "shortest", "squash": "squash"}
    for what, given, known in (
        ("channels of input", channels, (3,)),
        ("interpolation", cfg["interpolation"], ("bicubic", "bilinear")),
        ("crop mode", cfg["crop_mode"], tuple(modes)),
    ):
        if given not in known:
            raise UserError(
                f"model.image.timm: {config.timm} has {given} as {what}, which is not "
                f"{' or '.join(map(str, known))}; give another model"
            )
    if config.image_size is None and height != width:
        raise UserError(
            f"model.image.image_size: {config.timm} was made for {height} x {width} pixels; give one side"
        )
    size = config.image_size or height
    return {
        "size": size,
        "mean": list(cfg["mean"]),
        "std": list(cfg["std"]),
        "interpolation": cfg["interpolation"],
        "resize_mode": modes[cfg["crop_mode"]],
        "resize": math.floor(size / cfg["crop_pct"]),
        "fill_color": 0,
    }
