"""Encoding shared by the processes of a run: batch i is encoded by process i modulo their number, and all get
every batch in order. The batches are those of one process, so what comes of them is the same bit for bit."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import torch

from ...pretrain import distributed
from .encoding import Arrays

__all__ = ["in_turn", "share_of"]

T = TypeVar("T")


def share_of(items: Sequence[T], batch_size: int, together: bool) -> Sequence[T]:
    """The items of this process's batches; all of them unless processes work together."""
    if not together:
        return items
    starts = range(0, len(items), batch_size)[distributed.rank() :: distributed.world_size()]
    return [item for start in starts for item in items[start : start + batch_size]]


def in_turn(own: Callable[[], Iterator[Arrays]], items: int, batch_size: int) -> Iterator[Arrays]:
    """All batches of ``items`` items, in order, of which ``own()`` gives this process's; of no items the one
    batch of no rows."""
    batches, mine = max(1, -(-items // batch_size)), own()
    for first in range(0, batches, distributed.world_size()):
        batch: Arrays = next(mine) if first + distributed.rank() < batches else {}
        kinds = distributed.gather_json([(k, a.dtype.str, a.shape) for k, a in batch.items()])
        found: list[Arrays] = [{} for _ in kinds]
        for name, _, _ in kinds[0]:
            array = batch.get(name, np.zeros(0, dtype=np.uint8))
            data = torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8) if array.size else None
            sent = torch.zeros(0, dtype=torch.uint8) if data is None else data
            counts = distributed.row_counts(len(sent))
            parts = distributed.all_gather_rows(sent, counts).split(counts)
            for one, part, kind in zip(found, parts, kinds, strict=True):
                for _, dtype, shape in (entry for entry in kind if entry[0] == name):
                    one[name] = np.frombuffer(part.numpy().tobytes(), dtype=dtype).reshape(shape)
        yield from (one for one in found if one)
    for _ in mine:  # what it does after its last batch
        pass
