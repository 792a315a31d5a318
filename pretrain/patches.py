"""From pixels to tokens, for open_clip's and timm's ViTs: a matrix product, and positions for any side.

A convolution whose stride is its kernel size is a matrix product of patches. Dropped patches are left out
before it, so that they cost nothing.
"""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from .cpu_linear import linear


def patch_grid(image: Tensor, patch_size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of whole patches in images [b, 3, H, W]."""
    return image.shape[2] // patch_size[0], image.shape[3] // patch_size[1]


def project_patches(image: Tensor, convolution: nn.Conv2d, kept: Tensor | None) -> Tensor:
    """What a patch-embedding convolution gives for the kept patches (int64 [b, n]; None: all), [b, n, width].

    Pixels past the last whole patch are left out, as a convolution without padding does.
    """
    height, width = convolution.kernel_size
    rows, columns = patch_grid(image, (height, width))
    image = image[:, :, : rows * height, : columns * width]
    patches = rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=height, q=width)
    if kept is not None:
        patches = patches.gather(1, kept[..., None].expand(-1, -1, patches.shape[2]))
    return linear(patches, convolution.weight.flatten(1), convolution.bias)


def resample_positions(positions: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Position embeddings [rows * columns, width] of one grid on another, differentiable; bicubic with
    antialiasing, as open_clip and timm resize a checkpoint's. The same tensor where the grids are equal."""
    if old == new:
        return positions
    dtype = torch.float64 if positions.dtype == torch.float64 else torch.float32
    grid = positions.to(dtype).view(1, *old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=new, mode="bicubic", antialias=True, align_corners=False)
    return grid.permute(0, 2, 3, 1).flatten(0, 2).to(positions.dtype)


def add_positions(x: Tensor, positions: Tensor, kept: Tensor | None) -> Tensor:
    """Tokens [b, n, width] of the kept patches plus the positions [N, width] of all."""
    return x + (positions if kept is None else F.embedding(kept, positions)).to(x.dtype)
