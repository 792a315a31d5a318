"""Every torch.distributed call of the project, but for how processes find each other (``meeting``).

All functions also work without a process group (one process: rank 0 of 1) and then cost nothing. Rows may be
spread unevenly: a rank may hold fewer rows than the others, or none, and still joins every collective. NCCL
carries CUDA tensors and gloo CPU tensors, in one group, so that flags and counts that live on the CPU never
wait for the device. Objects travel as JSON in byte tensors, never as pickle.

``shard`` spreads parameters, gradients and all that is derived from them over the processes (FSDP2, after
ZeRO: Rajbhandari et al., 2020, arXiv 1910.02054); ``local``, ``whole`` and ``like`` go between a process's
part of such a tensor and all of it, and give plain tensors back as they are.
"""

import copy
import json
import os
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..configs.errors import UserError
from .meeting import meet

Group = dist.ProcessGroup | None


def setup(device: str = "auto", *, timeout_s: float = 600.0) -> torch.device:
    """Join the process group that torchrun or accelerate announced, and return this process's device.

    ``device`` is ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``. Without ``WORLD_SIZE`` in the
    environment no group is made. A group that exists already is used as it is. Collectives, and the wait for
    the others here, may take ``timeout_s``. Raises UserError for CUDA without a GPU, and for others that do
    not come.
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
        backend = "cpu:gloo,cuda:nccl" if local.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            timeout=timedelta(seconds=timeout_s),
            store=meet(timeout_s),
            rank=int(os.environ["RANK"]),
            world_size=int(os.environ["WORLD_SIZE"]),
        )
    return local


def set_timeout(seconds: float) -> None:
    """How long the collectives that begin from now on may take."""
    if is_initialized():
        old = "_set_pg_timeout"  # before torch 2.14
        set_ = getattr(dist, "set_timeout", None) or getattr(distributed_c10d, old)
        set_(timedelta(seconds=seconds))


def teardown() -> None:
    """Leave the process group, if there is one."""
    _alone.clear()
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
        all_reduce_sum(torch.zeros(1), group)


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


class _RowsOfAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, group: Group) -> Tensor:
        counts = row_counts(local.shape[0], group=group)
        start = sum(counts[: rank(group)])
        ctx.own = slice(start, start + local.shape[0])
        return all_gather_rows(local, counts, group)

    @staticmethod
    # torch's own is less exact
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0][ctx.own], None


def rows_of_all(local: Tensor, group: Group = None) -> Tensor:
    """``all_gather_rows`` with a gradient, for processes that all do the same with the rows: each passes the
    gradient of its own rows back, which is already that of the whole; nothing is summed."""
    if world_size(group) == 1:
        return local
    if torch.is_grad_enabled() and not local.requires_grad:  # all go on alike, also one that has no rows
        local = local.detach().requires_grad_()
    return cast(Tensor, _RowsOfAll.apply(local, group))


def sum_gradients(split: Sequence[Tensor], whole: Sequence[Tensor] = ()) -> None:
    """Make the gradients of parameters equal on all processes, in place: those of ``split`` are summed, those
    of ``whole``, which every process knows by itself, are taken from the first. A parameter that has none
    anywhere keeps none."""
    if world_size() == 1:
        return
    parameters = [*split, *whole]
    there = all_reduce_max(torch.tensor([float(p.grad is not None) for p in parameters]))
    some = [(i, p) for i, p in enumerate(parameters) if there[i]]
    zero = [p.grad is None or (i >= len(split) and rank() > 0) for i, p in some]
    parts = [torch.zeros_like(p) if z else p.grad for z, (_, p) in zip(zero, some, strict=True)]
    flat = all_reduce_sum(torch.cat([part.flatten() for part in parts if part is not None]))
    for (_, p), total in zip(some, flat.split([p.numel() for _, p in some]), strict=True):
        p.grad = total.view_as(p)


_alone: list[Any] = []


def alone() -> Group:
    """A group of this process alone, for work that is not shared. All processes make theirs at once, in the
    first call."""
    if world_size() == 1:
        return None
    if not _alone:
        _alone.extend([dist.new_group([number]) for number in range(world_size())])
    return _alone[rank()]


def pass_down(tensors: Sequence[Tensor], rows: int, group: Group = None) -> Callable[[], list[Tensor]]:
    """Start to send ``tensors`` [n, *] to the process before and to receive as many, otherwise alike but of
    ``rows`` rows, from the one after, in a ring. The function that comes back waits, then gives what came."""
    to, source = ((rank(group) + step) % world_size(group) for step in (-1, 1))
    arriving = [t.new_empty((rows, *t.shape[1:])) for t in tensors]
    sends = [dist.P2POp(dist.isend, t, group=group, group_peer=to) for t in tensors if t.numel()]
    receives = [dist.P2POp(dist.irecv, t, group=group, group_peer=source) for t in arriving if t.numel()]
    under_way = dist.batch_isend_irecv(sends + receives) if sends or receives else []

    def wait() -> list[Tensor]:
        for one in under_way:
            one.wait()
        return arriving

    return wait


def broadcast_json(value: Any, source: int = 0) -> Any:
    """``value`` of process ``source``, on every process. It must be JSON."""
    if world_size() == 1:
        return value
    data = json.dumps(value).encode() if rank() == source else b""
    size = torch.tensor([len(data)])
    dist.broadcast(size, source)
    bytes_ = torch.zeros(int(size.item()), dtype=torch.uint8)
    if rank() == source:
        bytes_ = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    dist.broadcast(bytes_, source)
    return json.loads(bytes_.numpy().tobytes())


def gather_json(value: Any) -> list[Any]:
    """The ``value`` of every process by rank, on every process. It must be JSON."""
    if world_size() == 1:
        return [value]
    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    counts = row_counts(data.shape[0])
    parts = all_gather_rows(data, counts).split(counts)
    return [json.loads(part.numpy().tobytes()) for part in parts]


class _ScalarMean:
    """Averages the gradients of parameters without dimensions, which FSDP cannot shard, as it does its
    own."""

    active = True

    def __call__(self, parameter: Tensor) -> None:
        if self.active and parameter.grad is not None:
            parameter.grad.copy_(all_reduce_sum(parameter.grad) / world_size())


_scalars: WeakKeyDictionary[nn.Module, _ScalarMean] = WeakKeyDictionary()
_blueprints: WeakKeyDictionary[nn.Module, nn.Module] = WeakKeyDictionary()


def shard(root: nn.Module, blocks: Iterable[nn.Module]) -> nn.Module:
    """Spread the parameters of ``root`` over all processes, each of ``blocks`` as a unit that is gathered
    when it runs and freed after; the rest stays gathered from a forward to its backward. In place.

    Gradients are averaged over the processes, as DDP does. Every block must be run by calling it. Parameters
    without dimensions (``logit_scale``) stay whole everywhere.
    """
    device = next(root.parameters()).device.type
    empty = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in root.parameters()
    }
    _blueprints[root] = copy.deepcopy(root, empty)
    mesh = init_device_mesh(device, (world_size(),))
    scalars = {p for p in root.parameters() if p.ndim == 0}
    mean = _scalars[root] = _ScalarMean()
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(mean)
    for module in (*blocks, root):
        fully_shard(module, mesh=mesh, ignored_params=scalars)
    return root


def unsharded(root: nn.Module) -> nn.Module:
    """A new copy of a sharded module as it was before ``shard``, its parameters without values (on the meta
    device): fill them by ``load_state_dict(.., assign=True)``."""
    return copy.deepcopy(_blueprints[root])


@contextmanager
def _no_sync_sharded(root: FSDPModule) -> Generator[None]:
    mean = _scalars[root]  # pyright: ignore[reportArgumentType] # FSDPModule is mixed into root's own class
    root.set_requires_gradient_sync(False)
    mean.active = False
    try:
        yield
    finally:
        root.set_requires_gradient_sync(True)
        mean.active = True


def no_sync(model: nn.Module) -> AbstractContextManager[None]:
    """Inside, backward passes of a wrapped model add to this process's own gradients and do not communicate;
    the first one outside averages all that has been added."""
    if isinstance(model, DistributedDataParallel):
        return model.no_sync()
    return _no_sync_sharded(model) if isinstance(model, FSDPModule) else nullcontext()


class ShardedScaler(torch.amp.GradScaler):
    """fp16's loss scaler for parameters of which some are sharded and some are not: an overflow in any part
    skips the step on every process."""

    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        grads = [local(p.grad) for p in parameters if p.grad is not None]
        # as torch.amp calls it
        check = torch._amp_foreach_non_finite_check_and_unscale_  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        check(grads, found_inf, inv_scale)
        found_inf.copy_(all_reduce_max(found_inf))
        return {found_inf.device: found_inf}


def is_sharded(tensor: Tensor) -> bool:
    """Whether this process holds only its part of the tensor."""
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every process; all must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(tensor: Tensor, whole: Tensor) -> Tensor:
    """``whole`` spread as ``tensor`` is: every process keeps its part, without communication."""
    if not isinstance(tensor, DTensor):
        return whole
    return distribute_tensor(whole, tensor.device_mesh, tensor.placements, src_data_rank=None)


def own_rows(tensor: Tensor) -> tuple[int, int, int] | None:
    """(dimension, start, stop) of this process's part of a sharded tensor, None for a plain one."""
    if not isinstance(tensor, DTensor):
        return None
    (placement,) = tensor.placements
    assert isinstance(placement, Shard)
    starts = row_starts(tensor.shape[placement.dim])
    start, stop = starts[rank()], starts[rank() + 1]
    assert tensor.to_local().shape[placement.dim] == stop - start
    return placement.dim, start, stop


def row_starts(rows: int) -> list[int]:
    """Where each process's part of a sharded dimension begins, and the end: [W + 1]. As torch.chunk cuts."""
    each = -(-rows // world_size())
    return [min(number * each, rows) for number in range(world_size() + 1)]


def from_own(tensor: Tensor, part: Tensor) -> Tensor:
    """A tensor sharded as ``tensor`` is, of which ``part`` is this process's; without communication."""
    assert isinstance(tensor, DTensor)
    return DTensor.from_local(
        part.to(tensor.device),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )
