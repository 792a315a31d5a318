"""Every torch.distributed call of the project.

All functions also work without a process group (one process: rank 0 of 1) and then cost nothing. Rows may be
spread unevenly: a rank may hold fewer rows than the others, or none, and still joins every collective. gloo
serves CPU processes, NCCL serves CUDA ones. Objects travel as JSON in byte tensors, never as pickle.
"""

import json
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..configs.errors import UserError

Group = dist.ProcessGroup | None


def setup(device: str = "auto", *, timeout_s: float = 600.0) -> torch.device:
    """Join the process group that torchrun or accelerate announced, and return this process's device.

    ``device`` is ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``. Without ``WORLD_SIZE`` in the
    environment no group is made. A group that exists already is used as it is. Raises UserError for CUDA
    without a GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda asked for, but torch sees no GPU; set device: cpu or auto")
    local = torch.device("cpu")
    if device == "cuda":
        local = torch.device("cuda", local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(local)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not is_initialized():
        backend = "nccl" if local.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    return local


def teardown() -> None:
    """Leave the process group, if there is one."""
    if is_initialized():
        dist.destroy_process_group()


def is_initialized() -> bool:
    """Whether this process is in a process group."""
    return dist.is_available() and dist.is_initialized()


def rank(group: Group = None) -> int:
    """Number of this process, from 0."""
    return dist.get_rank(group) if is_initialized() else 0


def world_size(group: Group = None) -> int:
    """Number of processes."""
    return dist.get_world_size(group) if is_initialized() else 1


def local_rank() -> int:
    """Number of this process on its machine, from 0 (``LOCAL_RANK``)."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def barrier(group: Group = None) -> None:
    """Wait until every process has come here."""
    if world_size(group) > 1:
        dist.barrier(group)


def all_reduce_sum(tensor: Tensor, group: Group = None) -> Tensor:
    """Sum of ``tensor`` over the processes, the same bits on every one. The argument is not changed."""
    return _all_reduce(tensor, dist.ReduceOp.SUM, group)


def all_reduce_max(tensor: Tensor, group: Group = None) -> Tensor:
    """Element-wise maximum of ``tensor`` over the processes. The argument is not changed."""
    return _all_reduce(tensor, dist.ReduceOp.MAX, group)


def _all_reduce(tensor: Tensor, op: Any, group: Group) -> Tensor:
    if world_size(group) == 1:
        return tensor
    result = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(result, op, group)
    return result


def stack(tensor: Tensor, group: Group = None) -> Tensor:
    """``tensor`` (same shape everywhere) of every process, stacked by rank: [W, *shape]. No gradient."""
    world = world_size(group)
    if world == 1:
        return tensor[None]
    out = tensor.new_empty((world, *tensor.shape))
    if tensor.numel():
        dist.all_gather(list(out.unbind(0)), tensor.detach().contiguous(), group)
    return out


def row_counts(rows: int, device: torch.device | str = "cpu", group: Group = None) -> list[int]:
    """How many rows each process holds, by rank."""
    if world_size(group) == 1:
        return [rows]
    return [int(n) for n in stack(torch.tensor([rows], device=device), group).flatten().tolist()]


def all_gather_rows(local: Tensor, counts: Sequence[int] | None = None, group: Group = None) -> Tensor:
    """Rows of all processes in rank order: [n_r, *] on rank r -> [sum n_r, *]. No gradient.

    ``counts`` are the n_r where the caller knows them; otherwise they are exchanged first.
    """
    if world_size(group) == 1:
        return local
    counts = row_counts(local.shape[0], local.device, group) if counts is None else counts
    longest = max(counts)
    padded = local
    if local.shape[0] < longest:
        padded = local.new_zeros((longest, *local.shape[1:]))
        padded[: local.shape[0]] = local
    gathered = stack(padded, group)
    if min(counts) == longest:
        return gathered.flatten(0, 1)
    return torch.cat([rows[:n] for rows, n in zip(gathered, counts, strict=True)])


def reduce_scatter_rows(full: Tensor, counts: Sequence[int], group: Group = None) -> Tensor:
    """Sum of ``full`` [sum n_r, *] over the processes, of which rank r gets its own n_r rows.

    NCCL with equal counts moves half the bytes of an all-reduce; gloo has nothing better than an all-reduce.
    """
    if world_size(group) == 1:
        return full
    if full.is_cuda and min(counts) == max(counts):
        out = full.new_empty((counts[0], *full.shape[1:]))
        dist.reduce_scatter(out, list(full.contiguous().split(list(counts))), group=group)
        return out
    start = sum(counts[: rank(group)])
    return all_reduce_sum(full, group)[start : start + counts[rank(group)]]


def broadcast_json(value: Any, source: int = 0, device: torch.device | str = "cpu") -> Any:
    """``value`` of process ``source``, on every process. It must be JSON; with NCCL name a CUDA device."""
    if world_size() == 1:
        return value
    data = json.dumps(value).encode() if rank() == source else b""
    size = torch.tensor([len(data)], device=device)
    dist.broadcast(size, source)
    bytes_ = torch.zeros(int(size.item()), dtype=torch.uint8)
    if rank() == source:
        bytes_ = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    bytes_ = bytes_.to(device)
    dist.broadcast(bytes_, source)
    return json.loads(bytes_.cpu().numpy().tobytes())


def gather_json(value: Any, device: torch.device | str = "cpu") -> list[Any]:
    """The ``value`` of every process by rank, on every process. It must be JSON; with NCCL name a CUDA
    device."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(device)
    counts = row_counts(data.shape[0], device)
    parts = all_gather_rows(data, counts).cpu().split(counts)
    return [json.loads(part.numpy().tobytes()) for part in parts]
