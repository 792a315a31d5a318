"""Image towers with less work and the same result.

For ViTs of open_clip and timm the patch embedding is a matrix product, images may have any side (position
embeddings are resampled, which the parameters do not notice), patches may be dropped before anything is
computed for them, and where only the class token is read, the last block computes only that query (see
``blocks``). Other towers run as they are.
"""

from typing import Any, cast

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import PatchDropout, VisionTransformer
from timm.layers.patch_dropout import PatchDropout as TimmPatchDropout
from torch import Tensor, nn
from torch.func import functional_call

from . import lean_timm
from .blocks import Group, Sequences, run_blocks, supports_blocks
from .patches import add_positions, patch_grid, project_patches, resample_positions


def encode_image(tower: nn.Module, image: Tensor, kept: Tensor | None = None) -> Tensor:
    """Image features [b, D], not normalised, of normalised images [b, 3, H, W], equal to ``tower(image)``.

    kept: int64 [b, n], the patches to look at (None: all), for towers with a ``patch_size``.
    """
    if isinstance(tower, TimmModel) and lean_timm.supports(tower.trunk) is None:
        return tower.head(lean_timm.encode(tower.trunk, image, kept))
    if not _is_lean(tower):
        assert kept is None, "this tower cannot drop patches"
        features = tower(image)
        return features[0] if isinstance(features, tuple) else features
    assert isinstance(tower, VisionTransformer)
    x = embed_patches(tower, image, kept)
    if tower.attn_pool is None and tower.pool_type == "tok":
        b, length, _ = x.shape
        sequences = Sequences(
            (Group(b, length),), False, torch.arange(0, b * length, length, device=x.device)
        )
        pooled = tower.ln_post(run_blocks(tower.transformer, x.flatten(0, 1), sequences))
    else:
        # open_clip has no public one
        pooled, _ = tower._pool(tower.transformer(x))  # pyright: ignore[reportPrivateUsage]
    return pooled if tower.proj is None else pooled @ tower.proj


def embed_patches(tower: VisionTransformer, image: Tensor, kept: Tensor | None = None) -> Tensor:
    """Tokens [b, 1 + patches, width] that enter the first block."""
    x = project_patches(image, tower.conv1, kept)
    new = patch_grid(image, cast(tuple[int, int], tower.patch_size))
    positions = resample_positions(tower.positional_embedding[1:], tower.grid_size, new)
    first = (tower.class_embedding + tower.positional_embedding[0]).to(x.dtype)
    return tower.ln_pre(torch.cat([first.expand(len(x), 1, -1), add_positions(x, positions, kept)], dim=1))


def _is_lean(tower: nn.Module) -> bool:
    return isinstance(tower, VisionTransformer) and supports_blocks(tower.transformer) is None


def patch_size(tower: nn.Module) -> tuple[int, int] | None:
    """Height and width of a patch in pixels where patches can be dropped and any side is taken, else None."""
    known: Any = tower
    if isinstance(tower, TimmModel) and lean_timm.supports(tower.trunk) is None:
        return known.trunk.patch_embed.patch_size
    return known.patch_size if _is_lean(tower) else None


def configured_dropout(tower: nn.Module) -> float:
    """Share of the patches that the tower's own config drops."""
    inner = getattr(tower, "patch_dropout", None) or getattr(
        getattr(tower, "trunk", None), "patch_drop", None
    )
    return float(inner.prob) if isinstance(inner, PatchDropout | TimmPatchDropout) else 0.0


@torch.no_grad()
def takes_side(tower: nn.Module, side: int) -> str | None:
    """None if square images of ``side`` pixels can be encoded, else the reason why not."""
    if patch := patch_size(tower):
        return f"its patches are {max(patch)} pixels wide" if side < max(patch) else None
    modes = [(module, module.training) for module in tower.modules()]
    tensors = [*tower.named_parameters(), *tower.named_buffers()]
    tower.eval()  # so that no batch norm speaks to other ranks
    try:  # shapes alone decide, so a forward without data tells
        meta = {name: torch.empty_like(t, device="meta") for name, t in tensors}
        functional_call(tower, meta, torch.empty(2, 3, side, side, device="meta", dtype=tensors[0][1].dtype))
    except (RuntimeError, AssertionError, ValueError) as error:
        return " ".join(str(error).split())[:200] or type(error).__name__
    finally:
        for module, training in modes:
            module.training = training
    return None
