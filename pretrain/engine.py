"""What a run asks of Accelerate, DDP and FSDP: precision, placement, averaged gradients."""

import ctypes
import os
import warnings
from types import MappingProxyType
from typing import Any, Literal

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from ..configs.errors import UserError
from ..data.text import Tokenizer
from . import distributed
from .agree import on_rank_0, together
from .contrastive import contrastive_loss
from .distributed import no_sync
from .model import ContrastiveModel, image_size
from .units import units

__all__ = [
    "Parallel",
    "build_accelerator",
    "keep_freed_memory",
    "no_sync",
    "on_rank_0",
    "prepare",
    "set_threads",
    "settle_buckets",
    "together",
]

Parallel = Literal["ddp", "fsdp"]
"""``ddp``: every process holds all parameters. ``fsdp``: every process holds its part of them."""


def set_threads(threads: int | None) -> None:
    """CPU threads of this process: ``threads``, or what ``OMP_NUM_THREADS`` says, or an equal share of the
    cores it may run on. With several processes on a machine a 1 there says nothing: torchrun sets it."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = max(1, len(os.sched_getaffinity(0)) // local_world)
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one number per nesting level
    told = int(asked) if asked.isdecimal() else 0
    torch.set_num_threads(threads or (share if told == 0 or (told == 1 and local_world > 1) else told))


def keep_freed_memory() -> None:
    """Let glibc keep freed blocks instead of giving them back to the system, whose fresh pages cost a fault
    each: 6 to 16 % of a convolutional step on a CPU. Does nothing on other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(mmap_threshold, 1 << 30)
        mallopt(trim_threshold, (1 << 31) - 1)


def build_accelerator(precision: str, device: torch.device) -> Accelerator:
    """Accelerate on the process group that exists. Raises UserError if the launcher asks for another
    precision than the config."""
    ours = {"fp32": "no"}.get(precision, precision)
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if asked not in ("no", ours):
        raise UserError(
            f"train.precision: the config says {precision} and the launcher --mixed_precision {asked}; leave "
            "the flag out"
        )
    AcceleratorState._reset_state(reset_partial_state=True)  # pyright: ignore[reportPrivateUsage] # else a second run in one process keeps the first's precision
    # 1x1 convolutions on channels-last pixels give gradients that are contiguous but for dimensions of size 1
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    # torch 2.14 renames an option that Accelerate passes on by its old name
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")
    # Batch norms are synchronised already, so buffers are equal on all ranks and need no broadcast.
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    return Accelerator(mixed_precision=ours, cpu=device.type == "cpu", kwargs_handlers=[ddp])


def prepare(
    root: ContrastiveModel, accelerator: Accelerator, parallel: Parallel, tokenizer: Tokenizer
) -> nn.Module:
    """The model to call in a step: autocast in the run's precision, gradients averaged over the processes in
    its backward. Build the optimizer and the average of weights after it. One process: the root itself.
    """
    if parallel == "ddp" or distributed.world_size() == 1:
        model = accelerator.prepare_model(root)
        settle_buckets(model, root, tokenizer)
    else:
        model = accelerator.prepare_model(root, evaluation_mode=True)  # autocast and no DDP
        model = distributed.shard(model, units(root.clip))
        if accelerator.scaler is not None:
            accelerator.scaler = distributed.ShardedScaler(accelerator.device.type)
    if distributed.world_size() > 1:
        model.register_forward_pre_hook(_leave_in_place, prepend=True)
    return model


def _leave_in_place(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
    """Keep DDP and FSDP from moving a batch to the device: the packing is worked out on the CPU, from lengths
    that lie there, and the model takes the pixels over itself. Both move what is in a dict, not in a view."""
    return tuple(MappingProxyType(value) if isinstance(value, dict) else value for value in arguments)


def settle_buckets(model: nn.Module, root: ContrastiveModel, tokenizer: Tokenizer) -> None:
    """Let DDP choose its gradient buckets now, by a pass over two blank images, and leave no trace of it.

    DDP regroups gradients after its first backward, and on three or more ranks the grouping decides the order
    of summation: without this, the first step after a resume would differ in the last bit.
    """
    if model is root:
        return
    before = {name: value.clone() for name, value in root.clip.state_dict().items()}
    side = image_size(root.clip)
    token_ids, seq_lens = tokenizer.pack(["a", "b"])
    image = torch.zeros(2, 3, side, side, dtype=torch.uint8)
    for _ in range(2):  # the grouping takes effect in the second forward
        out = model({"image": image, "token_ids": token_ids, "seq_lens": seq_lens})
        contrastive_loss(**out).backward()
    model.zero_grad()
    root.clip.load_state_dict(before)
