"""The order that a training would see, printed without reading an image.

Shares are computed as ranks and their workers would, each by itself, and put together as the loader does: a
trace of another topology that differs by one id would be a bug.
"""

import copy
import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from ..configs.files import resolve_data_path
from .order import Order, Steps
from .shards import open_shards
from .stream import DataConfig

__all__ = ["trace_lines"]


def trace_lines(
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    world_size: int = 1,
    workers: int = 0,
    epoch: int = 0,
    start: int = 0,
    steps: int | None = None,
) -> Iterator[str]:
    """One JSON line ``{"epoch": .., "step": .., "sample_ids": [..]}`` per global batch.

    From step ``start`` of ``epoch``, ``steps`` of them (into later epochs if need be) or to the epoch's end.
    Raises UserError if the data cannot be opened or ``start`` lies past the epoch.
    """
    shards = open_shards(resolve_data_path(config.train))
    order = Order(
        shards.shard_sizes,
        seed=seed,
        global_batch_size=global_batch_size,
        lanes=config.lanes,
        window=config.window,
    )
    if not 1 <= world_size <= global_batch_size:
        raise UserError(
            f"--world-size: {world_size} must be between 1 and the global batch of {global_batch_size}"
        )
    if epoch < 0 or workers < 0:
        raise UserError(f"--epoch and --workers must not be negative, but are {epoch} and {workers}")
    if not 0 <= start < order.steps_per_epoch:
        raise UserError(
            f"--start: {start} must be between 0 and {order.steps_per_epoch - 1}, the epoch's last step"
        )
    count = order.steps_per_epoch - start if steps is None else steps
    ranks = [_rank(order, rank, world_size, workers, epoch, start) for rank in range(world_size)]
    for place, *shares in zip(Steps(epoch, start, order.steps_per_epoch), *ranks, strict=False):
        if count == 0:
            return
        ids = np.concatenate(shares).tolist()
        yield json.dumps({"epoch": place[0], "step": place[1], "sample_ids": ids})
        count -= 1


def _rank(
    order: Order, rank: int, world_size: int, workers: int, epoch: int, start: int
) -> Iterator[NDArray[np.int64]]:
    """A rank's shares, dealt in turn to workers that each have a copy of the order, as a DataLoader does."""
    copies: list[Order] = [copy.copy(order) for _ in range(max(1, workers))]
    for number, place in enumerate(Steps(epoch, start, order.steps_per_epoch)):
        yield copies[number % len(copies)].local_batch(*place, rank, world_size)
