"""How much arithmetic a training step is: what it computes, and what a padded, uncut step would compute.

Transformers are counted by formula: a layer of width d and MLP width h over a sequence of n tokens takes ``2
n (4 d^2 + 2 d h) + 4 n^2 d`` FLOP forward, and a last block of H heads that is read at one token only ``4 n H
d + 8 d^2 + 4 d h`` where keys and values are never formed, else ``4 n d^2 + 4 n d + 4 d^2 + 4 d h``. That is
open_clip's own count (docs/model_profile.csv) and ``FlopCounterMode``'s, to the last digit. Towers that are
no plain transformers are run once through ``FlopCounterMode``, on the meta device. A backward pass takes
twice its forward, less what the first layer's input would need. Norms, softmax, lookups, loss and optimizer
are left out: memory bounds them, but for the loss, which adds 8 b B D (B: the global batch).
"""

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .packing import supports_packing

__all__ = ["Costs", "Work", "forward_flops", "step_flops"]


@dataclass(frozen=True)
class Work:
    """FLOP of this process's share of one step, and its tokens.

    computed: really computed, with what is computed twice to save memory; needed: the same without that;
    dense: with every caption padded to the context, every patch kept, every token through every block.
    """

    computed: float
    needed: float
    dense: float
    patches: int
    tokens: int


@dataclass(frozen=True)
class _Sums:
    """Of sequence lengths: how many there are, sum of n, sum of n^2."""

    count: int
    n: int
    square: int

    @classmethod
    def of(cls, lengths: Tensor) -> "_Sums":
        lengths = lengths.long()
        return cls(len(lengths), int(lengths.sum()), int(lengths.square().sum()))

    @classmethod
    def equal(cls, count: int, length: int) -> "_Sums":
        return cls(count, count * length, count * length**2)


@dataclass(frozen=True)
class _Blocks:
    """A stack of pre-norm transformer blocks; ``pooled``: only one token is read behind the last one;
    ``heads``: of a last block that forms no keys and values then, None of one that does."""

    layers: int
    width: int
    mlp: int
    pooled: bool
    heads: int | None

    def flops(self, sums: _Sums, *, cut: bool) -> float:
        """Forward, of sequences with these lengths; ``cut`` where the last block is cut to what is read."""
        d, h = self.width, self.mlp
        layer = 2 * sums.n * (4 * d * d + 2 * d * h) + 4 * sums.square * d
        if not cut or not self.pooled:
            return self.layers * layer
        if self.heads is None:
            last = sums.n * (4 * d * d + 4 * d) + sums.count * (4 * d * d + 4 * d * h)
        else:
            last = sums.n * 4 * self.heads * d + sums.count * (8 * d * d + 4 * d * h)
        return (self.layers - 1) * layer + last


def _linear(module: Any) -> int:
    """FLOP of a projection per vector; 0 for none."""
    weight = getattr(module, "weight", module)
    return 2 * weight.numel() if isinstance(weight, Tensor) and weight.ndim == 2 else 0


class _Vit:
    """An image tower of patches and plain blocks."""

    def __init__(self, blocks: _Blocks, patch: tuple[int, int], prefix: int, head: int) -> None:
        self.blocks, self.patch, self.prefix, self.head = blocks, patch, prefix, head

    def grid(self, height: int, width: int) -> int:
        """Patches of an image."""
        return (height // self.patch[0]) * (width // self.patch[1])

    def flops(self, images: int, patches: int, *, cut: bool) -> tuple[float, float]:
        """Forward FLOP, and the embedding's part of them."""
        embed = images * patches * 2 * 3 * math.prod(self.patch) * self.blocks.width
        sums = _Sums.equal(images, self.prefix + patches)
        return self.blocks.flops(sums, cut=cut) + embed + images * self.head, embed


def _own_blocks(transformer: Any, pooled: bool) -> _Blocks:
    """Of open_clip's ``Transformer``."""
    block = transformer.resblocks[0]
    heads = None if getattr(block.attn, "ln_k", None) else int(block.attn.num_heads)
    return _Blocks(len(transformer.resblocks), transformer.width, block.mlp.c_fc.out_features, pooled, heads)


def _vit(visual: nn.Module) -> _Vit | None:
    """The tower's shape, None if the formula does not hold for it."""
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        blocks = _own_blocks(visual.transformer, visual.pool_type == "tok")
        return _Vit(blocks, cast(tuple[int, int], visual.patch_size), 1, _linear(visual.proj))
    trunk: Any = getattr(visual, "trunk", None)
    if type(trunk) is not TimmVisionTransformer or trunk.attn_pool is not None:
        return None
    first: Any = trunk.blocks[0]
    hidden = getattr(getattr(first.mlp, "fc1", None), "out_features", None)
    if hidden is None or first.mlp.fc2.in_features != hidden:  # gated
        return None
    heads = first.attn.num_heads if isinstance(first.attn.k_norm, nn.Identity) else None
    blocks = _Blocks(len(trunk.blocks), trunk.embed_dim, hidden, trunk.global_pool == "token", heads)
    projection = getattr(cast(Any, visual).head, "proj", None)
    head = _linear(projection) + _linear(trunk.head)
    return _Vit(blocks, trunk.patch_embed.patch_size, trunk.num_prefix_tokens, head)


def forward_flops(module: nn.Module, *inputs: Tensor) -> int:
    """FLOP of ``module(*inputs)`` by ``FlopCounterMode``, on the meta device: nothing is computed.

    Raises what the module raises where its code makes tensors on another device.
    """
    return _counted(module, inputs, backward=False)


def _counted(module: nn.Module, inputs: tuple[Tensor, ...], *, backward: bool) -> int:
    parameters = {n: t.detach().to("meta").requires_grad_(backward) for n, t in module.named_parameters()}
    state = parameters | {name: t.to("meta") for name, t in module.named_buffers()}
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        out = torch.func.functional_call(module, state, tuple(t.to("meta") for t in inputs))
        if backward:
            (out[0] if isinstance(out, tuple) else out).sum().backward()
    return counter.get_total_flops()


class Costs:
    """The work of every step of a ``ContrastiveModel``, from its batch."""

    def __init__(self, root: Any) -> None:
        """root: has ``clip``, and ``patch_dropout``, which is read at every step. Make it before the model is
        wrapped: a tower that is counted by running it is copied as it is now."""
        self.root, self.clip = root, root.clip
        self.vit = _vit(self.clip.visual)
        # in eval mode batch norms take stored statistics: they speak to no other process
        self._twin = None if self.vit else copy.deepcopy(self.clip.visual).to("meta").eval()
        self._run: dict[tuple[int, int], tuple[float, float]] = {}  # by size: forward, and see _image
        text = self.clip.text
        self.packed = supports_packing(text) is None
        cfg: Any = getattr(self.clip, "model_cfg", {}).get("text_cfg", {})
        self.context = int(getattr(text, "context_length", cfg.get("context_length", 77)))
        self.text = _text(text)

    def step(self, batch: Mapping[str, Any], *, recomputed: bool = False) -> Work:
        """Forward and backward of this local batch; ``recomputed`` where the forward runs twice (gradient
        cache, activation checkpointing). A frozen tower runs forward only; one that is partly frozen counts
        as trained."""
        images, (height, width) = len(batch["image"]), batch["image"].shape[-2:]
        keep = kept_patches(self.vit.grid(height, width), self.dropout()) if self.vit else None
        image = self._image(images, height, width, keep)
        text = self._text(batch["seq_lens"])
        needed = _step(self.clip.visual, image[0], image[2]) + _step(self.clip.text, text[0], 0)
        dense = _step(self.clip.visual, image[1], image[3]) + _step(self.clip.text, text[1], 0)
        again = image[0] + text[0] if recomputed else 0.0
        tokens = int(batch["seq_lens"].sum())
        return Work(needed + again, needed, dense, images * (keep or 0), tokens)

    def dropout(self) -> float:
        """The share of patches that is dropped at present."""
        return float(getattr(self.root, "patch_dropout", 0.0)) if self.root.training else 0.0

    def _image(self, n: int, height: int, width: int, keep: int | None) -> tuple[float, float, float, float]:
        """Forward FLOP computed and dense, and what both backwards lack to twice that: the gradient of the
        pixels."""
        if self.vit is None or keep is None:
            if (height, width) not in self._run:
                assert self._twin is not None
                image = (torch.zeros(2, 3, height, width),)
                forward, both = (_counted(self._twin, image, backward=b) / 2 for b in (False, True))
                self._run[height, width] = forward, 3 * forward - both
            total, pixels = (n * value for value in self._run[height, width])
            return total, total, pixels, pixels
        computed, embed = self.vit.flops(n, keep, cut=True)
        dense, all_embed = self.vit.flops(n, self.vit.grid(height, width), cut=False)
        return computed, dense, embed, all_embed

    def _text(self, seq_lens: Tensor) -> tuple[float, float]:
        blocks, head, extra = self.text
        count = len(seq_lens)
        longest = int(seq_lens.max()) if count else 0
        hf = not isinstance(self.clip.text, TextTransformer)
        if self.packed:
            computed = blocks.flops(_Sums.of(seq_lens + extra), cut=True)
        else:
            length = longest if hf else self.context + extra
            computed = blocks.flops(_Sums.equal(count, length), cut=False)
        dense = blocks.flops(_Sums.equal(count, self.context + extra), cut=False)
        return computed + count * head, dense + count * head


def _text(text: Any) -> tuple[_Blocks, int, int]:
    """Blocks, FLOP of the head per caption, and tokens that the tower adds to each caption."""
    if isinstance(text, TextTransformer):
        return (
            _own_blocks(text.transformer, True),
            _linear(text.text_projection),
            int(text.cls_emb is not None),
        )
    config = text.config  # Hugging Face's names
    width = int(config.hidden_size)
    hidden = int(getattr(config, "intermediate_size", 4 * width))
    head = sum(_linear(m) for m in text.proj.modules()) if isinstance(text.proj, nn.Module) else 0
    return _Blocks(int(config.num_hidden_layers), width, hidden, False, None), head, 0


def kept_patches(patches: int, dropout: float) -> int:
    """How many patches of an image stay; open_clip's and timm's rule."""
    return max(1, int(patches * (1 - dropout)))


def _step(tower: nn.Module, forward: float, embed: float) -> float:
    trained = any(parameter.requires_grad for parameter in tower.parameters())
    return 3 * forward - embed if trained else forward


@dataclass(frozen=True)
class _Kept:
    """A model whose share of dropped patches is what a caller says."""

    clip: nn.Module
    patch_dropout: float
    training: bool = True


def step_flops(
    clip: nn.Module, *, image_size: int, seq_lens: Tensor, patch_dropout: float = 0.0
) -> tuple[float, float]:
    """(computed, dense) FLOP of one step of ``len(seq_lens)`` pairs, forward and backward."""
    image = torch.empty(len(seq_lens), 3, image_size, image_size, device="meta")
    work = Costs(_Kept(clip, patch_dropout)).step({"image": image, "seq_lens": seq_lens})
    return work.computed, work.dense
