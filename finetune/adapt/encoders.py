"""What of the encoders a method trains, and at which rates."""

from collections.abc import Collection, Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import nn

from ...configs.errors import UserError
from ...pretrain.layer_decay import layer_scales
from ...pretrain.model import Encoders
from ...pretrain.optim import decays
from ...pretrain.zero_shot import Prompts, class_name_prompts
from ..config import ENCODED, AdaptConfig, FinetuneConfig
from .lora import add_lora, lora_weights, no_weights

__all__ = [
    "check_methods",
    "class_texts",
    "encoder_groups",
    "norms_and_biases",
    "open_encoders",
    "parameter_groups",
]

Groups = list[dict[str, Any]]


def check_methods(config: FinetuneConfig, model: Encoders, classes: Sequence[str]) -> None:
    """Refuse, before anything is trained, what a head's method cannot do with these encoders and classes.

    Raises UserError.
    """
    for name, head in config.all_heads().items():
        adapt = config.adapt_of(name)
        if not adapt.tunes_encoders:
            continue
        for k in trained_towers([head.op] if head.single else config.data.modalities, adapt):
            tower = _towers(model)[k]
            if adapt.method == "lora" and not lora_weights(tower, adapt.lora_targets):
                raise UserError(no_weights(tower, adapt.lora_targets))
            layer_scales(tower, adapt.encoder_layer_decay)
        texts = adapt.method == "contrastive" and config.task.type != "retrieval"
        if texts or adapt.class_prompts is not None:
            class_texts(adapt, classes)  # others measure with them what the encoders still know


def class_texts(adapt: AdaptConfig, classes: Sequence[str]) -> Prompts:
    """The texts of each class, in the order of ``classes``; UserError for a class without any, and for texts
    of what is no class."""
    if adapt.class_prompts is None:
        return {name: class_name_prompts([name])[name] for name in classes}
    for name in [name for name in adapt.class_prompts if name not in classes][:1]:
        near = get_close_matches(name, classes, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else "remove it"
        raise UserError(f"adapt.class_prompts: '{name}' is no class of the task; {hint}")
    missing = [name for name in classes if name not in adapt.class_prompts]
    if missing:
        raise UserError(f"adapt.class_prompts: class '{missing[0]}' has no text; add one")
    given = {name: adapt.class_prompts[name] for name in classes}
    return {name: [texts] if isinstance(texts, str) else texts for name, texts in given.items()}


def _towers(model: Encoders) -> dict[str, nn.Module]:
    return {k: t for k, t in (("image", model.clip.visual), ("text", model.clip.text)) if t is not None}


def trained_towers(modalities: Collection[str], adapt: AdaptConfig) -> tuple[str, ...]:
    """The towers that are trained for a head that reads ``modalities``: those, and the text tower where texts
    of classes are compared with."""
    reads = tuple(k for k in ENCODED if k in modalities)
    return tuple(dict.fromkeys((*reads, "text"))) if adapt.method == "contrastive" else reads


def open_encoders(model: Encoders, modalities: Sequence[str], adapt: AdaptConfig) -> None:
    """Let what the method trains of the towers be trained, and nothing else. They stay in eval mode: batch
    norms keep their statistics, and nothing is dropped."""
    for parameter in model.clip.parameters():
        parameter.requires_grad_(False)
    for k in trained_towers(modalities, adapt):
        tower = _towers(model)[k]
        if adapt.method == "lora":
            add_lora(tower, adapt.lora_targets, adapt.lora_rank, adapt.lora_alpha)
            continue
        chosen = norms_and_biases(tower) if adapt.method == "norm_bias" else None
        for name, parameter in tower.named_parameters():
            parameter.requires_grad_(chosen is None or name in chosen)


def norms_and_biases(tower: nn.Module) -> set[str]:
    """Names of a tower's biases and of all parameters of its norms."""
    names: set[str] = set()
    for path, module in tower.named_modules():
        norm = "norm" in type(module).__name__.lower() or isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters(recurse=False):
            if norm or name.endswith("bias"):
                names.add(f"{path}.{name}" if path else name)
    return names


def parameter_groups(module: nn.Module, weight_decay: float) -> Groups:
    """A module's trainable parameters in two groups for an optimizer: with weight decay and without."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    return [
        {"params": [p for n, p in named if decays(n, p)], "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def encoder_groups(model: Encoders, adapt: AdaptConfig) -> Groups:
    """What is trained of the encoders, in a group per rate: ``encoder_lr`` relative to ``lr``, falling from
    layer to layer towards the input with ``encoder_layer_decay``."""
    found: dict[tuple[float, bool], list[torch.Tensor]] = {}
    for tower in _towers(model).values():
        trained = [(n, p) for n, p in tower.named_parameters() if p.requires_grad]
        scales = layer_scales(tower, adapt.encoder_layer_decay) if trained else {}
        for name, parameter in trained:
            found.setdefault((scales[name], decays(name, parameter)), []).append(parameter)
    rate = adapt.peak_encoder_lr / adapt.lr
    return [
        {
            "params": parameters,
            "weight_decay": adapt.weight_decay if decayed else 0.0,
            "lr_scale": rate * scale,
        }
        for (scale, decayed), parameters in found.items()
    ]
