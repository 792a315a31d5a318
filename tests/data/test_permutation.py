"""Keyed permutations and random numbers, against their definitions and published values."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.random import Generator, Philox

from diptych.data.permutation import SampleRandom, fold, hash_words, permute


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@example(size=1, key=0)
@example(size=1024, key=1)
@example(size=1025, key=1)
def test_every_size_and_key_gives_a_permutation(size: int, key: int) -> None:
    out = permute(np.arange(size), size, key, largest=size)
    assert np.array_equal(np.sort(out), np.arange(size))


@given(size=st.integers(1, 500), more=st.integers(0, 600), key=st.integers(0, 2**64 - 1))
def test_a_larger_network_also_permutes_the_smaller_range(size: int, more: int, key: int) -> None:
    out = permute(np.arange(size), size, key, largest=size + more)
    assert np.array_equal(np.sort(out), np.arange(size))


@given(
    st.lists(st.tuples(st.integers(1, 99), st.integers(0, 5), st.data()), min_size=1, max_size=30),
)
def test_elements_of_many_sizes_and_keys_go_where_they_would_alone(
    rows: list[tuple[int, int, st.DataObject]],
) -> None:
    x = [data.draw(st.integers(0, size - 1)) for size, _, data in rows]
    sizes, keys = [size for size, _, _ in rows], [key for _, key, _ in rows]
    together = permute(x, sizes, np.array(keys, dtype=np.uint64), largest=99)
    alone = [int(permute(*row, largest=99)[0]) for row in zip(x, sizes, keys, strict=True)]
    assert together.tolist() == alone


def test_five_billion_samples_need_no_memory() -> None:
    size = 5_000_000_000
    x = np.arange(size - 1000, size)
    out = permute(x, size, 7, largest=size)
    assert len(np.unique(out)) == 1000
    assert out.min() >= 0
    assert out.max() < size
    assert np.std(out / size) == pytest.approx(12**-0.5, abs=0.03)


@pytest.mark.parametrize("size", [2, 3, 5, 8, 37, 64])
def test_over_the_keys_every_element_goes_everywhere_equally_often(size: int) -> None:
    keys = 4000
    x = np.tile(np.arange(size), keys)
    key = np.repeat(fold(11, np.arange(keys)), size)
    out = permute(x, size, key, largest=size)
    counts = np.zeros((size, size))
    np.add.at(counts, (x, out), 1)
    expected = keys / size
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    freedom = (size - 1) ** 2
    assert abs(chi_squared - freedom) < 6 * (2 * freedom) ** 0.5 + 6


def test_neighbours_are_torn_apart() -> None:
    out = permute(np.arange(20_000), 20_000, 3, largest=20_000).astype(float)
    assert abs(np.corrcoef(out[:-1], out[1:])[0, 1]) < 0.03
    apart = np.abs(np.diff(out))
    assert apart.mean() == pytest.approx(20_000 / 3, rel=0.03)  # as for independent uniform numbers


def test_hashes_are_those_of_splitmix64() -> None:
    # the first outputs of SplitMix64 with seed 0 (Vigna, https://prng.di.unimi.it/splitmix64.c)
    assert fold(0, [1, 2, 3]).tolist() == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert hash_words(0) == 0xE220A8397B1DCDAF


@given(st.lists(st.integers(-(2**70), 2**70), min_size=1, max_size=4))
def test_hashes_tell_words_and_their_order_apart(words: list[int]) -> None:
    assert 0 <= hash_words(*words) < 2**64
    assert hash_words(*words) == hash_words(*(word % 2**64 for word in words))
    assert hash_words(*words) != hash_words(*words, 0)
    for i in range(len(words) - 1):
        swapped = [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
        if (words[i] - words[i + 1]) % 2**64:
            assert hash_words(*words) != hash_words(*swapped)


def test_a_samples_numbers_are_philoxs_whatever_was_drawn_before() -> None:
    random = SampleRandom(5)
    for epoch, sample_id, purpose in [(0, 0, 0), (3, 2**40, 1), (0, 0, 0)]:
        truth = Generator(Philox(key=[5, epoch], counter=[0, sample_id, purpose, 0]))
        generator = random.at(epoch, sample_id, purpose)
        assert generator.random(9).tolist() == truth.random(9).tolist()
        assert (
            generator.integers(0, 7, 5, dtype=np.uint32).tolist()
            == truth.integers(0, 7, 5, dtype=np.uint32).tolist()
        )


def test_seeds_epochs_samples_and_purposes_have_numbers_of_their_own() -> None:
    first = [
        float(SampleRandom(seed).at(epoch, sample_id, purpose).random())
        for seed in (0, 1, -1)
        for epoch in (0, 1)
        for sample_id in (0, 1, 2)
        for purpose in (0, 1)
    ]
    assert len(set(first)) == 36
