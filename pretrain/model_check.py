"""What a model's config may say before anything is built from it.

A config comes with every checkpoint, so it may come from anybody: it must have the types of open_clip's own
dataclasses, sizes of a model that could be real, no more parameters than its weights have, and it never makes
anything run code that lies beside it.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast

import timm
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP
from open_clip.transform import PreprocessCfg
from pydantic import TypeAdapter, ValidationError
from timm.layers.helpers import to_2tuple
from torch import nn

from ..configs.documents import read_document
from ..configs.errors import UserError

__all__ = [
    "check_model_cfg",
    "check_preprocess_cfg",
    "check_remote_code",
    "check_size",
    "check_timm",
    "nearest",
]

MOST = 1 << 24
"""No number of a model's config is larger; a few have less to go by."""
MOST_OF = {"layers": 1024, "context_length": 1 << 14, "image_size": 1 << 13}
LONGEST_TEXT = 1000
NULLABLE = {"timm_proj", "patch_size"}
"""Keys that are null in configs of open_clip's own, whatever their declared types."""
TOWERS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "random")
RESIZE_MODES = ("shortest", "longest", "squash")


def nearest(name: str, known: Mapping[str, Any] | list[str]) -> str:
    """A hint for an unknown name: the nearest known ones, or nothing."""
    found = get_close_matches(name, list(known), n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(found)}?" if found else ""


@cache
def _adapter(cls: type) -> TypeAdapter[Any]:
    return TypeAdapter(cls)


def check_model_cfg(model_cfg: Mapping[str, Any], where: str = "model") -> None:
    """Raise UserError for what open_clip would report badly, and for sizes that no real model has; ``where``
    says who gave the config."""
    if "multimodal_cfg" in model_cfg:
        raise UserError(
            f"{where}: CoCa's caption decoder is not trained here; choose an arch without multimodal_cfg"
        )
    embed_dim = model_cfg.get("embed_dim")
    if type(embed_dim) is not int or not 1 <= embed_dim <= MOST:
        raise UserError(f"{where}.embed_dim: {_told(embed_dim)} is no number of features")
    for key, cls in TOWERS.items():
        given = model_cfg.get(key)
        if not isinstance(given, Mapping):
            raise UserError(f"{where}.{key}: must hold the keys of a tower, not {_told(given)}")
        known = [f.name for f in fields(cls)]
        for name in given:
            if name not in known:
                raise UserError(f"{where}.{key}.{name}: open_clip has no such key{nearest(name, known)}")
        _check_values(given, cls, f"{where}.{key}")
    _check_divisions(model_cfg, where)


def _check_values(given: Mapping[str, Any], cls: type, where: str) -> None:
    """Types as open_clip declares them, numbers that a model could have."""
    for name, value in given.items():
        for leaf in _leaves(value, f"{where}.{name}"):
            if isinstance(leaf, str) and len(leaf) > LONGEST_TEXT:
                raise UserError(f"{where}.{name}: {len(leaf)} letters are no name")
            if isinstance(leaf, int | float) and not abs(leaf) <= MOST_OF.get(name, MOST):
                raise UserError(
                    f"{where}.{name}: {_told(leaf)} is more than a model has ({MOST_OF.get(name, MOST)})"
                )
    unset = NULLABLE | {f.name for f in fields(cls) if f.default is None}
    whole = {k: v for k, v in given.items() if v is not None or k not in unset}
    try:
        _adapter(cls).validate_json(json.dumps(whole), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        said = first["msg"][:1].lower() + first["msg"][1:]
        raise UserError(f"{where}.{name}: {_told(given.get(name))}: {said}") from error
    for name in ("layers", "width", "patch_size", "image_size", "heads", "head_width", "context_length"):
        if given.get(name) is not None and any(leaf < 1 for leaf in _leaves(given[name], f"{where}.{name}")):
            raise UserError(f"{where}.{name}: {_told(given[name])} must be at least 1")
    if (layers := given.get("layers")) and sum(_leaves(layers, where)) > MOST_OF["layers"]:
        raise UserError(f"{where}.layers: {_told(layers)} is more than a model has ({MOST_OF['layers']})")


def _leaves(value: Any, where: str, depth: int = 0) -> Iterator[Any]:
    if depth > 4:
        raise UserError(f"{where}: lists and keys within one another {depth} deep are no model's")
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _leaves(inner, where, depth + 1)
    elif isinstance(value, list | tuple):
        for inner in cast(list[Any], value):
            yield from _leaves(inner, where, depth + 1)
    else:
        yield value


def _check_divisions(model_cfg: Mapping[str, Any], where: str) -> None:
    timm_name = model_cfg["vision_cfg"].get("timm_model_name")
    if timm_name and ":" not in timm_name and not timm.is_model(timm_name):
        hint = nearest(timm_name, timm.list_models())
        raise UserError(f"{where}.vision_cfg.timm_model_name: timm has no model named '{timm_name}'{hint}")
    text = {**asdict(CLIPTextCfg()), **model_cfg["text_cfg"]}
    if not text["hf_model_name"] and text["width"] % text["heads"]:
        raise UserError(f"{where}.text_cfg.width: {text['width']} is no multiple of heads {text['heads']}")
    vision = {**asdict(CLIPVisionCfg()), **model_cfg["vision_cfg"]}
    if not timm_name and isinstance(vision["layers"], int) and vision["width"] % vision["head_width"]:
        raise UserError(
            f"{where}.vision_cfg.width: {vision['width']} is no multiple of head_width "
            f"{vision['head_width']}; set head_width"
        )


def check_preprocess_cfg(preprocess_cfg: Any, where: str) -> None:
    """Raise UserError where a checkpoint's ``preprocess_cfg`` is not what open_clip writes."""
    if not isinstance(preprocess_cfg, Mapping):
        raise UserError(f"{where}: must hold keys, not {_told(preprocess_cfg)}")
    given = cast(Mapping[str, Any], preprocess_cfg)
    _check_values({k: v for k, v in given.items() if k != "mode"}, PreprocessCfg, where)
    if given.get("mode", "RGB") != "RGB":
        raise UserError(f"{where}.mode: {_told(given['mode'])}: pictures are RGB here")
    for name in ("mean", "std"):
        values = given.get(name)
        if values is not None and (len(values) != 3 or (name == "std" and min(values) <= 0)):
            raise UserError(f"{where}.{name}: {_told(values)} is not three numbers for red, green and blue")
    for name, known in (("interpolation", INTERPOLATIONS), ("resize_mode", RESIZE_MODES)):
        if given.get(name) is not None and given[name] not in known:
            raise UserError(f"{where}.{name}: {_told(given[name])} is none of {', '.join(known)}")


def check_remote_code(model_cfg: Mapping[str, Any], text_folder: Path | None) -> None:
    """Raise UserError for a Hugging Face text tower or tokenizer that wants to run code which lies beside it.

    Asked in its own way, transformers offers on a terminal to run it.
    """
    name = model_cfg["text_cfg"].get("hf_model_name")
    folders = [folder for folder in (text_folder, Path(name) if name else None) if folder and folder.is_dir()]
    for folder in folders:
        for file in ("config.json", "tokenizer_config.json"):
            if (folder / file).is_file() and "auto_map" in read_document(folder / file):
                raise UserError(
                    f"{folder / file}: auto_map: the text tower needs code that comes with it, which is "
                    "never run; take a model of a kind that transformers has itself"
                )
    if name and not folders:
        from transformers import AutoConfig

        try:
            AutoConfig.from_pretrained(name, trust_remote_code=False)
        except (OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"model.text_cfg.hf_model_name: '{name}' cannot be used: {reason}") from error


def check_size(parameters: int, file: Path) -> None:
    """Raise UserError if a model has more parameters than its weight file has bytes: it would be a config
    made to fill the memory."""
    held = file.stat().st_size
    if parameters > held:
        raise UserError(
            f"{file} has {held} bytes and the config beside it asks for {parameters} parameters; they are "
            "not of one model"
        )


def check_timm(model: CustomTextCLIP) -> None:
    """What open_clip's timm adapter gets wrong: image sizes that it does not pass on, and trunks with a wider
    head."""
    trunk = getattr(model.visual, "trunk", None)
    built: Any = getattr(getattr(trunk, "patch_embed", None), "img_size", None)
    size = cast(Any, to_2tuple(model.visual.image_size))
    if built is not None and tuple(built) != tuple(size):
        raise UserError(
            f"model.vision_cfg.image_size: this timm model takes {built[0]} pixels, not "
            f"{size[0]}; choose another timm model, or spell out "
            "layers, width and patch_size for open_clip's own ViT"
        )
    proj = getattr(getattr(model.visual, "head", None), "proj", None)
    out = getattr(trunk, "head_hidden_size", None)
    if isinstance(proj, nn.Linear) and out is not None and out != proj.in_features:
        raise UserError(
            "model.vision_cfg.timm_proj: open_clip's linear projection does not fit this timm model's head "
            f"({proj.in_features} against {out} features); set timm_proj: '' to project with its classifier"
        )


def _told(value: Any) -> str:
    """A value of a config in a message, short; numbers that are no numbers included."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
