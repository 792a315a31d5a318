"""Low-rank adaptation of the towers' weight matrices (LoRA, Hu et al. 2021, arXiv 2106.09685).

W becomes W + (alpha / rank) B A, A [rank, in] random and B [out, rank] zero at the start, and only A and B
are trained. It is a parametrization of the weight itself, not a layer beside it: whatever reads the weight
reads the adapted one, the packed ``in_proj_weight`` of attention included, and the blocks that compute
attention without ``nn.MultiheadAttention``. Queries, keys and values that are packed in one matrix have an A
and a B each. There is no dropout: it would act on a layer's input, which a change of the weight does not see.
"""

import re
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...configs.errors import UserError

__all__ = ["LowRank", "Targets", "add_lora", "lora_weights", "merge_lora"]

Targets = Literal["attention", "all"]
_IN_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_PACKED = {"in_proj_weight": 3, "qkv.weight": 3, ".kv.weight": 2}
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")  # nn.MultiheadAttention with other keys


class LowRank(nn.Module):
    """W [out, in] -> W + scale * B A; ``parts`` blocks of rows have factors of their own.

    A: [parts, rank, in], B: [parts, out / parts, rank].
    """

    def __init__(self, weight: Tensor, rank: int, alpha: float, parts: int = 1) -> None:
        super().__init__()
        rows, columns = weight.shape
        assert rows % parts == 0, f"{rows} rows do not fall into {parts} parts"
        self.scale = alpha / rank
        self.A = nn.Parameter(weight.new_empty(parts, rank, columns))
        self.B = nn.Parameter(weight.new_zeros(parts, rows // parts, rank))
        nn.init.uniform_(self.A, -(columns**-0.5), columns**-0.5)  # nn.Linear's own, as in the paper's code

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight, of the same shape."""
        return weight + self.scale * (self.B @ self.A).flatten(0, 1)


def lora_weights(tower: nn.Module, targets: Targets) -> list[tuple[nn.Module, str, int]]:
    """(module, name of its weight, parts) of the matrices that are adapted.

    ``attention``: projections to queries, keys and values, packed or not, and the one behind them, of
    open_clip's, timm's and Hugging Face's towers. ``all``: every linear layer as well, an MLP's too.
    """
    return list(_weights(tower, targets))


def _weights(tower: nn.Module, targets: Targets) -> Iterator[tuple[nn.Module, str, int]]:
    for path, module in tower.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            linear = isinstance(module, nn.Linear) and name == "weight"
            if name in ("in_proj_weight", *_SEPARATE) or (linear and (targets == "all" or _projects(path))):
                parts = next((n for end, n in _PACKED.items() if f".{path}.{name}".endswith(end)), 1)
                yield module, name, parts if len(parameter) % parts == 0 else 1


def _projects(path: str) -> bool:
    """Whether a linear layer stands in attention, and not in an MLP within it (attention pooling has one)."""
    parts = path.split(".")
    inside = [i for i, part in enumerate(parts) if _IN_ATTENTION.search(part)]
    return bool(inside) and not any("mlp" in part for part in parts[inside[0] :])


def add_lora(tower: nn.Module, targets: Targets, rank: int, alpha: float) -> int:
    """Freeze a tower and put low-rank factors on its weights, in place; returns how many were adapted.

    The output is unchanged until B is. Raises UserError for a tower without such weights.
    """
    for parameter in tower.parameters():
        parameter.requires_grad_(False)
    found = lora_weights(tower, targets)
    if not found:
        raise UserError(no_weights(tower, targets))
    for module, name, parts in found:
        weight = getattr(module, name)
        parametrize.register_parametrization(module, name, LowRank(weight, rank, alpha, parts))
    return len(found)


def no_weights(tower: nn.Module, targets: Targets) -> str:
    """Why a tower cannot be adapted."""
    more = " or lora_targets: all" if targets == "attention" else ""
    what = "attention" if targets == "attention" else "linear layer"
    return (
        f"adapt.method: lora finds no {what} in {type(tower).__name__}; set method: norm_bias or full{more}"
    )


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Make every adapted weight a plain parameter again that holds W + scale * B A, in place."""
    for layer in list(module.modules()):
        if parametrize.is_parametrized(layer):
            for name in list(layer.parametrizations):  # pyright: ignore[reportArgumentType]  a ModuleDict
                # a ModuleDict
                assert isinstance(layer.parametrizations[name][0], LowRank)  # pyright: ignore[reportIndexIssue]
                parametrize.remove_parametrizations(layer, name, leave_parametrized=True)
