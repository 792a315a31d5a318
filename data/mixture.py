"""Several data sets in one order, each with its exact share.

Every lane is dealt in blocks. A block holds a fixed number of places of each source, its quota, spread evenly
and turned about by a number drawn for (seed, lane, block); a source's places, block after block, are its own
positions in that lane, and it walks them as ``LaneOrder`` says: without replacement, with an epoch counter of
its own. So source and sample of any place follow from its number alone, as they do for one data set.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from .lanes import Ints, LaneOrder, default_lanes
from .order import Places, check_lanes, in_turn
from .permutation import fold, hash_words

__all__ = ["Mixture", "block_size", "quotas"]

BLOCK = 4096  # places of a block at least: weights are met to 1/4096
_SOURCES, _BLOCKS = 5, 6  # what a key is for; lanes.py has the others


def block_size(rows_per_lane: int) -> int:
    """Places in a block of a lane: the least multiple of its rows in a global batch from 4,096 on."""
    return rows_per_lane * -(-BLOCK // rows_per_lane)


def quotas(weights: Sequence[float], block: int) -> list[int]:
    """How many of ``block`` places each source gets: its share by weight, the largest remainders rounded up
    (Hamilton's method), and one place at least. Raises UserError for weights that are not positive."""
    if not all(math.isfinite(weight) and weight > 0 for weight in weights):
        raise UserError(
            f"data.train: the weights {list(weights)} must be positive numbers; leave a source out"
        )
    if len(weights) > block:
        raise UserError(f"data.train: {len(weights)} sources are more than the {block} places of a block")
    total = math.fsum(weights)
    exact = [weight / total * block for weight in weights]
    got = [max(1, math.floor(share)) for share in exact]
    by_remainder = sorted(range(len(got)), key=lambda s: (got[s] - exact[s], s))
    for s in by_remainder[: max(0, block - sum(got))]:
        got[s] += 1
    while sum(got) > block:  # the one place of tiny sources is taken from the largest
        got[got.index(max(got))] -= 1
    return got


class Mixture:
    """Which sample of which data set stands at which row of which global batch.

    An epoch is ``epoch_samples`` samples, rounded down to whole global batches; sources do not begin anew
    with it. Raises UserError if the settings do not fit together.
    """

    def __init__(
        self,
        shard_sizes: Sequence[NDArray[np.int64]],
        quota: Sequence[int] | None = None,
        *,
        weights: Sequence[float] | None = None,
        seed: int,
        global_batch_size: int,
        epoch_samples: int | None = None,
        lanes: int | None = None,
        window: int | Sequence[int] | None = None,
    ) -> None:
        """``shard_sizes``: of each source, samples in each shard. ``quota``: places of each source in a block
        (a run stores them), else ``weights``, by default the numbers of samples. ``epoch_samples``: by
        default all samples. ``window``: one for all sources or one each."""
        totals = [int(sizes.sum()) for sizes in shard_sizes]
        self.seed, self.global_batch_size = seed, global_batch_size
        self.num_samples = sum(totals)
        self.epoch_samples = self.num_samples if epoch_samples is None else epoch_samples
        self.steps_per_epoch = self.epoch_samples // global_batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"data.epoch_samples: {self.epoch_samples} must be at least the global batch of "
                f"{global_batch_size}"
            )
        shards = sum(int((sizes > 0).sum()) for sizes in shard_sizes)
        self.wanted_lanes = (
            default_lanes(self.num_samples, shards, global_batch_size) if lanes is None else lanes
        )
        """Lanes as for one set of all shards; there are fewer where a source has fewer samples."""
        self.lanes = self._fewer_lanes(min(totals)) if lanes is None else lanes
        check_lanes(self.lanes, global_batch_size)
        if (least := min(totals)) < self.lanes:
            raise UserError(
                f"data.lanes: {self.lanes} are more than the {least} samples of source "
                f"{totals.index(least)}; lower it"
            )
        self.rows_per_lane = global_batch_size // self.lanes
        self.block = block_size(self.rows_per_lane)
        self.quota = list(quota) if quota is not None else quotas(weights or totals, self.block)
        assert len(self.quota) == len(totals), "one quota per source"
        assert sum(self.quota) == self.block, "quotas make up a block"
        windows = list(window) if isinstance(window, Sequence) else [window] * len(totals)
        self.sizes = [np.asarray(sizes, dtype=np.int64) for sizes in shard_sizes]
        self._sets = [
            LaneOrder(
                sizes,
                seed=hash_words(seed, _SOURCES, s),
                lanes=self.lanes,
                lane_length=total // self.lanes,
                window=own,
            )
            for s, (sizes, total, own) in enumerate(zip(self.sizes, totals, windows, strict=True))
        ]
        self._deal()

    def _fewer_lanes(self, least: int) -> int:
        """The wanted lanes, and no more than the smallest source has samples."""
        most = min(self.wanted_lanes, least)
        return next(n for n in range(most, 0, -1) if self.global_batch_size % n == 0)

    def _deal(self) -> None:
        """The block: of each place its source and how many of that source's stand before it, int64 [block];
        of each source its places."""
        source = np.repeat(np.arange(len(self.quota)), self.quota)
        rank = np.concatenate([np.arange(quota) for quota in self.quota])
        size = np.asarray(self.quota)[source]
        # the i-th of q stands at (2i + 1) / 2q, compared in integers
        spread = np.lexsort((source, (2 * rank + 1) * (1 << 40) // (2 * size)))
        self._source, self._rank = source[spread], rank[spread]
        self._where = [np.flatnonzero(self._source == s) for s in range(len(self.quota))]

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (self.sizes, self.state())

    @property
    def effective_weights(self) -> list[float]:
        """The share of each source in every block, in the long run and over any lane."""
        return [quota / self.block for quota in self.quota]

    def places(self, epoch: int, step: int, rows: slice) -> Places:
        """What stands at some rows of a global batch, at a cost that follows from their number alone."""
        assert 0 <= step < self.steps_per_epoch, "step outside the epoch"
        row = np.arange(rows.start, rows.stop, dtype=np.int64)
        lane, row_in_lane = np.divmod(row, self.rows_per_lane)
        place = (epoch * self.steps_per_epoch + step) * self.rows_per_lane + row_in_lane
        block, place = np.divmod(place, self.block)
        turn = fold(fold(hash_words(self.seed, _BLOCKS), lane), block) % np.uint64(self.block)
        shift = turn.astype(np.int64)
        dealt = (place + shift) % self.block
        source = self._source[dealt]
        out = Places(source.astype(np.int16), np.empty_like(row), np.empty_like(row))
        for s, one in enumerate(self._sets):
            mine = np.flatnonzero(source == s)
            before = np.searchsorted(self._where[s], shift[mine])
            nth = (self._rank[dealt[mine]] - before) % self.quota[s] + block[mine] * self.quota[s]
            out.epoch[mine], position = np.divmod(nth, one.lane_length)
            for own_epoch in np.unique(out.epoch[mine]).tolist():
                now = out.epoch[mine] == own_epoch
                out.ordinal[mine[now]] = one.at(own_epoch, lane[mine[now]], position[now])
        return out

    def rest(self, source: int, epoch: int) -> Ints:
        """The sorted ordinals that a source leaves out in an epoch of its own, fewer than there are lanes."""
        return self._sets[source].rest(epoch)

    def shards_ahead(self, epoch: int, step: int, rows: slice) -> list[tuple[int, int]]:
        """(source, shard) that these rows read in their present blocks and the windows that follow, in the
        order of need."""
        lanes = range(rows.start // self.rows_per_lane, (rows.stop - 1) // self.rows_per_lane + 1)
        block = (epoch * self.steps_per_epoch + step) * self.rows_per_lane // self.block
        out: list[tuple[int, int]] = []
        for s, one in enumerate(self._sets):
            first, position = divmod(block * self.quota[s], one.lane_length)
            left = self.quota[s]
            for own_epoch, start in ((first, position), (first + 1, 0)):
                if left > 0:
                    needed = [one.shards_from(own_epoch, lane, start, left) for lane in lanes]
                    out += in_turn(needed, source=s)
                left -= one.lane_length - start
        return list(dict.fromkeys(out))

    def state(self) -> dict[str, Any]:
        """What makes the order, as JSON."""
        return {
            "seed": self.seed,
            "global_batch_size": self.global_batch_size,
            "lanes": self.lanes,
            "window": [one.window for one in self._sets],
            "quota": self.quota,
            "epoch_samples": self.epoch_samples,
        }


def _rebuild(sizes: list[NDArray[np.int64]], state: dict[str, Any]) -> Mixture:
    return Mixture(sizes, **state)
