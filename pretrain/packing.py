"""Text features without padding: open_clip's text tower over real tokens only, exactly.

On web captions four of five tokens of a padded batch are padding. Here token-wise layers run over the
concatenated tokens of all captions and attention runs per caption (see ``blocks``). Which tokens matter
follows from the tower:

* causal, read at the end-of-text token (openai/CLIP issue 183): no token after the one that is read can
matter, so each caption is cut there, and padding never enters;
* bidirectional with ``use_pad_mask``: padding is never a key, so it is dropped;
* with a class token (CoCa, arXiv 2205.01917): keys are masked by padding, by one place too late in the
released weights (``correct_cls_mask: false``): the first padding token is then a key, and the class token not
its own. Both are kept.

A token whose key is masked and that is not read itself changes nothing and is dropped, wherever it stands:
CLIP's padding id 0 is also the token "!". Towers that attend to padding (SigLIP) run padded; those from
Hugging Face in groups of like lengths (see ``grouping``).
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from open_clip.hf_model import HFTextEncoder
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Group, Sequences, run_blocks, supports_blocks
from .grouping import cut_by_length

GROUP_OVERHEAD = 32
"""Tokens whose work equals what one more group costs. On LAION's lengths, forward and backward are 3.9 times
faster than padded to the longest caption (BERT of 6 layers, width 256, 64 captions) and 1.3 times (4 layers,
width 768, 16 captions); from 16 to 64 the time is flat."""


@dataclass(frozen=True)
class PackedText:
    """The tokens that matter of b captions, captions of equal length side by side.

    ids, positions: int64 [T]. is_class: bool [T], the class tokens, or None. caption: int64 [b], where each
    caption of the batch stands among the sequences.
    """

    ids: Tensor
    positions: Tensor
    is_class: Tensor | None
    sequences: Sequences
    caption: Tensor

    def to(self, device: torch.device) -> "PackedText":
        """The same on another device; a GPU's copies are not waited for."""
        is_class = None if self.is_class is None else self.is_class.to(device, non_blocking=True)
        ids, positions, caption = (
            t.to(device, non_blocking=True) for t in (self.ids, self.positions, self.caption)
        )
        return PackedText(ids, positions, is_class, self.sequences.to(device), caption)


def supports_packing(tower: nn.Module) -> str | None:
    """None if captions can be packed exactly for this text tower, else the reason why not."""
    if not isinstance(tower, TextTransformer):
        return f"{type(tower).__name__} is not open_clip's own text transformer"
    if tower.cls_emb is None:
        if tower.pool_type not in ("argmax", "eos", "first"):
            return f"pool_type '{tower.pool_type}' reads padding"
        if tower.attn_mask is None and not tower.use_pad_mask:
            return "it attends to padding (no_causal_mask without use_pad_mask)"
        if tower.pool_type == "argmax" and tower.pad_id != 0:
            return f"pool_type 'argmax' may read the padding id {tower.pad_id}"
    return supports_blocks(tower.transformer)


def encode_text(
    tower: nn.Module, token_ids: Tensor, seq_lens: Tensor, *, pad_id: int | None = None
) -> Tensor:
    """Text features [b, D], not normalised, of packed captions: int [sum(seq_lens)] and int [b].

    Equal to ``tower(padded)`` with captions padded to ``context_length`` by ``pad_id`` (None: the tower's
    own). Leave both tensors on the CPU: the layout is worked out there, and CUDA tensors would cost a wait
    for the device. Towers for which ``supports_packing`` gives a reason run padded.
    """
    device = next(tower.parameters()).device
    if supports_packing(tower) is not None:
        return _encode_padded(tower, token_ids, seq_lens, pad_id, device)
    assert isinstance(tower, TextTransformer)
    text = pack_text(tower, token_ids.cpu(), seq_lens.cpu()).to(device)
    # open_clip's get_cast_dtype asks a layer that may be wrapped
    dtype = cast(Any, tower.transformer.resblocks[0]).attn.in_proj_weight.dtype
    x = tower.token_embedding(text.ids).to(dtype)
    if tower.cls_emb is not None:
        assert text.is_class is not None
        x = torch.where(text.is_class[:, None], tower.cls_emb.to(dtype), x)
    x = x + F.embedding(text.positions, tower.positional_embedding).to(dtype)
    x = tower.ln_final(run_blocks(tower.transformer, x, text.sequences)).index_select(0, text.caption)
    if isinstance(tower.text_projection, nn.Linear):
        return tower.text_projection(x)
    return x if tower.text_projection is None else x @ tower.text_projection


def _encode_padded(
    tower: nn.Module, token_ids: Tensor, seq_lens: Tensor, pad_id: int | None, device: torch.device
) -> Tensor:
    """Features [b, D] of padded captions; Hugging Face's in groups of like lengths."""
    padded = pad_text(tower, token_ids, seq_lens, pad_id)
    # Sharded layers gather their weights at every call: all ranks must make as many.
    sharded = any(hasattr(parameter, "placements") for parameter in tower.parameters())
    if not isinstance(tower, HFTextEncoder) or sharded or len(seq_lens) < 2:
        return _features(tower, padded.to(device, non_blocking=True))
    lengths, order = seq_lens.cpu().long().sort(stable=True)
    sizes = cut_by_length(lengths, GROUP_OVERHEAD)
    parts = zip(padded[order.to(padded.device)].split(sizes), lengths.split(sizes), strict=True)
    moved = [part[:, : int(n[-1])].to(device, non_blocking=True) for part, n in parts]
    features = torch.cat([_features(tower, part) for part in moved])
    return features.index_select(0, order.argsort().to(device, non_blocking=True))


def _features(tower: nn.Module, padded: Tensor) -> Tensor:
    features = tower(padded)
    return features[0] if isinstance(features, tuple) else features


def pad_text(tower: nn.Module, token_ids: Tensor, seq_lens: Tensor, pad_id: int | None = None) -> Tensor:
    """Packed captions as int64 [b, L]: L is the tower's context_length; for Hugging Face towers, whose
    attention masks padding, the longest caption's."""
    hf = isinstance(tower, HFTextEncoder)
    if pad_id is None:
        pad_id = int(cast(Any, tower.config).pad_token_id) if hf else int(getattr(tower, "pad_id", 0))
    longest = int(seq_lens.max()) if len(seq_lens) else 1
    length = longest if hf else int(cast(Any, tower).context_length)
    return _grid(token_ids.long(), seq_lens, length, pad_id)


def _grid(token_ids: Tensor, seq_lens: Tensor, length: int, fill: int) -> Tensor:
    """[b, length] with each caption at the start of its row."""
    real = torch.arange(length, device=token_ids.device) < seq_lens.to(token_ids.device)[:, None]
    grid = token_ids.new_full(real.shape, fill)
    grid[real] = token_ids
    return grid


def pack_text(tower: TextTransformer, token_ids: Tensor, seq_lens: Tensor) -> PackedText:
    """Which tokens matter to this tower, and in which order they run; everything on the CPU.

    Raises AssertionError for a caption longer than the tower's context_length or without a token.
    """
    b, context = len(seq_lens), int(tower.context_length)
    lengths = seq_lens.long()
    assert b == 0 or (int(lengths.min()) > 0 and int(lengths.max()) <= context), (
        "caption empty or past context_length"
    )
    width = context if tower.cls_emb is not None else int(lengths.max()) if b else 1
    causal = tower.attn_mask is not None
    ids = _grid(token_ids.long(), lengths, width, int(tower.pad_id))
    position = torch.arange(width)
    sees_itself = None
    if tower.cls_emb is not None:
        keep, sees_itself = _keys_with_class(ids, int(tower.pad_id), bool(tower.correct_cls_mask))
        ids = F.pad(ids, (0, 1))
        position = torch.arange(width + 1)
        read = position.new_full((b,), width)
    else:
        read = _read_position(tower, ids, lengths)
        keep = position <= read[:, None] if causal else (ids != tower.pad_id) & (position < lengths[:, None])
    kept = keep.sum(1)
    key = kept if sees_itself is None else 2 * kept + sees_itself
    order = key.argsort(stable=True)
    keep, kept = keep[order], kept[order]
    pooled = kept.cumsum(0) - kept + (keep & (position <= read[order, None])).sum(1) - 1
    caption = torch.empty_like(order)
    caption[order] = torch.arange(b)
    return PackedText(
        ids=ids[order][keep],
        positions=position.expand(b, -1)[keep],
        is_class=None if sees_itself is None else (position == width).expand(b, -1)[keep],
        sequences=Sequences(_groups(key[order], causal, sees_itself is not None), causal, pooled),
        caption=caption,
    )


def _read_position(tower: TextTransformer, ids: Tensor, lengths: Tensor) -> Tensor:
    """Where each caption is read, int64 [b]; the rules of open_clip's ``text_global_pool``."""
    if tower.pool_type == "first":
        return torch.zeros_like(lengths)
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    score = (
        ids.masked_fill(~real, -1) if tower.pool_type == "argmax" else ((ids == tower.eos_id) & real).int()
    )
    return score.argmax(1)  # the first of equal maxima


def _keys_with_class(ids: Tensor, pad_id: int, correct: bool) -> tuple[Tensor, Tensor]:
    """Tokens to keep, bool [b, L + 1] with the class token last, and whether the class token sees itself,
    bool [b]."""
    real = ids != pad_id
    yes = real.new_ones((len(ids), 1))
    key = torch.cat([real, yes] if correct else [yes, real], 1)
    return torch.cat([key[:, :-1], yes], 1), key[:, -1]


def _groups(key: Tensor, causal: bool, with_class: bool) -> tuple[Group, ...]:
    """Groups of equal sorted keys: the length, or twice the length plus whether the class token sees
    itself."""
    values, counts = key.unique_consecutive(return_counts=True)
    groups: list[Group] = []
    for value, count in zip(values.tolist(), counts.tolist(), strict=True):
        if not with_class or value % 2:
            groups.append(Group(count, value // 2 if with_class else value))
            continue
        mask = torch.ones(value // 2, value // 2, dtype=torch.bool)
        mask = mask.tril() if causal else mask
        mask[-1 if causal else slice(None), -1] = False
        groups.append(Group(count, value // 2, mask))
    return tuple(groups)
