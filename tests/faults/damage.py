"""Damage done at random, the same for one seed, and what reading may make of it."""

import random
from collections.abc import Callable
from pathlib import Path

from diptych.configs.errors import UserError
from diptych.data.shards import DamagedSample, RawSample, open_shards

from ..data.samples import Sample

Damage = Callable[[bytearray, random.Random], tuple[int, int]]
"""Changes the bytes and gives the first and the last changed place."""


def flipped(data: bytearray, rng: random.Random) -> tuple[int, int]:
    at = rng.randrange(len(data))
    data[at] ^= 1 << rng.randrange(8)
    return at, at


def scribbled(data: bytearray, rng: random.Random) -> tuple[int, int]:
    at = rng.randrange(len(data))
    end = min(len(data), at + rng.randrange(1, 300))
    data[at:end] = rng.randbytes(end - at)
    return at, end - 1


def zeroed(data: bytearray, rng: random.Random) -> tuple[int, int]:
    at = rng.randrange(len(data))
    end = min(len(data), at + rng.randrange(1, 2000))
    data[at:end] = bytes(end - at)
    return at, end - 1


def cut(data: bytearray, rng: random.Random) -> tuple[int, int]:
    at, end = rng.randrange(len(data)), len(data)
    del data[at:]
    return at, end - 1


def cut_at_a_block(data: bytearray, rng: random.Random) -> tuple[int, int]:
    at, end = 512 * rng.randrange(max(1, len(data) // 512)), len(data)
    del data[at:]
    return at, end - 1


def lost(data: bytearray, rng: random.Random) -> tuple[int, int]:
    """A piece is missing, in half of the cases whole blocks, so that headers stay where readers look."""
    at, end = rng.randrange(len(data)), len(data)
    size = rng.randrange(1, 3000)
    if rng.random() < 0.5:
        at, size = at - at % 512, size - size % 512 + 512
    del data[at : at + size]
    return at, end - 1


def doubled(data: bytearray, rng: random.Random) -> tuple[int, int]:
    at, end = rng.randrange(len(data)), len(data)
    size = rng.randrange(1, 3000)
    if rng.random() < 0.5:
        at, size = at - at % 512, size - size % 512 + 512
    data[at:at] = data[at : at + size]
    return at, end


SAME_LENGTH: tuple[Damage, ...] = (flipped, scribbled, zeroed)
ANY: tuple[Damage, ...] = (*SAME_LENGTH, cut, cut_at_a_block, lost, doubled)


def read_all(folder: Path, names: set[str]) -> dict[str, RawSample | DamagedSample] | UserError:
    """Every sample by its key; the refusal where the set cannot be opened or read. Anything else that is
    raised is a fault. ``names``: the files that may be named."""
    out: dict[str, RawSample | DamagedSample] = {}
    try:
        shards = open_shards(folder)
        for sample_id in range(len(shards)):
            try:
                raw = shards.read(sample_id)
                assert raw.sample_id == sample_id
                out[raw.key] = raw
            except DamagedSample as damaged:
                check_names(str(damaged), names)
                out[damaged.key] = damaged
    except UserError as error:
        check_names(str(error), names)
        return error
    return out


def check_names(sentence: str, names: set[str]) -> None:
    """A refusal is one line that names a file."""
    assert any(name in sentence for name in names), sentence
    assert "\n" not in sentence


def is_true(raw: RawSample, sample: Sample) -> bool:
    """Whether it is, byte for byte, what was written."""
    return (raw.key, raw.image, raw.extension, raw.caption, raw.meta) == sample
