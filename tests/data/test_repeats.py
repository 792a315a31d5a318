"""Repeated hashes against a dictionary, in shares as small as one."""

from collections import defaultdict

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from diptych.data.repeats import HashColumn, Place


@given(
    st.lists(st.lists(st.integers(0, 2**64 - 1) | st.integers(0, 5), max_size=9), max_size=6),
    st.integers(1, 40),
)
def test_repeats_are_those_of_a_dictionary(parts: list[list[int]], at_once: int) -> None:
    expected: defaultdict[int, list[Place]] = defaultdict(list)
    with HashColumn() as column:
        for part, values in enumerate(parts):
            column.append(np.array(values, dtype=np.uint64))
            for number, value in enumerate(values):
                expected[value].append((part, number))
        assert len(column) == sum(map(len, parts))
        got = list(column.repeats(at_once))
    assert sorted(got) == sorted(places for value, places in expected.items() if value and len(places) > 1)
