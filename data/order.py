"""The order of samples as a pure function of (seed, epoch, position).

Shards are permuted by (seed, epoch); their samples, less the epoch's rest, make a virtual sequence, which is
cut into equal lanes. All lanes advance in lockstep, each contributing equally many rows of every global
batch; inside a lane samples are shuffled within windows of a few shards. Nothing is stored per sample and
nothing depends on ranks or workers, so an epoch goes on from any step on any machine (docs/stream.md).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from .permutation import fold, hash_words, permute

__all__ = ["Order", "Steps", "default_lanes", "default_window", "rank_slice"]

Ints = NDArray[np.int64]

WHOLE = 1 << 18  # data sets up to this many samples are shuffled as a whole
SHARDS_PER_LANE = 8
SHARDS_PER_WINDOW = 4
_SHARDS, _WINDOWS, _REST, _REST_START = 1, 2, 3, 4  # what a key is for


def rank_slice(rank: int, world_size: int, global_batch_size: int) -> slice:
    """The rows of a global batch that a rank computes: ``[floor(rB/R), floor((r+1)B/R))``."""
    return slice(rank * global_batch_size // world_size, (rank + 1) * global_batch_size // world_size)


def default_lanes(num_samples: int, num_shards: int, global_batch_size: int) -> int:
    """One lane for data that is shuffled as a whole, else the most that divide the batch and leave each lane
    at least eight shards."""
    if num_samples <= WHOLE:
        return 1
    most = min(max(1, num_shards // SHARDS_PER_LANE), global_batch_size)
    return next(lanes for lanes in range(most, 0, -1) if global_batch_size % lanes == 0)


def default_window(num_samples: int, num_shards: int, lanes: int) -> int:
    """Samples per window: four average shards, and never so few that all lanes' windows hold under 2^18."""
    return max(-(-SHARDS_PER_WINDOW * num_samples // num_shards), -(-WHOLE // lanes))


@dataclass(frozen=True)
class _Epoch:
    """Shards in the epoch's order: ends int64 [S] of their virtual positions, first int64 [S] sample ids;
    gaps int64 [r] sorted, how many kept samples precede each omitted one."""

    ends: Ints
    starts: Ints
    first: Ints
    gaps: Ints


class Order:
    """Which sample stands at which row of which global batch.

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
        self._sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._base = np.cumsum(self._sizes) - self._sizes
        self.num_samples = int(self._sizes.sum())
        self.seed = seed
        self.global_batch_size = global_batch_size
        self.steps_per_epoch = self.num_samples // global_batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"global_batch_size: {global_batch_size} is more than the {self.num_samples} samples of the "
                f"data; lower it"
            )
        shards = int((self._sizes > 0).sum())
        self.lanes = default_lanes(self.num_samples, shards, global_batch_size) if lanes is None else lanes
        if self.lanes < 1 or global_batch_size % self.lanes:
            raise UserError(f"data.lanes: {self.lanes} must divide the global batch of {global_batch_size}")
        self.window = default_window(self.num_samples, shards, self.lanes) if window is None else window
        if self.window < 1:
            raise UserError(f"data.window: {self.window} must be at least 1 sample")
        self._rows_per_lane = global_batch_size // self.lanes
        self._lane_length = self.steps_per_epoch * self._rows_per_lane
        self._windows = max(1, round(self._lane_length / self.window))
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __reduce__(self) -> tuple[Any, ...]:
        settings = (self.seed, self.global_batch_size, self.lanes, self.window)
        return _rebuild, (self._sizes, *settings)

    def global_batch(self, epoch: int, step: int) -> Ints:
        """Sample ids int64 [B] of a global batch; ``step`` counts from 0 within the epoch."""
        return self.rows(epoch, step, slice(0, self.global_batch_size))

    def local_batch(self, epoch: int, step: int, rank: int, world_size: int) -> Ints:
        """Sample ids of a rank's share of a global batch."""
        return self.rows(epoch, step, rank_slice(rank, world_size, self.global_batch_size))

    def rows(self, epoch: int, step: int, rows: slice) -> Ints:
        """Sample ids of some rows of a global batch, at a cost that follows from their number alone."""
        assert 0 <= step < self.steps_per_epoch, "step outside the epoch"
        row = np.arange(rows.start, rows.stop, dtype=np.int64)
        lane, row_in_lane = np.divmod(row, self._rows_per_lane)
        position = step * self._rows_per_lane + row_in_lane
        return self._lookup(epoch, lane * self._lane_length + self._shuffle(epoch, lane, position))

    def rest(self, epoch: int) -> Ints:
        """Sorted ids of the samples that an epoch omits, fewer than one global batch.

        They are consecutive pieces of one permutation, so that a sample omitted in one epoch is in the next,
        and in the long run all are omitted equally often.
        """
        count = self.num_samples % self.global_batch_size
        start = hash_words(self.seed, _REST_START) + epoch * count
        turn = (start % self.num_samples + np.arange(count, dtype=np.int64)) % self.num_samples
        n = self.num_samples
        return np.sort(permute(turn, n, hash_words(self.seed, _REST), largest=n))

    def _shuffle(self, epoch: int, lane: Ints, position: Ints) -> Ints:
        """Positions in each lane to other positions in the same window."""
        windows, length = self._windows, self._lane_length
        window = ((position + 1) * windows - 1) // length  # the last one that starts at or before it
        start = window * length // windows
        size = (window + 1) * length // windows - start
        key = fold(fold(hash_words(self.seed, _WINDOWS, epoch), lane), window)
        # equal numbers of bits for windows whose sizes differ by one
        largest = -(-length // windows)
        return start + permute(position - start, size, key, largest=largest)

    def _lookup(self, epoch: int, kept: Ints) -> Ints:
        """Sample ids of ordinals among the samples that the epoch keeps."""
        state = self._epoch(epoch)
        virtual = kept + np.searchsorted(state.gaps, kept, side="right")
        shard = np.searchsorted(state.ends, virtual, side="right")
        return state.first[shard] + virtual - state.starts[shard]

    def _make_epoch(self, epoch: int) -> _Epoch:
        keys = fold(hash_words(self.seed, _SHARDS, epoch), np.arange(len(self._sizes)))
        turn = np.argsort(keys, kind="stable")
        sizes = self._sizes[turn]
        ends = np.cumsum(sizes)
        starts = ends - sizes
        omitted = self.rest(epoch)
        shard = np.searchsorted(self._base + self._sizes, omitted, side="right")
        place = np.empty_like(turn)
        place[turn] = np.arange(len(turn))
        virtual = np.sort(starts[place[shard]] + omitted - self._base[shard])
        return _Epoch(ends, starts, self._base[turn], virtual - np.arange(len(virtual)))


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


def _rebuild(sizes: Ints, seed: int, global_batch_size: int, lanes: int, window: int) -> Order:
    return Order(sizes, seed=seed, global_batch_size=global_batch_size, lanes=lanes, window=window)
