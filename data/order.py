"""The order of samples as a pure function of (seed, epoch, position).

All lanes advance in lockstep, each contributing equally many rows of every global batch. ``Order`` walks one
data set, ``Mixture`` several. Nothing depends on ranks or workers, so an epoch goes on from any step on any
machine (docs/stream.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from .lanes import Ints, LaneOrder, default_lanes

__all__ = ["AnyOrder", "Order", "Places", "Steps", "rank_slice"]


def rank_slice(rank: int, world_size: int, global_batch_size: int) -> slice:
    """The rows of a global batch that a rank computes: ``[floor(rB/R), floor((r+1)B/R))``."""
    return slice(rank * global_batch_size // world_size, (rank + 1) * global_batch_size // world_size)


@dataclass(frozen=True)
class Places:
    """What stands at some rows: ``source`` int16 [n], which data set; ``epoch`` int64 [n], how often that set
    was gone through before; ``ordinal`` int64 [n], which of its samples."""

    source: NDArray[np.int16]
    epoch: Ints
    ordinal: Ints


class AnyOrder(Protocol):
    """What a stream needs of an order."""

    global_batch_size: int
    steps_per_epoch: int

    def places(self, epoch: int, step: int, rows: slice) -> Places:
        """What stands at some rows of a global batch."""
        ...

    def shards_ahead(self, epoch: int, step: int, rows: slice) -> list[tuple[int, int]]:
        """(source, shard) that these rows read now and in the windows that follow, in the order of need."""
        ...

    def state(self) -> dict[str, Any]:
        """What makes the order, as JSON."""
        ...


class Order:
    """Which sample of one data set stands at which row of which global batch.

    Raises UserError if the data has fewer samples than one global batch or the lanes do not divide it.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | NDArray[Any],
        *,
        seed: int,
        global_batch_size: int,
        lanes: int | None = None,
        window: int | None = None,
    ) -> None:
        """``shard_sizes``: samples in each shard, in the manifest's order. ``lanes`` and ``window`` (samples)
        follow from the data by default; a run stores them, for they are part of the order."""
        self.shard_sizes = sizes = np.asarray(shard_sizes, dtype=np.int64)
        self.num_samples = int(sizes.sum())
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = self.num_samples // global_batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"train.global_batch_size: {global_batch_size} is more than the {self.num_samples} samples "
                "of the data; lower it"
            )
        if lanes is None:
            lanes = default_lanes(self.num_samples, int((sizes > 0).sum()), global_batch_size)
        check_lanes(lanes, global_batch_size)
        self.rows_per_lane = global_batch_size // lanes
        length = self.steps_per_epoch * self.rows_per_lane
        self._set = LaneOrder(sizes, seed=seed, lanes=lanes, lane_length=length, window=window)
        self.lanes, self.window = lanes, self._set.window

    def global_batch(self, epoch: int, step: int) -> Ints:
        """Sample ids int64 [B] of a global batch; ``step`` counts from 0 within the epoch."""
        return self.places(epoch, step, slice(0, self.global_batch_size)).ordinal

    def local_batch(self, epoch: int, step: int, rank: int, world_size: int) -> Ints:
        """Sample ids of a rank's share of a global batch."""
        return self.places(epoch, step, rank_slice(rank, world_size, self.global_batch_size)).ordinal

    def places(self, epoch: int, step: int, rows: slice) -> Places:
        """What stands at some rows of a global batch, at a cost that follows from their number alone."""
        assert 0 <= step < self.steps_per_epoch, "step outside the epoch"
        row = np.arange(rows.start, rows.stop, dtype=np.int64)
        lane, row_in_lane = np.divmod(row, self.rows_per_lane)
        ids = self._set.at(epoch, lane, step * self.rows_per_lane + row_in_lane)
        return Places(np.zeros(len(row), dtype=np.int16), np.full(len(row), epoch, dtype=np.int64), ids)

    def rest(self, epoch: int) -> Ints:
        """Sorted ids of the samples that an epoch omits, fewer than one global batch; see ``LaneOrder``."""
        return self._set.rest(epoch)

    def shards_ahead(self, epoch: int, step: int, rows: slice) -> list[tuple[int, int]]:
        """(0, shard) that these rows read in their present windows and the next, in the order of need."""
        lanes = range(rows.start // self.rows_per_lane, (rows.stop - 1) // self.rows_per_lane + 1)
        position = step * self.rows_per_lane
        return in_turn(
            [self._set.shards_from(epoch, lane, position, self.rows_per_lane) for lane in lanes], source=0
        )

    def state(self) -> dict[str, Any]:
        """What makes the order, as JSON."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "lanes": self.lanes,
            "window": self.window,
        }


def check_lanes(lanes: int, global_batch_size: int) -> None:
    """UserError unless the lanes divide the global batch."""
    if lanes < 1 or global_batch_size % lanes:
        raise UserError(f"data.lanes: {lanes} must divide the global batch of {global_batch_size}")


def in_turn(lists: Sequence[Sequence[int]], *, source: int) -> list[tuple[int, int]]:
    """First the first of each list, then the second of each, and so on, without repeats."""
    longest = max((len(one) for one in lists), default=0)
    merged = (one[i] for i in range(longest) for one in lists if i < len(one))
    return [(source, shard) for shard in dict.fromkeys(merged)]


class Steps:
    """(epoch, step) from a place on, without end: the DataLoader's sampler."""

    def __init__(self, epoch: int, step: int, steps_per_epoch: int) -> None:
        self._place = epoch, step, steps_per_epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch, step, steps_per_epoch = self._place
        while True:
            yield epoch, step
            step += 1
            if step == steps_per_epoch:
                epoch, step = epoch + 1, 0
