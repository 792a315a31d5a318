"""open_clip's VisionTransformer with less work and the same result.

The patch embedding is a matrix product (a convolution whose stride is its kernel size is one), and where only
the class token is read, the last block computes only that query (see ``blocks``).
"""

import torch
from einops import rearrange
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Group, Sequences, run_blocks, supports_blocks


def encode_image(tower: nn.Module, image: Tensor) -> Tensor:
    """Image features [b, D], not normalised, of normalised images [b, 3, H, W], equal to ``tower(image)``.

    Towers other than open_clip's own ViT run as they are.
    """
    if not isinstance(tower, VisionTransformer) or supports_blocks(tower.transformer) is not None:
        features = tower(image)
        return features[0] if isinstance(features, tuple) else features
    x = embed_patches(tower, image)
    if tower.attn_pool is None and tower.pool_type == "tok":
        b, length, _ = x.shape
        sequences = Sequences(
            (Group(b, length),), False, torch.arange(0, b * length, length, device=x.device)
        )
        pooled = tower.ln_post(run_blocks(tower.transformer, x.flatten(0, 1), sequences))
    else:
        pooled, _ = tower._pool(tower.transformer(x))  # pyright: ignore[reportPrivateUsage]
    return pooled if tower.proj is None else pooled @ tower.proj


def embed_patches(tower: VisionTransformer, image: Tensor) -> Tensor:
    """Tokens [b, 1 + patches, width] that enter the first block: the tower's ``_embeds`` with a matrix
    product.

    Pixels past the last whole patch are left out, as a convolution without padding does.
    """
    height, width = tower.patch_size
    rows, columns = image.shape[2] // height, image.shape[3] // width
    image = image[:, :, : rows * height, : columns * width]
    patches = rearrange(image, "b c (h p) (w q) -> b (h w) (c p q)", p=height, q=width)
    x = F.linear(patches, tower.conv1.weight.flatten(1))
    x = torch.cat([tower.class_embedding.to(x.dtype).expand(x.shape[0], 1, -1), x], dim=1)
    return tower.ln_pre(tower.patch_dropout(x + tower.positional_embedding.to(x.dtype)))
