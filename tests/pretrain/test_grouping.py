"""The cut of a batch by length against every possible cut."""

import itertools

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.pretrain.grouping import cut_by_length


def work(lengths: Tensor, sizes: list[int], overhead: int) -> int:
    return sum(len(part) * int(part.max()) + overhead for part in lengths.split(sizes))


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 77), min_size=1, max_size=8).map(sorted), overhead=st.integers(0, 100))
def test_no_other_cut_needs_less_work(lengths: list[int], overhead: int) -> None:
    given = torch.tensor(lengths)
    sizes = cut_by_length(given, overhead)
    assert sum(sizes) == len(lengths)
    places = range(1, len(lengths))
    best = min(
        work(given, [b - a for a, b in itertools.pairwise((0, *cuts, len(lengths)))], overhead)
        for k in range(len(lengths))
        for cuts in itertools.combinations(places, k)
    )
    assert work(given, sizes, overhead) == best


def test_no_caption_gives_no_group() -> None:
    assert cut_by_length(torch.zeros(0, dtype=torch.long), 32) == []
