"""open_clip's ViT with its own text tower as transformers' ``CLIPModel``: same weights, same features.

The two differ in names, in separate query, key and value projections, in transposed output projections, and
in how the activation (``hidden_act``) and the token that is read (``eos_token_id``) are told. Whatever else a
tower of open_clip can have, ``CLIPModel`` cannot, and it is refused rather than left out.
"""

from pathlib import Path
from typing import Any, cast

import torch
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, TextTransformer, VisionTransformer
from torch import Tensor, nn

from ...configs.errors import UserError
from ...pretrain.blocks import LeanBlock
from ...pretrain.model import LoadedModel
from .formats import Say

__all__ = ["hf_config", "hf_state", "unsupported", "write_hf"]

START, END = 49406, 49407  # of a text, by CLIP's own tokenizer
ARGMAX = 2  # an eos_token_id with which CLIPModel reads at the highest id
RESAMPLE = {"bilinear": 2, "bicubic": 3}  # PIL's numbers


def write_hf(model: LoadedModel, folder: Path, say: Say) -> dict[str, float]:
    """Write ``config.json``, ``model.safetensors``, ``preprocessor_config.json`` and, for CLIP's own
    tokenizer, its files. Returns by how much what was written differs from ``model``: see ``differences``.

    Raises UserError for towers that CLIPModel cannot hold.
    """
    if reason := unsupported(model):
        raise UserError(f"transformers' CLIPModel cannot hold this model: {reason}; use --to open_clip")
    try:
        from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
        from transformers.utils import logging
    except ImportError as error:
        raise UserError("export to hf needs the package transformers; pip install transformers") from error
    config: Any = CLIPConfig(**hf_config(model))
    made: Any = CLIPModel(config)
    made.load_state_dict(hf_state(model.clip))
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        made.save_pretrained(folder)
        CLIPImageProcessor(**_preprocess(model)).save_pretrained(folder)
        _write_tokenizer(model, folder, say)
        say("comparing with open_clip")
        return differences(model, cast(Any, CLIPModel).from_pretrained(folder).eval())
    finally:
        if bars:
            logging.enable_progress_bar()


def unsupported(model: LoadedModel) -> str | None:
    """None if CLIPModel gives the same features, else why not."""
    visual, text, config = model.clip.visual, model.clip.text, model.config["model_cfg"]
    preprocess = model.config["preprocess_cfg"]
    if name := config["vision_cfg"].get("timm_model_name"):
        return f"its image tower is timm's {name}"
    if not isinstance(visual, VisionTransformer):
        return f"its image tower is a {type(visual).__name__}"
    if name := config["text_cfg"].get("hf_model_name"):
        return f"its text tower is Hugging Face's {name}"
    if not isinstance(text, TextTransformer):
        return f"its text tower is a {type(text).__name__}"
    if model.clip.logit_bias is not None:
        return "it has a logit bias (SigLIP)"
    if preprocess["resize_mode"] == "longest":
        return "its pictures are padded to squares (resize_mode longest)"
    return _image_reason(visual) or _text_reason(text)


def _image_reason(visual: VisionTransformer) -> str | None:
    if any(len(set(size)) > 1 for size in cast(Any, (visual.image_size, visual.patch_size))):
        return "its images or patches are not square"
    if visual.attn_pool is not None or visual.pool_type != "tok":
        return "its image tower does not read the class token"
    if not isinstance(visual.ln_pre, nn.LayerNorm):
        return "its image tower has no norm before the blocks (no_ln_pre)"
    return _block_reason(visual, "image")


def _text_reason(text: TextTransformer) -> str | None:
    if text.attn_mask is None:
        return "its text tower is not causal (SigLIP)"
    if text.cls_emb is not None:
        return "its text tower has a class token (CoCa)"
    if text.pool_type not in ("argmax", "eos"):
        return f"its text tower reads the {text.pool_type} token (pool_type)"
    if text.pool_type == "eos" and text.eos_id == ARGMAX:
        return f"its end-of-text id is {ARGMAX}, which CLIPModel takes for another rule"
    if not isinstance(text.text_projection, Tensor):
        return "its text projection is not a plain matrix (proj_type, proj_bias)"
    return _block_reason(text, "text")


def _block_reason(tower: Any, name: str) -> str | None:
    for block in tower.transformer.resblocks:
        if type(block) not in (ResidualAttentionBlock, LeanBlock):
            return f"its {name} tower has blocks with more norms or scales ({type(block).__name__})"
        if not isinstance(block.ls_1, nn.Identity):
            return f"its {name} tower has layer scale (ls_init_value)"
        if _activation(tower) is None:
            return f"its {name} tower's activation is {block.mlp.gelu}"
    if len({m.eps for m in tower.modules() if isinstance(m, nn.LayerNorm)}) != 1:
        return f"the norms of its {name} tower have several eps"
    return None


def _activation(tower: Any) -> str | None:
    """``hidden_act``: transformers' name of the blocks' activation."""
    gelu = tower.transformer.resblocks[0].mlp.gelu
    if isinstance(gelu, QuickGELU):
        return "quick_gelu"
    if type(gelu) is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_pytorch_tanh"}[gelu.approximate]
    return None


def hf_config(model: LoadedModel) -> dict[str, Any]:
    """Arguments of transformers' ``CLIPConfig``."""
    visual, text = cast(Any, model.clip.visual), cast(Any, model.clip.text)
    vision_config = _sizes(visual) | {
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "projection_dim": model.embed_dim,
    }
    text_config = _sizes(text) | {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "projection_dim": model.embed_dim,
        "eos_token_id": _eos(model),
    }
    if model.tokenizer.name is None:
        text_config |= {"bos_token_id": START, "pad_token_id": END}
    else:
        text_config |= {"bos_token_id": None, "pad_token_id": model.tokenizer.pad_id}
    return {
        "vision_config": vision_config,
        "text_config": text_config,
        "projection_dim": model.embed_dim,
        "logit_scale_init_value": float(model.clip.logit_scale.detach()),
    }


def _sizes(tower: Any) -> dict[str, Any]:
    block = tower.transformer.resblocks[0]
    return {
        "hidden_size": block.attn.embed_dim,
        "intermediate_size": block.mlp.c_fc.out_features,
        "num_hidden_layers": len(tower.transformer.resblocks),
        "num_attention_heads": block.attn.num_heads,
        "hidden_act": _activation(tower),
        "layer_norm_eps": block.ln_1.eps,
    }


def _eos(model: LoadedModel) -> int:
    """``eos_token_id``, the token that is read. open_clip's argmax reads at the highest id: of CLIP's own
    tokenizer that is the end of the text."""
    text = cast(Any, model.clip.text)
    if text.pool_type == "eos":
        return int(text.eos_id)
    return END if model.tokenizer.name is None else ARGMAX


def hf_state(clip: nn.Module) -> dict[str, Tensor]:
    """State dict of ``CLIPModel`` from that of open_clip's model."""
    visual, text = cast(Any, clip.visual), cast(Any, clip.text)
    state: dict[str, Tensor] = {
        "logit_scale": cast(Tensor, clip.logit_scale),
        "visual_projection.weight": visual.proj.t(),
        "text_projection.weight": text.text_projection.t(),
        "vision_model.embeddings.class_embedding": visual.class_embedding,
        "vision_model.embeddings.patch_embedding.weight": visual.conv1.weight,
        "vision_model.embeddings.position_embedding.weight": visual.positional_embedding,
        "text_model.embeddings.token_embedding.weight": text.token_embedding.weight,
        "text_model.embeddings.position_embedding.weight": text.positional_embedding,
    }
    state |= _pair("vision_model.pre_layrnorm", visual.ln_pre)  # transformers' spelling
    state |= _pair("vision_model.post_layernorm", visual.ln_post)
    state |= _pair("text_model.final_layer_norm", text.ln_final)
    for name, tower in (("vision_model", visual), ("text_model", text)):
        for i, block in enumerate(tower.transformer.resblocks):
            state |= _block_state(f"{name}.encoder.layers.{i}", block)
    return {name: value.detach().clone().contiguous() for name, value in state.items()}


def _block_state(prefix: str, block: Any) -> dict[str, Tensor]:
    state = _pair(f"{prefix}.layer_norm1", block.ln_1) | _pair(f"{prefix}.layer_norm2", block.ln_2)
    state |= _pair(f"{prefix}.mlp.fc1", block.mlp.c_fc) | _pair(f"{prefix}.mlp.fc2", block.mlp.c_proj)
    state |= _pair(f"{prefix}.self_attn.out_proj", block.attn.out_proj)
    for part in ("weight", "bias"):
        split = getattr(block.attn, f"in_proj_{part}").chunk(3)
        state |= {f"{prefix}.self_attn.{k}_proj.{part}": v for k, v in zip("qkv", split, strict=True)}
    return state


def _pair(name: str, module: Any) -> dict[str, Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


def _preprocess(model: LoadedModel) -> dict[str, Any]:
    """Arguments of ``CLIPImageProcessor``."""
    known, side = model.config["preprocess_cfg"], model.image_size
    square = {"height": side, "width": side}
    shortest = known["resize_mode"] == "shortest"
    return {
        "size": {"shortest_edge": side} if shortest else square,
        "crop_size": square,
        "do_center_crop": shortest,
        "resample": RESAMPLE[known["interpolation"]],
        "image_mean": list(known["mean"]),
        "image_std": list(known["std"]),
    }


def _write_tokenizer(model: LoadedModel, folder: Path, say: Say) -> None:
    """The files of ``CLIPTokenizer``, for CLIP's own tokenizer as CLIP cleans texts."""
    settings = model.config["model_cfg"]["text_cfg"].get("tokenizer_kwargs") or {}
    if model.tokenizer.name is not None or settings.get("clean", "lower") != "lower":
        say("without tokenizer files: only CLIP's own tokenizer has them in this format")
        return
    from transformers import CLIPTokenizer

    clip = SimpleTokenizer()
    renamed = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {renamed.get(word, word): number for word, number in clip.encoder.items()}
    made: Any = CLIPTokenizer(
        vocab=vocabulary,
        merges=cast(Any, list(clip.bpe_ranks)),
        model_max_length=model.tokenizer.context_length,
    )
    made.save_pretrained(folder)


@torch.inference_mode()
def differences(model: LoadedModel, hf: Any, *, n: int = 8) -> dict[str, float]:
    """Largest absolute differences between both models in fp32 on random pixels and texts: of image and text
    features, in units of the feature vector's length, and of logits."""
    clip = model.clip
    random = torch.Generator().manual_seed(0)
    pixels = torch.randn(n, 3, model.image_size, model.image_size, generator=random)
    ids = random_ids(model, n, random)
    theirs = hf(input_ids=ids, pixel_values=pixels)
    raw = (
        hf.visual_projection(hf.vision_model(pixel_values=pixels).pooler_output),
        hf.text_projection(hf.text_model(input_ids=ids).pooler_output),
    )
    ours = _first(clip.visual(pixels)), _first(clip.text(ids))
    lengths = [x.norm(dim=1, keepdim=True) for x in ours]
    logits = clip.logit_scale.exp() * (ours[0] / lengths[0]) @ (ours[1] / lengths[1]).t()
    return {
        "image features": float(((ours[0] - raw[0]) / lengths[0]).abs().max()),
        "text features": float(((ours[1] - raw[1]) / lengths[1]).abs().max()),
        "logits": float((logits - theirs.logits_per_image).abs().max()),
    }


def _first(features: Any) -> Tensor:
    return features[0] if isinstance(features, tuple) else features


def random_ids(model: LoadedModel, n: int, random: torch.Generator) -> Tensor:
    """Texts of random ids int64 [n, context_length] and random lengths, ended and padded as the tokenizer
    does."""
    text = cast(Any, model.clip.text)
    own = model.tokenizer.name is None
    top = min(text.vocab_size, START) if own else text.vocab_size
    length = text.context_length
    ids = torch.randint(0, top, (n, length), generator=random)
    ends = torch.randint(1, length, (n,), generator=random)
    ids[torch.arange(length) > ends[:, None]] = model.tokenizer.pad_id
    if text.pool_type == "eos" or own:
        ids[torch.arange(n), ends] = _eos(model)
    return ids
