"""torch.compile for the parts of the blocks whose shapes change in one dimension only.

Compiled are the MLPs of the transformer blocks, where most of the work lies: token-wise, so that whatever the
captions' lengths only the number of tokens changes, and one dynamic graph serves every batch. Attention,
whose layout changes from batch to batch, stays outside. Modules are compiled in place: names, hooks,
checkpointing and DDP see no difference.

Off by default: on a CPU it does not pay (benchmarks/compile.py, one AVX-512 thread: 0.98 of the speed without
for ViT-S/16-128 and 64 LAION captions, 1.02 for two layers), and the first step takes 45 s, 2 s where
inductor's cache on disk has the graphs. 200 batches of different lengths are one graph.
"""

from collections.abc import Callable
from typing import Any

from timm.models.vision_transformer import Block
from torch import nn

from .blocks import LeanBlock, LeanCustomBlock

MAX_GRAPHS = 4
"""Graphs per kind of MLP (width and activation), at most: one for many tokens and one for a single token,
each with gradients and without."""


def compile_blocks(root: nn.Module, *, backend: str | Callable[..., Any] = "inductor") -> int:
    """Compile the MLP of every lean block of open_clip's and every block of timm's ViTs in ``root``, in
    place; returns their number."""
    blocks = [m for m in root.modules() if isinstance(m, LeanBlock | LeanCustomBlock | Block)]
    for block in blocks:
        block.mlp.compile(dynamic=True, backend=backend)
    return len(blocks)
