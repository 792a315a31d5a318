"""What a config would do, before it does it: shapes, parameters, work, memory, steps."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..data.stages import check_stages
from ..data.stream import open_stream
from ..data.text import tokenizer_for
from .config import PretrainConfig
from .contrastive import contrastive_loss
from .distributed import world_size
from .fit import check_fit, check_length, notes
from .locking import lock
from .manifest import size_text
from .model import ContrastiveModel, build_model, image_size, open_clip_config

__all__ = ["dry_run"]

STATE_BYTES = 16  # per trained parameter: fp32 weight, gradient and AdamW's two moments
WEIGHT_BYTES, MOMENT_BYTES = 4, 8
PROBE = 8  # samples


def dry_run(config: PretrainConfig) -> Iterator[str]:
    """Build the model and the stream, run a few samples forward and backward on the CPU, and describe the run
    line by line. Writes nothing. Raises UserError as training would."""
    clip = build_model(config.model, load_weights=False)
    check_fit(config, clip)
    lock(clip, config.lock)
    clip.set_grad_checkpointing(config.train.grad_checkpointing)
    text_cfg = open_clip_config(clip)["model_cfg"]["text_cfg"]
    tokenizer = tokenizer_for(text_cfg, getattr(clip, "text_folder", None))
    root = ContrastiveModel(clip, pad_id=tokenizer.pad_id, seed=config.seed)
    side = image_size(clip)
    probe = min(PROBE, config.train.global_batch_size)
    stream = open_stream(
        config.data.model_copy(update={"workers": 0}),
        seed=config.seed,
        global_batch_size=config.train.global_batch_size,
        image_size=side,
        tokenizer=tokenizer,
    )
    batch = next(iter(stream))
    stream.close()
    steps = config.train.total_samples and -(-config.train.total_samples // config.train.global_batch_size)
    steps = steps or max(1, round((config.train.epochs or 0) * stream.steps_per_epoch))
    check_stages(config.stages, tokenizer.context_length)
    check_length(config, steps * config.train.global_batch_size)
    shares = [root.patch_dropout if s.patch_dropout is None else s.patch_dropout for s in config.stages]
    own, root.patch_dropout = root.patch_dropout, min(shares, default=root.patch_dropout)
    trainable = sum(p.numel() for p in clip.parameters() if p.requires_grad)
    images = sum(p.numel() for p in clip.visual.parameters())
    texts = sum(p.numel() for p in clip.text.parameters())
    flops, saved = _measure(root, _few(batch, probe))
    parameters, batch_size = images + texts, config.train.global_batch_size
    for line in stream.describe():
        yield f"data: {line}"
    yield f"data: {stream.num_samples:,} samples, {stream.steps_per_epoch} steps an epoch"
    yield f"run: {steps:,} steps of {batch_size:,} samples, {steps * batch_size:,} in all"
    locked = f"; {(parameters - trainable) / 1e6:.1f} M of them locked" if trainable < parameters else ""
    yield (
        f"image tower: {images / 1e6:.1f} M parameters at {side} px; text tower: {texts / 1e6:.1f} M{locked}"
    )
    for name in ("image", "token_ids", "seq_lens", "valid"):
        value: Tensor = batch[name]
        yield f"global batch: {name} {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    lengths = batch["seq_lens"]
    yield (
        f"captions: {lengths.float().mean():.1f} tokens on average of {tokenizer.context_length}, "
        f"{batch['cut_captions'] / len(lengths):.1%} longer and cut; "
        f"{int((~batch['valid']).sum())} damaged samples in the first batch"
    )
    most = " in the dearest stage" if config.stages else ""
    yield f"work: {flops / probe / 1e9:.2f} GFLOP a sample{most}, forward and backward"
    yield from _memory(config, trainable, parameters, saved / probe)
    yield _disk(config, trainable, parameters)
    yield from _stages(config, own)
    yield from notes(config, clip, world_size())


def _memory(config: PretrainConfig, trainable: int, parameters: int, saved: float) -> Iterator[str]:
    """``saved``: bytes of activations a sample."""
    weights = (STATE_BYTES * trainable + WEIGHT_BYTES * (parameters - trainable)) / 2**30
    most = config.train.global_batch_size
    at_once = min(config.train.micro_batch_size or most, most)
    what = "a global batch" if at_once == most else f"{at_once} at a time"
    yield (
        f"memory: {weights:.2f} GiB for weights, gradients and optimizer, and {saved / 2**20:.2f} MiB of "
        f"activations a sample ({saved * at_once / 2**30:.2f} GiB {what})"
    )


def _disk(config: PretrainConfig, trainable: int, parameters: int) -> str:
    weights = WEIGHT_BYTES * parameters * (2 if config.optim.ema_decay else 1)
    size = weights + MOMENT_BYTES * trainable
    n = config.checkpoint.keep + 1  # the oldest goes when the newest is whole
    return f"disk: {size_text(size)} a checkpoint, up to {n} at a time: {size_text(n * size)}"


def _stages(config: PretrainConfig, own: float) -> Iterator[str]:
    for stage in config.stages:
        end = "the end" if stage.until_samples is None else f"{stage.until_samples:,} samples"
        dropout = own if stage.patch_dropout is None else stage.patch_dropout
        parts = [
            f"images of {stage.image_size} px" if stage.image_size else "whole images",
            f"captions of at most {stage.text_len} tokens" if stage.text_len else "whole captions",
            *([f"{dropout:.0%} of the patches dropped"] if dropout else []),
        ]
        yield f"stage until {end}: {', '.join(parts)}"


def _few(batch: dict[str, Any], n: int) -> dict[str, Any]:
    """The first n samples of a batch."""
    tokens = int(batch["seq_lens"][:n].sum())
    return {
        "image": batch["image"][:n],
        "seq_lens": batch["seq_lens"][:n],
        "token_ids": batch["token_ids"][:tokens],
    }


def _measure(root: ContrastiveModel, batch: dict[str, Any]) -> tuple[int, int]:
    """FLOPs of forward and backward, and bytes of tensors kept for the backward, both for these samples."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in root.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    root.train()
    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = contrastive_loss(**root(batch))
        loss.backward()
    return counter.get_total_flops(), sum(kept.values())
