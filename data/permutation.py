"""Keyed permutations and random numbers that need no memory: what makes the order of samples a function.

Nothing here depends on the streams of a library's generators but ``SampleRandom``, which reads Philox, a
fixed algorithm (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
"""

from typing import Any

import numpy as np
from numpy.random import Generator, Philox
from numpy.typing import NDArray

__all__ = ["SampleRandom", "fold", "hash_words", "permute"]

Words = NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MIX_1, _MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's finaliser
_ROUNDS = 8


def hash_words(*words: int) -> int:
    """A 64-bit hash of integers (each taken modulo 2^64), the same on every machine and version."""
    state = 0
    for word in words:
        state = (state + _GOLDEN) & _MASK ^ (word & _MASK)
        state = (state ^ state >> 30) * _MIX_1 & _MASK
        state = (state ^ state >> 27) * _MIX_2 & _MASK
        state ^= state >> 31
    return state


def _mix(x: Words) -> Words:
    """SplitMix64's finaliser, in place."""
    x ^= x >> np.uint64(30)
    x *= np.uint64(_MIX_1)
    x ^= x >> np.uint64(27)
    x *= np.uint64(_MIX_2)
    x ^= x >> np.uint64(31)
    return x


def fold(key: int | Words, words: Any) -> Words:
    """One 64-bit hash per element of ``words`` (integers), keyed by ``key``, which broadcasts."""
    x = np.array(words, dtype=np.uint64, ndmin=1) * np.uint64(_GOLDEN)
    return _mix(x + np.asarray(key, dtype=np.uint64))


def permute(x: Any, size: Any, key: int | Words, *, largest: int) -> NDArray[np.int64]:
    """Where a keyed permutation of ``range(size)`` sends each ``x``.

    x: integers [n]; size: integers [n] or one for all, each above its ``x``; key: uint64 [n] or one for all;
    largest: at least every size that ever occurs with these keys (a permutation is one of key, size and
    largest). A Feistel network over the next power of two, walked until it lands inside (Black and Rogaway,
    "Ciphers with arbitrary finite domains", CT-RSA 2002). Returns int64 [n].
    """
    sizes = np.asarray(size, dtype=np.uint64)
    out = np.array(x, dtype=np.uint64, ndmin=1)
    bits = max(1, (largest - 1).bit_length())
    keys = np.broadcast_to(np.asarray(key, dtype=np.uint64), out.shape)
    sizes = np.broadcast_to(sizes, out.shape)
    out = _feistel(out, keys, bits)
    outside = np.flatnonzero(out >= sizes)
    while outside.size:
        out[outside] = _feistel(out[outside], keys[outside], bits)
        outside = outside[out[outside] >= sizes[outside]]
    return out.astype(np.int64)


def _feistel(x: Words, keys: Words, bits: int) -> Words:
    """A bijection of ``range(2 ** bits)``; the halves differ by one bit where ``bits`` is odd."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << bits // 2) - 1)
    high_mask = np.uint64((1 << bits - bits // 2) - 1)
    low, high = x & low_mask, x >> low_bits
    for turn in range(_ROUNDS):
        salted = keys + np.uint64((turn + 1) * _GOLDEN & _MASK)
        if turn % 2:
            high ^= _mix(salted ^ low) & high_mask
        else:
            low ^= _mix(salted ^ high) & low_mask
    return high << low_bits | low


class SampleRandom:
    """Random numbers of one sample in one epoch, whoever asks and whenever.

    One generator is moved to the place of each sample, which takes two microseconds; making one takes eight.
    """

    def __init__(self, seed: int) -> None:
        self._bits = Philox(key=0)
        self._generator = Generator(self._bits)
        self._state: Any = self._bits.state
        self._seed = seed & _MASK

    def at(self, epoch: int, sample_id: int, purpose: int = 0, source: int = 0) -> Generator:
        """The generator at the start of a sample's own numbers; valid until the next call."""
        state = self._state
        state["state"]["key"][:] = (self._seed, epoch)
        state["state"]["counter"][:] = (0, sample_id, purpose, source)  # the first word counts the draws
        state["buffer_pos"] = 4
        state["has_uint32"] = 0
        self._bits.state = state
        return self._generator
