"""The valid pairs of a global batch: how many each rank has, which share a caption, what each one weighs.

All of it is worked out on the CPU, over CPU collectives, so that no step waits for the device.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from . import distributed

Duplicates = Literal["negatives", "positives", "ignore"]


@dataclass(frozen=True)
class Pairs:
    """The valid pairs of all ranks, numbered in rank order."""

    counts: list[int]  # by rank
    rank: int
    group: distributed.Group
    duplicates: Duplicates
    caption: Tensor | None  # int64 [N], CPU: captions numbered; None where no two that matter are the same
    caption_here: Tensor | None  # int32 [N]: the same on the device of the features
    weight: Tensor | None  # fp64 [N], CPU

    @property
    def total(self) -> int:
        """N, the valid pairs of all ranks."""
        return sum(self.counts)

    @property
    def divisor(self) -> float:
        """What the sums are divided by: the sum of the weights, or the number of pairs; 1 where it is 0."""
        return float(self.total if self.weight is None else self.weight.sum()) or 1.0

    @property
    def own(self) -> slice:
        """The numbers of this rank's pairs."""
        return self.of(self.rank)

    def of(self, rank: int) -> slice:
        """The numbers of a rank's pairs."""
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])

    def sizes(self) -> Tensor:
        """fp64 [N], CPU: how many pairs have the same caption, the pair itself included."""
        if self.caption is None:
            return torch.ones(self.total, dtype=torch.float64)
        return self.caption.bincount()[self.caption].double()

    def ignored(self, rows: slice, columns: slice) -> Tensor | None:
        """bool [r, c]: what is left out of the sums, as one caption's other pairs; None where nothing is."""
        if self.caption_here is None or self.duplicates != "ignore":
            return None
        same = self.caption_here[rows, None] == self.caption_here[None, columns]
        same.diagonal(rows.start - columns.start).fill_(False)
        return same


def gather_pairs(
    rows: int,
    caption_hash: Tensor | None,
    weight: Tensor | None,
    *,
    duplicates: Duplicates,
    device: torch.device,
    group: distributed.Group,
) -> Pairs:
    """What all ranks must know of each other's ``rows`` valid pairs; caption_hash int64 [rows] and weight
    float [rows] lie on the CPU."""
    counts = distributed.row_counts(rows, group=group)
    pairs = Pairs(counts, distributed.rank(group), group, duplicates, None, None, None)
    if weight is not None:
        pairs = replace(pairs, weight=distributed.all_gather_rows(weight.double(), counts, group))
    if duplicates != "negatives":
        assert caption_hash is not None, "duplicates other than negatives need caption_hash"
        everyone = distributed.all_gather_rows(caption_hash, counts, group)
        names, caption = everyone.unique(return_inverse=True)
        if len(names) < len(everyone):
            here = caption.int().to(device, non_blocking=True)
            pairs = replace(pairs, caption=caption, caption_here=here)
    return pairs


@dataclass(frozen=True)
class Targets:
    """What the logits are pulled towards, a symmetric matrix A [N, N] that is never written down:

        A_ij = (own_i + own_j) [i = j] + (same_i + same_j) [captions equal] + (every_i + every_j)

    The losses are linear in it (``- sum_ij A_ij S_ij``), so that it costs O(N D) by sums over captions.
    """

    own: Tensor  # floats [N]
    same: Tensor | None
    every: Tensor | None
    caption: Tensor | None  # int64 [N], CPU

    def subtract(self, out: Tensor, rows: slice, columns: slice, of: Tensor) -> None:
        """``out [r, D] -= A[rows, columns] @ of [c, D]``."""
        start, stop = max(rows.start, columns.start), min(rows.stop, columns.stop)
        if start < stop:
            mine = out[start - rows.start : stop - rows.start]
            mine.addcmul_(
                self.own[start:stop, None], of[start - columns.start : stop - columns.start], value=-2
            )
        if self.same is not None:
            assert self.caption is not None
            both = torch.cat([self.caption[rows], self.caption[columns]])
            names, number = both.unique(return_inverse=True)
            mine, theirs = number.to(out.device, non_blocking=True).split([out.shape[0], of.shape[0]])
            sums = of.new_zeros((len(names), of.shape[1])).index_add_(0, theirs, of)
            out.addcmul_(self.same[rows, None], sums[mine], value=-1)
            sums.zero_().index_add_(0, theirs, of * self.same[columns, None])
            out -= sums[mine]
        if self.every is not None:
            out.addcmul_(self.every[rows, None], of.sum(0), value=-1)
            out -= self.every[columns] @ of


def targets(pairs: Pairs, label_smoothing: float, *, uniform: bool, like: Tensor) -> Targets:
    """Targets of weight_i for a row and a column i each, in ``like``'s dtype and on its device.

    They are spread evenly over the matches of a row if ``uniform`` (softmax), and are the whole weight for
    every match otherwise (sigmoid, where a pair belongs half to its row and half to its column). A share
    ``label_smoothing`` goes evenly to all that is not ignored.
    """
    weight, sizes = pairs.weight, pairs.sizes()
    if weight is None:
        weight = torch.ones(pairs.total, dtype=torch.float64)
    own = (1 - label_smoothing) * (weight if uniform else weight / 2)
    same = every = None
    if pairs.caption is not None and pairs.duplicates == "positives":
        own, same = torch.zeros_like(own), own / sizes if uniform else own
    if label_smoothing:
        ignoring = pairs.caption is not None and pairs.duplicates == "ignore"
        every = label_smoothing * weight / (pairs.total - sizes + 1 if ignoring else pairs.total)
        if ignoring:  # everything but the caption's other pairs
            own, same = own + every, -every
    own, same, every = (None if t is None else t.to(like, non_blocking=True) for t in (own, same, every))
    assert own is not None
    return Targets(own, same, every, pairs.caption)


def tiles(rows: int, columns: int, tile: int) -> Iterator[tuple[slice, slice]]:
    """(rows, columns) of every tile of a matrix, along the rows first."""
    for r in range(0, rows, tile):
        for c in range(0, columns, tile):
            yield slice(r, min(r + tile, rows)), slice(c, min(c + tile, columns))


def shifted(part: slice, by: int) -> slice:
    """The slice ``by`` further on."""
    return slice(part.start + by, part.stop + by)
