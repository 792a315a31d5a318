"""Whether all processes still hold the same: one number per tensor, compared by one small all-reduce.

A flipped bit in one machine's memory, or a kernel that rounds otherwise, sets one process apart; averaged
gradients then carry it to the others without a sign in the loss.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import distributed

__all__ = ["Difference", "compare", "fingerprint", "fingerprint_json"]

_CHUNK = 1 << 20  # elements at a time: 16 MiB of intermediates
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_factors: dict[torch.device, Tensor] = {}


def fingerprint(tensor: Tensor) -> Tensor:
    """A number int64 [] on the tensor's device that follows from all its bits.

    Its elements are taken as integers, each times an odd factor of its own, and added up modulo 2^64: a
    change of a single element always shows, of several but for one in 2^32 cases at most.
    """
    bits = tensor.detach().contiguous().flatten().view(_INTEGERS[tensor.element_size()])
    factors = _factors_on(tensor.device)
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for number, chunk in enumerate(bits.split(_CHUNK)):
        total += (chunk * factors[: len(chunk)]).sum() * (2 * number + 1)
    return total


def _factors_on(device: torch.device) -> Tensor:
    """Odd pseudo-random factors int64 [_CHUNK], by the finalizer of SplitMix64 (Steele et al., 2014)."""
    if device not in _factors:
        x = torch.arange(1, _CHUNK + 1, device=device) * _signed(0x9E3779B97F4A7C15)
        x = (x ^ (x >> 30)) * _signed(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> 27)) * _signed(0x94D049BB133111EB)
        _factors[device] = (x ^ (x >> 31)) | 1
    return _factors[device]


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x


def fingerprint_json(value: Any) -> Tensor:
    """The same of a JSON value, on the CPU."""
    digest = hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).digest()
    return torch.tensor(int.from_bytes(digest, "little", signed=True))


class Difference:
    """What is not the same on all processes."""

    def __init__(self, names: list[str], table: list[list[int]]) -> None:
        """``table``: the fingerprint of each name, by rank."""
        columns = list(zip(*table, strict=True))
        odd = [i for i, column in enumerate(columns) if len(set(column)) > 1]
        first = columns[odd[0]]
        most, count = Counter(first).most_common(1)[0]
        self.name, self.tensors, self.of = names[odd[0]], len(odd), len(names)
        self.majority = 2 * count > len(first)
        self.ranks = [rank for rank, value in enumerate(first) if value != most or not self.majority]
        """Those that differ from most of them; all if there is no majority."""

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks[:8])) + (" .." if len(self.ranks) > 8 else "")
        where = f"in {self.name} ({self.tensors} of {self.of} entries differ)"
        if not self.majority:
            return f"ranks {ranks} differ {where}, and which of them is wrong cannot be told"
        who = f"rank {ranks} differs" if len(self.ranks) == 1 else f"ranks {ranks} differ"
        return f"{who} from the rest {where}"


def _place_of(name: str) -> tuple[bool, bool, str]:
    """Weights first, then what is made of them."""
    return name.startswith("average of "), name.startswith("optimizer of "), name


def compare(fingerprints: Mapping[str, Tensor]) -> Difference | None:
    """None if every fingerprint (int64 [], the same names everywhere) is the same on all processes. All call
    it, and all get the same answer: one all-reduce, and where something differs one gather."""
    names = sorted(fingerprints, key=_place_of)  # a loaded optimizer has another order on every process
    own = torch.stack([fingerprints[name].cpu() for name in names])  # sync point
    highest, lowest = distributed.all_reduce_max(torch.stack([own, ~own])).unbind(0)  # ~ turns the order
    if highest.equal(~lowest):
        return None
    return Difference(names, distributed.stack(own).tolist())
