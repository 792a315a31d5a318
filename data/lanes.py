"""One data set in an endless order: epoch after epoch, cut into lanes, each a shuffled walk over its shards.

Shards are permuted by (seed, epoch); their samples, less the epoch's rest, make a virtual sequence, which is
cut into equal lanes. Inside a lane samples are shuffled within windows of a few shards. Nothing is stored per
sample (docs/stream.md).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from .permutation import fold, hash_words, permute

__all__ = ["LaneOrder", "default_lanes", "default_window"]

Ints = NDArray[np.int64]

WHOLE = 1 << 18  # data sets up to this many samples are shuffled as a whole
SHARDS_PER_LANE = 8
SHARDS_PER_WINDOW = 4
_SHARDS, _WINDOWS, _REST, _REST_START = 1, 2, 3, 4  # what a key is for


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
    """Shards in the epoch's order: turn int64 [S] their numbers, ends int64 [S] of their virtual positions,
    first int64 [S] sample ids; gaps int64 [r] sorted, how many kept samples precede each omitted one."""

    turn: Ints
    ends: Ints
    starts: Ints
    first: Ints
    gaps: Ints


class LaneOrder:
    """Which sample of one data set stands at which position of which lane in which epoch.

    An epoch keeps ``lanes * lane_length`` of the samples and omits the others, which rotate. Raises UserError
    for a window below one sample.
    """

    def __init__(
        self,
        shard_sizes: Sequence[int] | NDArray[Any],
        *,
        seed: int,
        lanes: int,
        lane_length: int,
        window: int | None = None,
    ) -> None:
        """``shard_sizes``: samples in each shard, in the manifest's order. ``window``: samples that are
        shuffled among each other, by default what ``default_window`` says."""
        self.sizes = np.asarray(shard_sizes, dtype=np.int64)
        self._base = np.cumsum(self.sizes) - self.sizes
        self.num_samples = int(self.sizes.sum())
        self.seed, self.lanes, self.lane_length = seed, lanes, lane_length
        shards = int((self.sizes > 0).sum())
        self.window = default_window(self.num_samples, shards, lanes) if window is None else window
        if self.window < 1:
            raise UserError(f"data.window: {self.window} must be at least 1 sample")
        self._windows = max(1, round(lane_length / self.window))
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.sizes, self.seed, self.lanes, self.lane_length, self.window)

    def at(self, epoch: int, lane: Ints, position: Ints) -> Ints:
        """Sample ids int64 [n] at positions int64 [n], each from 0 and below ``lane_length``, of lanes
        int64 [n]."""
        return self._lookup(epoch, lane * self.lane_length + self._shuffle(epoch, lane, position))

    def rest(self, epoch: int) -> Ints:
        """Sorted ids of the samples that an epoch omits.

        They are consecutive pieces of one permutation, so that a sample omitted in one epoch is in the next,
        and in the long run all are omitted equally often.
        """
        n = self.num_samples
        count = n - self.lanes * self.lane_length
        start = hash_words(self.seed, _REST_START) + epoch * count
        turn = (start % n + np.arange(count, dtype=np.int64)) % n
        return np.sort(permute(turn, n, hash_words(self.seed, _REST), largest=n))

    def shards_from(self, epoch: int, lane: int, position: int, count: int) -> list[int]:
        """Shard numbers that a lane needs for ``count`` positions from ``position`` on and for the window
        behind them, within this epoch, in the order of need. Where the epoch ends before, those of the next
        one's first window follow."""
        windows, length = self._windows, self.lane_length
        last = min(position + count, length) - 1
        window, behind = (((at + 1) * windows - 1) // length for at in (position, last))
        start = lane * length + window * length // windows
        end = lane * length + min(behind + 2, windows) * length // windows
        state = self._epoch(epoch)
        first, final = self._virtual(state, np.array([start, end - 1]))
        low, high = np.searchsorted(state.ends, [first, final], side="right")
        shards = [int(shard) for shard in state.turn[low : high + 1] if self.sizes[shard]]
        if behind + 1 >= windows and position:
            shards += self.shards_from(epoch + 1, lane, 0, 1)[:SHARDS_PER_WINDOW]
        return list(dict.fromkeys(shards))

    def _shuffle(self, epoch: int, lane: Ints, position: Ints) -> Ints:
        """Positions in each lane to other positions in the same window."""
        windows, length = self._windows, self.lane_length
        window = ((position + 1) * windows - 1) // length  # the last one that starts at or before it
        start = window * length // windows
        size = (window + 1) * length // windows - start
        key = fold(fold(hash_words(self.seed, _WINDOWS, epoch), lane), window)
        # equal numbers of bits for windows whose sizes differ by one
        largest = -(-length // windows)
        return start + permute(position - start, size, key, largest=largest)

    def _virtual(self, state: _Epoch, kept: Ints) -> Ints:
        """Positions in the epoch's sequence of all samples, from ordinals among those that it keeps."""
        return kept + np.searchsorted(state.gaps, kept, side="right")

    def _lookup(self, epoch: int, kept: Ints) -> Ints:
        """Sample ids of ordinals among the samples that the epoch keeps."""
        state = self._epoch(epoch)
        virtual = self._virtual(state, kept)
        shard = np.searchsorted(state.ends, virtual, side="right")
        return state.first[shard] + virtual - state.starts[shard]

    def _make_epoch(self, epoch: int) -> _Epoch:
        keys = fold(hash_words(self.seed, _SHARDS, epoch), np.arange(len(self.sizes)))
        turn = np.argsort(keys, kind="stable")
        sizes = self.sizes[turn]
        ends = np.cumsum(sizes)
        starts = ends - sizes
        omitted = self.rest(epoch)
        shard = np.searchsorted(self._base + self.sizes, omitted, side="right")
        place = np.empty_like(turn)
        place[turn] = np.arange(len(turn))
        virtual = np.sort(starts[place[shard]] + omitted - self._base[shard])
        return _Epoch(turn, ends, starts, self._base[turn], virtual - np.arange(len(virtual)))


def _rebuild(sizes: Ints, seed: int, lanes: int, lane_length: int, window: int) -> LaneOrder:
    return LaneOrder(sizes, seed=seed, lanes=lanes, lane_length=lane_length, window=window)
