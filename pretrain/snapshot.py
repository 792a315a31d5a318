"""What a checkpoint holds, at one moment: copies that a thread writes while training goes on."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import distributed
from .tensor_file import FileFacts

__all__ = ["Snapshot", "Stager"]

Files = dict[str, FileFacts]


@dataclass(frozen=True)
class Snapshot:
    """One process's share of a checkpoint."""

    step: int
    samples_seen: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """By file: what this process writes. Nothing in training changes it."""
    texts: Mapping[str, str]
    """By file: documents, on rank 0."""
    write_more: Callable[[Path], None]
    """Writes further small files of rank 0 into the folder; it reads nothing that training changes."""
    combine: Callable[[Path], Files] | None
    """On rank 0, where processes write parts: makes what needs all of them, once they are there."""
    settled: Callable[[], None]
    """Wait until the copies are complete: those from a GPU are under way."""


class Stager:
    """Copies tensors for a ``Snapshot``.

    On a CPU a copy is a clone. From a GPU it goes into pinned memory, which is kept for the next snapshot,
    in the order of the device's own stream: what training does to the tensor next comes after, and nothing
    waits.
    """

    def __init__(self, *, copies: bool) -> None:
        """``copies``: False where training stands still until everything is written."""
        self._copies = copies
        self._pinned: dict[str, Tensor] = {}

    def take(self, name: str, tensor: Tensor) -> Tensor:
        """This process's part of a tensor, on the CPU; ``name`` is unique in a snapshot."""
        own = distributed.local(tensor.detach())
        if own.device.type == "cpu":
            return own.clone(memory_format=torch.contiguous_format) if self._copies else own
        kept = self._pinned.get(name)
        if kept is None or (kept.shape, kept.dtype) != (own.shape, own.dtype):
            kept = self._pinned[name] = torch.empty(own.shape, dtype=own.dtype, pin_memory=True)
        return kept.copy_(own, non_blocking=True)

    def settled(self) -> Callable[[], None]:
        """A function that waits for the copies taken so far; any thread may call it."""
        if not self._pinned:
            return lambda: None
        event = torch.cuda.Event()
        event.record()
        return event.synchronize
