"""The order that a training would see, printed without reading an image.

Shares are computed as ranks and their workers would, each by itself, and put together as the loader does: a
trace of another topology that differs by one id would be a bug.
"""

import copy
import json
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..configs.errors import UserError
from .config import DataConfig
from .datasets import Source, make_order, open_sources, resumed_order
from .order import AnyOrder, Places, Steps, rank_slice
from .plain import is_plain

__all__ = ["trace_lines"]

MOST_EPOCHS = 1_000_000  # with more, positions might not fit into 64 bits


def trace_lines(
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    state: Mapping[str, Any] | None = None,
    world_size: int = 1,
    workers: int = 0,
    epoch: int = 0,
    start: int = 0,
    steps: int | None = None,
) -> Iterator[str]:
    """One JSON line ``{"epoch": .., "step": .., "sample_ids": [..]}`` per global batch; of a mixture with
    ``"sources"``, the number of each sample's source.

    From step ``start`` of ``epoch``, ``steps`` of them (into later epochs if need be) or to the epoch's end.
    ``state``: what a stream's ``state_dict`` gave, for a run that goes on with its order. Only manifests are
    read, and indexes where there is a filter. Raises UserError if the data cannot be opened or ``start`` lies
    past the epoch.
    """
    for source in config.sources:
        if is_plain(source.data):
            raise UserError(
                f"{source.data}: tars without an index have no order to print; index them with "
                "`diptych data index`"
            )
    sources = open_sources(config, check_files=False)
    order = make_order(config, sources, seed=seed, global_batch_size=global_batch_size)
    order = order if state is None else resumed_order(order, sources, state)
    if not 1 <= world_size <= global_batch_size:
        raise UserError(
            f"--world-size: {world_size} must be between 1 and the global batch of {global_batch_size}"
        )
    if epoch < 0 or workers < 0:
        raise UserError(f"--epoch and --workers must not be negative, but are {epoch} and {workers}")
    if epoch >= MOST_EPOCHS:
        raise UserError(f"--epoch: {epoch} must be below {MOST_EPOCHS}")
    if not 0 <= start < order.steps_per_epoch:
        raise UserError(
            f"--start: {start} must be between 0 and {order.steps_per_epoch - 1}, the epoch's last step"
        )
    count = order.steps_per_epoch - start if steps is None else steps
    count_of_copies = max(1, min(workers, count, 8))  # more would show nothing more
    copies = [copy.deepcopy(order) for _ in range(count_of_copies)]
    ranks = [_rank(copies, rank, world_size, epoch, start) for rank in range(world_size)]
    for place, *shares in zip(Steps(epoch, start, order.steps_per_epoch), *ranks, strict=False):
        if count == 0:
            return
        yield json.dumps({"epoch": place[0], "step": place[1]} | _ids(sources, shares))
        count -= 1


def _ids(sources: list[Source], shares: list[Places]) -> dict[str, Any]:
    source = np.concatenate([share.source for share in shares])
    ids = np.concatenate([share.ordinal for share in shares])
    for s, one in enumerate(sources):
        ids[source == s] = one.sample_ids(ids[source == s])
    return {"sample_ids": ids.tolist()} | ({"sources": source.tolist()} if len(sources) > 1 else {})


def _rank(copies: list[AnyOrder], rank: int, world_size: int, epoch: int, start: int) -> Iterator[Places]:
    """A rank's shares, dealt in turn to workers that have copies of the order, as a DataLoader does."""
    rows = rank_slice(rank, world_size, copies[0].global_batch_size)
    for number, place in enumerate(Steps(epoch, start, copies[0].steps_per_epoch)):
        yield copies[number % len(copies)].places(*place, rows)
