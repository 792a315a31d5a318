"""Processes that meet through a store that earlier ones have used."""

from typing import Any

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] # torch says so of all its stores

from diptych.configs.errors import UserError
from diptych.pretrain import meeting

from .threads import together


def gather(store: Any, world_size: int, timeout_s: float = 20.0) -> list[str]:
    """What each process takes the meeting's name to be."""
    first = [lambda: meeting._gather(store, world_size, timeout_s)]
    rest = [lambda r=rank: meeting._come(store, r, timeout_s) for rank in range(1, world_size)]
    return together([*rest, *first])


def test_all_have_one_name_and_another_one_every_time() -> None:
    store = HashStore()
    names = [gather(store, 3) for _ in range(3)]
    assert all(len(set(one)) == 1 for one in names)
    assert len({one[0] for one in names}) == 3


def test_word_of_a_dead_process_is_not_taken_for_a_living_one() -> None:
    store = HashStore()
    store.set("diptych/here/1", "dead")
    first, second = gather(store, 2)
    assert first == second
    assert store.check([f"diptych/ready/{first}/1"])
    assert store.get(f"diptych/ready/{first}/1") == store.get("diptych/here/1") != b"dead"


def test_who_does_not_come_is_named() -> None:
    store = HashStore()
    store.set("diptych/here/2", "dead")
    with pytest.raises(UserError, match=r"rank 1 and 1 more of 3 processes did not come within") as told:
        meeting._gather(store, 3, 0.2)
    assert told.value.alone
