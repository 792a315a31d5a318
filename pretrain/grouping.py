"""A padded batch cut by length into the few groups that cost least.

For text towers that take padded captions only, but whose features do not depend on how far they are padded
(Hugging Face's, which mask it). Sorted by length and cut at the best places, each group is padded to its own
longest caption.
"""

import torch
from torch import Tensor


def cut_by_length(lengths: Tensor, overhead: int) -> list[int]:
    """Sizes of the groups of captions in ascending order of length, int64 [b], that need the least work.

    The work of a group is its number of captions times the longest of them, plus ``overhead`` tokens for
    running one more group. Exact, by dynamic programming over the distinct lengths.
    """
    values, counts = lengths.unique(return_counts=True)
    before = torch.cat([counts.new_zeros(1), counts.cumsum(0)])  # captions shorter than each distinct length
    least = before.new_zeros(len(values) + 1)  # work of all captions before a cut
    start = [0] * (len(values) + 1)
    for end in range(1, len(values) + 1):
        work = least[:end] + (before[end] - before[:end]) * values[end - 1] + overhead
        least[end], where = work.min(0)
        start[end] = int(where)
    sizes: list[int] = []
    end = len(values)
    while end:
        sizes.append(int(before[end] - before[start[end]]))
        end = start[end]
    return sizes[::-1]
