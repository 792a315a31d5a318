"""Where a tower's parameters stand between input and output, for learning rates that fall towards the input.

Layer-wise decay keeps the general features of a pretrained tower's early layers (Clark et al., 2020, arXiv
2003.10555; Bao et al., 2021, arXiv 2106.08254): the rate of a layer is ``decay`` to the power of its distance
from the last one. Layers are counted as open_clip locks them and timm groups them: 0 are the embeddings or
the stem, then one per block (timm's groups for its towers), the projection into the joint space is the last.
"""

import re
from typing import Any, cast

from open_clip.hf_model import HFTextEncoder
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models import group_parameters
from torch import nn

from ..configs.errors import UserError

__all__ = ["layer_numbers", "layer_scales"]


def layer_numbers(tower: nn.Module) -> dict[str, int]:
    """Layer of each parameter by its name in the tower, from 0. Raises UserError for an unknown tower."""
    names = [name for name, _ in tower.named_parameters()]
    if isinstance(tower, TimmModel):
        trunk = cast(Any, tower.trunk)
        groups = cast(dict[str, int], group_parameters(trunk, trunk.group_matcher(), reverse=True))
        last = max(groups.values()) + 1
        return {name: groups.get(name.removeprefix("trunk."), last) for name in names}
    if isinstance(tower, VisionTransformer):
        stem = r"conv1|class_embedding|positional_embedding|ln_pre"
        return _count(names, stem, r"transformer\.resblocks\.(\d+)\.", r"ln_post")
    if isinstance(tower, TextTransformer):
        stem = r"token_embedding|positional_embedding|cls_emb"
        return _count(names, stem, r"transformer\.resblocks\.(\d+)\.", r"ln_final")
    if isinstance(tower, ModifiedResNet):
        return _count(names, r"conv\d|bn\d", r"layer([1-4])\.", None)
    if isinstance(tower, HFTextEncoder):
        stem = r"transformer\.(.+\.)?(embeddings|embed_tokens|embed_positions|shared)\b"
        return _count(names, stem, r"transformer\.(?:.+?\.)??(?:layers?|block)\.(\d+)\.", None)
    raise UserError(
        f"the layers of {type(tower).__name__} are unknown; leave layer-wise decay and unlocked groups out"
    )


def _count(names: list[str], stem: str, block: str, with_last_block: str | None) -> dict[str, int]:
    """0 for the stem, from 1 on for blocks, whatever follows them last."""
    found = {name: int(m.group(1)) for name in names if (m := re.match(block, name))}
    if not found:
        raise UserError(
            "no numbered layers are found in this tower; leave layer-wise decay and unlocked groups out"
        )
    first, last = min(found.values()), max(found.values())
    blocks = last - first + 1
    numbers: dict[str, int] = {}
    for name in names:
        if name in found:
            numbers[name] = found[name] - first + 1
        elif re.match(stem, name):
            numbers[name] = 0
        else:
            numbers[name] = blocks if with_last_block and re.match(with_last_block, name) else blocks + 1
    return numbers


def layer_scales(tower: nn.Module, decay: float) -> dict[str, float]:
    """Factor on the learning rate of each parameter, by its name in the tower: 1 for the last layer."""
    if decay == 1:
        return {name: 1.0 for name, _ in tower.named_parameters()}
    numbers = layer_numbers(tower)
    last = max(numbers.values())
    return {name: decay ** (last - number) for name, number in numbers.items()}
