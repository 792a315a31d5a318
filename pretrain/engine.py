"""What a run asks of Accelerate and DDP: precision, placement, averaged gradients; and how ranks agree."""

import ctypes
import os
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs
from torch import nn

from ..configs.errors import UserError
from ..data.text import Tokenizer
from . import distributed
from .contrastive import contrastive_loss
from .model import ContrastiveModel, image_size

__all__ = ["build_accelerator", "keep_freed_memory", "on_rank_0", "set_threads", "settle_buckets", "together"]

T = TypeVar("T")


def set_threads(threads: int | None) -> None:
    """CPU threads of this process: ``threads``, or an equal share of the cores it may run on."""
    local_world = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    torch.set_num_threads(threads or max(1, len(os.sched_getaffinity(0)) // local_world))


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


@contextmanager
def together(device: torch.device) -> Generator[None]:
    """A UserError that any rank raises inside is raised on every rank. The block must not communicate."""
    problem = ""
    try:
        yield
    except UserError as error:
        problem = str(error)
    if problems := [text for text in distributed.gather_json(problem, device=device) if text]:
        raise UserError(problems[0])


def on_rank_0(function: Callable[[], T], device: torch.device) -> T | None:
    """Run ``function`` on rank 0 alone; its UserError is raised on every rank. Returns its value there, None
    elsewhere."""
    value, problem = None, ""
    if distributed.rank() == 0:
        try:
            value = function()
        except UserError as error:
            problem = str(error)
    if problem := distributed.broadcast_json(problem, device=device):
        raise UserError(problem)
    return value
