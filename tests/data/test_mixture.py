"""A mixture: exact shares, every sample of a source once in each of its epochs, the same from anywhere."""

import copy
import math
import pickle
from collections import Counter

import numpy as np
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from diptych.configs.errors import UserError
from diptych.data.mixture import Mixture, block_size, quotas
from diptych.data.order import Places, rank_slice


def every_place(mixture: Mixture, epochs: int) -> Places:
    """All rows of the first epochs, in order of their global batches."""
    rows = slice(0, mixture.global_batch_size)
    parts = [
        mixture.places(epoch, step, rows)
        for epoch in range(epochs)
        for step in range(mixture.steps_per_epoch)
    ]
    return Places(
        *(np.concatenate([getattr(p, name) for p in parts]) for name in ("source", "epoch", "ordinal"))
    )


def sizes_of(*sets: list[int]) -> list[np.ndarray]:
    return [np.array(sizes, dtype=np.int64) for sizes in sets]


@st.composite
def mixtures(draw: st.DrawFn, least: int = 1, rows: tuple[int, int] = (1, 8)) -> Mixture:
    sets = draw(
        st.lists(st.lists(st.integers(least, least + 30), min_size=1, max_size=5), min_size=1, max_size=3)
    )
    lanes = draw(st.integers(1, min(6, *(sum(sizes) for sizes in sets))))
    batch = lanes * draw(st.integers(*rows))
    return Mixture(
        sizes_of(*sets),
        weights=draw(st.lists(st.floats(0.01, 10), min_size=len(sets), max_size=len(sets)) | st.none()),
        seed=draw(st.integers(0, 2**63)),
        global_batch_size=batch,
        epoch_samples=batch * draw(st.integers(1, 12)),
        lanes=lanes,
        window=draw(st.integers(1, 40) | st.none()),
    )


@settings(deadline=None, max_examples=40)
@given(mixture=mixtures())
def test_a_source_gives_each_sample_once_per_epoch_of_its_own(mixture: Mixture) -> None:
    places = every_place(mixture, 3)
    lane = np.arange(len(places.source)) % mixture.global_batch_size // mixture.rows_per_lane
    for source, sizes in enumerate(mixture.sizes):
        mine = places.source == source
        # lanes finish an epoch at different steps; none goes back
        finished = min(places.epoch[mine & (lane == one)].max(initial=0) for one in range(mixture.lanes))
        for epoch in np.unique(places.epoch[mine]).tolist():
            ordinals = places.ordinal[mine & (places.epoch == epoch)]
            rest = mixture.rest(source, epoch)
            assert len(rest) < mixture.lanes
            found = np.sort(np.concatenate([ordinals, rest]))
            assert len(np.unique(found)) == len(found)
            if epoch < finished:
                event("a finished epoch")
                assert np.array_equal(found, np.arange(sizes.sum()))


def test_a_small_source_that_keeps_lanes_few_is_known() -> None:
    large = np.full(2000, 1000)
    mixture = Mixture([large, np.array([40])], seed=0, global_batch_size=256)
    assert (mixture.wanted_lanes, mixture.lanes) == (128, 32)
    assert Mixture([large, large], seed=0, global_batch_size=256).lanes == 256


def test_a_lane_goes_through_a_source_in_order_and_never_back() -> None:
    mixture = Mixture(
        sizes_of([7, 5], [20], [300]),
        weights=[1, 2, 4],
        seed=4,
        global_batch_size=9,
        lanes=3,
        epoch_samples=900,
    )
    places = every_place(mixture, 3)
    for lane in range(3):
        row = np.arange(len(places.source)) % 9 // 3 == lane
        for source in range(3):
            assert (np.diff(places.epoch[row & (places.source == source)]) >= 0).all()


@settings(deadline=None, max_examples=10)
@given(mixture=mixtures(least=1000, rows=(200, 500)))
def test_every_block_of_every_lane_holds_the_quota(mixture: Mixture) -> None:
    steps = mixture.block // mixture.rows_per_lane
    rows = slice(0, mixture.global_batch_size)
    parts = [mixture.places(*divmod(step, mixture.steps_per_epoch), rows).source for step in range(steps)]
    by_lane = np.stack(parts).reshape(steps, mixture.lanes, mixture.rows_per_lane)
    for lane in range(mixture.lanes):
        counts = np.bincount(by_lane[:, lane].ravel(), minlength=len(mixture.quota))
        assert counts.tolist() == mixture.quota


@settings(deadline=None, max_examples=40)
@given(mixture=mixtures(), world_size=st.integers(1, 9), data=st.data())
def test_ranks_have_the_rows_of_the_global_batch(
    mixture: Mixture, world_size: int, data: st.DataObject
) -> None:
    batch = mixture.global_batch_size
    world_size = min(world_size, batch)
    epoch, step = data.draw(st.integers(0, 50)), data.draw(st.integers(0, mixture.steps_per_epoch - 1))
    whole = mixture.places(epoch, step, slice(0, batch))
    for other in (mixture, copy.copy(mixture), pickle.loads(pickle.dumps(mixture))):
        parts = [other.places(epoch, step, rank_slice(rank, world_size, batch)) for rank in range(world_size)]
        for name in ("source", "epoch", "ordinal"):
            assert np.array_equal(np.concatenate([getattr(p, name) for p in parts]), getattr(whole, name))


@given(weights=st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=20), block=st.integers(64, 10_000))
def test_quotas_are_the_weights_to_within_a_place(weights: list[float], block: int) -> None:
    got = quotas(weights, block)
    exact = np.array(weights) / math.fsum(weights) * block
    assert sum(got) == block
    assert min(got) >= 1
    if exact.min() >= 1:
        assert np.abs(np.array(got) - exact).max() < 1


def test_quotas_round_up_the_largest_remainders() -> None:
    assert quotas([1, 1, 1], 4096) == [1366, 1365, 1365]
    assert quotas([0.7, 0.2, 0.1], 4096) == [2867, 819, 410]
    assert quotas([1e9, 1], 4096) == [4095, 1]
    assert block_size(1) == 4096
    assert block_size(3) == 4098
    assert block_size(5000) == 5000


def test_the_mixture_is_a_promise() -> None:
    """Runs are resumed by later versions: these numbers may never change."""
    mixture = Mixture(sizes_of([7, 5], [20]), weights=[1, 2], seed=42, global_batch_size=6, lanes=2, window=4)
    places = mixture.places(1, 2, slice(0, 6))
    assert places.source.tolist() == [1, 0, 1, 0, 1, 1]
    assert places.epoch.tolist() == PROMISE[0]
    assert places.ordinal.tolist() == PROMISE[1]


PROMISE = [[1, 1, 1, 1, 1, 1], [3, 1, 8, 7, 13, 18]]


def test_a_batch_mixes_sources_within_and_across_lanes() -> None:
    mixture = Mixture(
        sizes_of([1000] * 8, [1000] * 8),
        weights=[1, 1],
        seed=1,
        global_batch_size=64,
        lanes=64,
        epoch_samples=64_000,
    )
    shares = [mixture.places(0, step, slice(0, 64)).source.mean() for step in range(200)]
    assert np.std(shares) < 2 * math.sqrt(0.25 / 64)  # lanes do not march in step
    assert Counter(mixture.places(0, 3, slice(0, 64)).source.tolist()).keys() == {0, 1}


def test_shards_ahead_are_those_that_are_read() -> None:
    mixture = Mixture(
        sizes_of([500] * 40, [200] * 10), weights=[3, 1], seed=2, global_batch_size=16, lanes=4, window=900
    )
    rows = slice(4, 12)  # lanes 1 and 2
    for step in range(0, mixture.steps_per_epoch, 67):
        ahead = mixture.shards_ahead(0, step, rows)
        assert len(set(ahead)) == len(ahead) < 45
        now = mixture.places(0, step, rows)
        read = {
            (int(source), int(ordinal) // (500 if source == 0 else 200))
            for source, ordinal in zip(now.source, now.ordinal, strict=True)
        }
        assert read <= set(ahead)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"weights": [1, 0]}, "must be positive"),
        ({"weights": [1, float("nan")]}, "must be positive"),
        ({"epoch_samples": 5}, "data.epoch_samples: 5 must be at least the global batch of 8"),
        ({"lanes": 3}, "data.lanes: 3 must divide"),
        ({"lanes": 8, "sizes": ([50], [5])}, "data.lanes: 8 are more than the 5 samples of source 1"),
    ],
)
def test_mistakes_are_told_in_a_sentence(settings: dict, words: str) -> None:
    sets = settings.pop("sizes", ([50], [50]))
    with pytest.raises(UserError, match=words):
        Mixture(sizes_of(*sets), seed=0, global_batch_size=8, **settings)
