"""How every rank's images meet every rank's texts: all texts gathered at once, or passed round a ring.

Both take a piece of work to all blocks of texts. What a rank works out for another's texts (column sums,
gradients) comes home to their owner, merged with what the others found.

``Gather`` holds the texts of all ranks: one all-gather, one reduction. ``Ring`` holds two blocks at a time,
so that memory is O(B_local D): while a rank works on one block the next is on its way, and so are the results
for the block before.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from . import distributed
from .pairs import Pairs

ExchangeName = Literal["gather", "ring"]

Work = Callable[[slice, Tensor, Tensor | None, Tensor], None]
"""(numbers of the columns, their texts [c, D], what was sent along [c, ..], results [c, ..] to fill)"""


@dataclass(frozen=True)
class Merge:
    """How the results of several ranks for the same columns become one."""

    empty: float
    pair: Callable[[Tensor, Tensor], Tensor]
    across: Callable[[Tensor, Pairs], Tensor]  # [N, ..] over all ranks -> this rank's own rows


def _log_sum_exp_across(found: Tensor, pairs: Pairs) -> Tensor:
    if len(pairs.counts) == 1:
        return found
    top = distributed.all_reduce_max(found, pairs.group)
    return (top + distributed.all_reduce_sum((found - top).exp2_(), pairs.group).log2_())[pairs.own]


def _sum_across(found: Tensor, pairs: Pairs) -> Tensor:
    return distributed.reduce_scatter_rows(found, pairs.counts, pairs.group)


SUM = Merge(0.0, torch.add, _sum_across)
LOG_SUM_EXP_2 = Merge(-torch.inf, torch.logaddexp2, _log_sum_exp_across)  # in base 2


class Exchange(Protocol):
    """The texts of all ranks, a block at a time."""

    def visit(self, merge: Merge, shape: tuple[int, ...], along: Tensor | None, work: Work) -> Tensor:
        """Do ``work`` on every block; [n, *shape]: what all ranks found for this rank's own texts.

        ``along`` [n, ..]: numbers of this rank's texts that go where the texts go.
        """
        ...


class Gather:
    """All texts on every rank."""

    def __init__(self, text: Tensor, pairs: Pairs) -> None:
        self.pairs = pairs
        self.texts = distributed.all_gather_rows(text, pairs.counts, pairs.group)

    def visit(self, merge: Merge, shape: tuple[int, ...], along: Tensor | None, work: Work) -> Tensor:
        """See ``Exchange.visit``."""
        pairs = self.pairs
        if along is not None:
            along = distributed.all_gather_rows(along, pairs.counts, pairs.group)
        found = self.texts.new_full((pairs.total, *shape), merge.empty)
        work(slice(0, pairs.total), self.texts, along, found)
        return merge.across(found, pairs)


class Ring:
    """Each rank's texts go from rank to rank, down to the one before, and their results follow."""

    def __init__(self, text: Tensor, pairs: Pairs) -> None:
        self.pairs = pairs
        self.text = text.contiguous()

    def visit(self, merge: Merge, shape: tuple[int, ...], along: Tensor | None, work: Work) -> Tensor:
        """See ``Exchange.visit``."""
        pairs, world = self.pairs, len(self.pairs.counts)
        held = [self.text] if along is None else [self.text, along]
        results: Callable[[], list[Tensor]] | None = None
        for step in range(world):
            block = (pairs.rank + step) % world
            rows_next = pairs.counts[(block + 1) % world]
            texts = distributed.pass_down(held, rows_next, pairs.group) if step + 1 < world else None
            found = self.text.new_full((pairs.counts[block], *shape), merge.empty)
            work(pairs.of(block), held[0], None if along is None else held[1], found)
            if results is not None:  # what the ranks above found for this block
                found = merge.pair(results()[0], found)
            results = distributed.pass_down([found], rows_next, pairs.group)
            if texts is not None:
                held = texts()
        assert results is not None
        return results()[0]


def open_exchange(name: ExchangeName, text: Tensor, pairs: Pairs) -> Exchange:
    """The exchange of that name; alone, a process has nothing to pass round."""
    return Ring(text, pairs) if name == "ring" and len(pairs.counts) > 1 else Gather(text, pairs)
