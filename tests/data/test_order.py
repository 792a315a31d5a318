"""The order of samples: every sample once, the same from anywhere, local in shards, known for ever."""

import copy
import math
import pickle
import time
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from diptych.configs.errors import UserError
from diptych.data.lanes import default_lanes, default_window
from diptych.data.order import Order, Steps, rank_slice

Ints = NDArray[np.int64]
PROMISE = [[25, 21, 22, 24, 2, 4, 1, 3], [23, 28, 30, 26, 0, 6, 14, 12]]
PROMISED_REST = [13]


def epoch_of(order: Order, epoch: int) -> Ints:
    return np.concatenate([order.global_batch(epoch, step) for step in range(order.steps_per_epoch)])


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(0, 40), min_size=1, max_size=12).filter(lambda s: sum(s) > 0))
    batch = draw(st.integers(1, sum(sizes)))
    lanes = draw(st.sampled_from([n for n in range(1, batch + 1) if batch % n == 0]) | st.none())
    window = draw(st.integers(1, 60) | st.none())
    return Order(sizes, seed=draw(st.integers(0, 2**63)), global_batch_size=batch, lanes=lanes, window=window)


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 10**6))
def test_an_epoch_has_every_sample_once_but_the_rest(order: Order, epoch: int) -> None:
    ids, rest = epoch_of(order, epoch), order.rest(epoch)
    assert len(rest) == order.num_samples % order.global_batch_size
    assert np.array_equal(rest, np.sort(rest))
    assert np.array_equal(np.sort(np.concatenate([ids, rest])), np.arange(order.num_samples))


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 100), world_size=st.integers(1, 9), data=st.data())
def test_ranks_have_the_rows_of_the_global_batch_and_none_is_empty(
    order: Order, epoch: int, world_size: int, data: st.DataObject
) -> None:
    world_size = min(world_size, order.global_batch_size)
    step = data.draw(st.integers(0, order.steps_per_epoch - 1))
    shares = [order.local_batch(epoch, step, rank, world_size) for rank in range(world_size)]
    assert np.array_equal(np.concatenate(shares), order.global_batch(epoch, step))
    sizes = [len(share) for share in shares]
    assert min(sizes) >= 1
    assert max(sizes) - min(sizes) <= 1
    assert all(share.dtype == np.int64 for share in shares)


@settings(deadline=None)
@given(order=orders(), data=st.data())
def test_a_sample_left_out_is_in_the_next_epoch_and_all_are_left_out_equally_often(
    order: Order, data: st.DataObject
) -> None:
    count = order.num_samples % order.global_batch_size
    start = data.draw(st.integers(0, 1000))
    assert not set(order.rest(start).tolist()) & set(order.rest(start + 1).tolist())
    if count:
        period = order.num_samples // math.gcd(order.num_samples, count)
        times = Counter(i for e in range(start, start + period) for i in order.rest(e).tolist())
        assert set(times.values()) == {count * period // order.num_samples}
        assert len(times) == order.num_samples


@given(b=st.integers(1, 5000), data=st.data())
def test_rank_slices_are_floors_and_tile_the_batch(b: int, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, min(b, 64)))
    slices = [rank_slice(r, ranks, b) for r in range(ranks)]
    assert [s.start for s in slices] == [math.floor(r * b / ranks) for r in range(ranks)]
    assert slices[-1].stop == b
    assert all(left.stop == right.start for left, right in pairwise(slices))


def test_epochs_and_seeds_differ_and_calls_do_not() -> None:
    first, again = (Order([50] * 6, seed=4, global_batch_size=30) for _ in range(2))
    other = Order([50] * 6, seed=5, global_batch_size=30)
    assert np.array_equal(epoch_of(first, 2), epoch_of(again, 2)[:])
    assert np.array_equal(again.global_batch(2, 3), epoch_of(first, 2)[90:120])  # without what came before
    assert not np.array_equal(epoch_of(first, 2), epoch_of(first, 3))
    assert not np.array_equal(epoch_of(first, 2), epoch_of(other, 2))


def test_the_order_is_a_promise() -> None:
    """Runs are resumed by later versions: these numbers may never change."""
    order = Order([7, 0, 5, 9, 12], seed=42, global_batch_size=8, lanes=2, window=6)
    assert [order.global_batch(1, step).tolist() for step in range(2)] == PROMISE
    assert order.rest(0).tolist() == PROMISED_REST
    assert order.rest(2**40).tolist() == Order([33], seed=42, global_batch_size=8).rest(2**40).tolist()


def test_copies_and_pickles_are_the_same_order() -> None:
    order = Order([70, 30, 41], seed=9, global_batch_size=12, lanes=3, window=10)
    order.global_batch(0, 0)
    for twin in (copy.copy(order), copy.deepcopy(order), pickle.loads(pickle.dumps(order))):
        assert np.array_equal(epoch_of(twin, 3), epoch_of(order, 3))
        assert (twin.lanes, twin.window) == (3, 10)


def test_small_data_is_shuffled_as_a_whole() -> None:
    order = Order([1000] * 20, seed=0, global_batch_size=512)
    assert order.lanes == 1
    ids = epoch_of(order, 0)
    shards_per_batch = [len(np.unique(ids[i : i + 512] // 1000)) for i in range(0, len(ids), 512)]
    assert min(shards_per_batch) == 20
    # each shard's share of a batch is as of independent draws
    shares = np.stack([np.bincount(ids[i : i + 512] // 1000, minlength=20) for i in range(0, len(ids), 512)])
    assert shares.var() == pytest.approx(512 / 20 * 19 / 20 * (1 - 512 / 20000), rel=0.25)
    assert abs(np.corrcoef(ids[:-1], ids[1:])[0, 1]) < 0.03
    assert abs(np.corrcoef(np.arange(len(ids)), ids)[0, 1]) < 0.03


def test_large_data_is_read_from_a_few_shards_at_a_time() -> None:
    order = Order([100] * 400, seed=0, global_batch_size=64, lanes=4, window=300)
    rows = np.stack([order.global_batch(0, step) for step in range(order.steps_per_epoch)])
    lanes = rows.reshape(order.steps_per_epoch, 4, 16)
    shards = lanes // 100
    for lane in range(4):  # ten steps take 160 samples, so at most two windows of three to four shards
        assert all(len(np.unique(shards[t : t + 10, lane])) <= 9 for t in range(order.steps_per_epoch - 10))
    in_lane = [set(np.unique(shards[:, lane]).tolist()) for lane in range(4)]
    assert all(len(in_lane[a] & in_lane[b]) <= 1 for a in range(4) for b in range(a))  # but where it is cut


def test_defaults_follow_the_data() -> None:
    assert default_lanes(262_144, 400, 512) == 1
    assert default_lanes(3_000_000, 332, 512) == 32  # the most that divide 512 and are at most 332 / 8
    assert default_lanes(3_000_000, 3, 512) == 1
    assert default_lanes(10**9, 10**5, 96) == 96
    assert default_window(3_000_000, 332, 32) == 36_145
    assert default_window(5_000_000_000, 100_000, 4096) == 200_000
    assert default_window(20_000, 20, 1) == 262_144
    given = Order([10] * 10, seed=0, global_batch_size=10, lanes=5, window=7)
    assert (given.lanes, given.window, given.steps_per_epoch, given.num_samples) == (5, 7, 10, 100)


def test_shuffling_keeps_to_its_lane_and_window() -> None:
    order = Order([1000], seed=1, global_batch_size=10, lanes=2, window=100)
    ids = np.stack([order.global_batch(0, step) for step in range(100)])
    for lane in range(2):  # one shard in order: ids are virtual positions
        mine = ids[:, 5 * lane : 5 * lane + 5].ravel()
        for window in range(5):
            part = np.sort(mine[100 * window : 100 * window + 100])
            assert np.array_equal(part, 500 * lane + 100 * window + np.arange(100))


@settings(deadline=None, max_examples=30)
@given(order=orders(), epoch=st.integers(0, 50), data=st.data())
def test_shards_ahead_are_those_that_are_read_now_and_next(
    order: Order, epoch: int, data: st.DataObject
) -> None:
    batch, steps = order.global_batch_size, order.steps_per_epoch
    start = data.draw(st.integers(0, batch - 1))
    rows = slice(start, data.draw(st.integers(start + 1, batch)))
    step = data.draw(st.integers(0, steps - 1))
    ahead = order.shards_ahead(epoch, step, rows)
    assert len(set(ahead)) == len(ahead)
    ends = np.cumsum(order.shard_sizes)
    read = np.searchsorted(ends, order.places(epoch, step, rows).ordinal, side="right")
    assert {(0, int(shard)) for shard in read} <= set(ahead)


def test_shards_of_the_next_epoch_are_known_before_it_begins() -> None:
    order = Order([100] * 400, seed=0, global_batch_size=64, lanes=4, window=300)
    rows, last = slice(0, 64), order.steps_per_epoch - 2
    begins = np.concatenate([order.global_batch(1, step) for step in range(3)]) // 100
    ahead = {shard for _, shard in order.shards_ahead(0, last, rows)}
    assert len(set(begins.tolist()) - ahead) <= 1  # windows are cut at samples, shards are whole


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"global_batch_size": 101}, "global_batch_size: 101 is more than the 100 samples"),
        ({"global_batch_size": 10, "lanes": 3}, "data.lanes: 3 must divide"),
        ({"global_batch_size": 10, "lanes": 0}, "data.lanes: 0"),
        ({"global_batch_size": 10, "window": 0}, "data.window: 0"),
    ],
)
def test_mistakes_are_told_in_a_sentence(settings: dict[str, int], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Order([50, 50], seed=0, **settings)


def test_steps_run_on_into_the_next_epoch() -> None:
    places = iter(Steps(1, 2, 4))
    assert [next(places) for _ in range(4)] == [(1, 2), (1, 3), (2, 0), (2, 1)]


def test_five_billion_samples_cost_milliseconds() -> None:
    sizes = np.full(100_000, 50_000)
    start = time.process_time()
    order = Order(sizes, seed=0, global_batch_size=65_536)
    first = order.local_batch(3, 45_000, 7, 1024)
    assert time.process_time() - start < 1  # 30 ms on an idle machine
    start = time.process_time()
    parts = [order.local_batch(3, step, 7, 1024) for step in range(45_000, 45_100)]
    assert (time.process_time() - start) / 6400 < 100e-6  # 5 us a sample
    assert np.array_equal(parts[0], first)
    assert len(np.unique(np.concatenate(parts))) == 6400
