"""Samples read with patience: what may pass is tried again, and raises in the end; damage is told apart."""

import copy
import logging
import time
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from ..configs.errors import UserError
from .decode import DecodeError, decode_image
from .shards import DamagedSample, RawSample, ShardSet

__all__ = ["decode_sample", "read_many_retrying", "read_retrying"]

log = logging.getLogger(__name__)

RETRIES = 5
FIRST_WAIT_S = 0.2  # doubled at each retry: 6 seconds in all


def decode_sample(raw: RawSample, *, max_pixels: int) -> Tensor:
    """Pixels uint8 [3, H, W] of a sample; see ``decode_image``. Raises DamagedSample."""
    try:
        return decode_image(raw.image, max_pixels=max_pixels)
    except DecodeError as error:
        raise DamagedSample(raw.shard, raw.key, error.reason) from error


def read_many_retrying(
    shards: ShardSet, sample_ids: Sequence[int]
) -> tuple[list[RawSample | DamagedSample], ShardSet]:
    """Read samples, together if that goes well, else each with ``read_retrying``.

    Returns the set that served too, to be used from then on. Raises UserError as ``read_retrying`` does.
    """
    try:
        return shards.read_many(sample_ids), shards
    except OSError:
        pass  # it will be raised, and told, again
    out: list[RawSample | DamagedSample] = []
    for sample_id in sample_ids:
        try:
            raw, shards = read_retrying(shards, sample_id)
            out.append(raw)
        except DamagedSample as error:
            out.append(error)
    return out, shards


def read_retrying(shards: ShardSet, sample_id: int) -> tuple[RawSample, ShardSet]:
    """Read a sample, again and with fresh file handles where the file system or the network fails.

    Returns the set that served too, to be used from then on. Raises DamagedSample, and UserError that names
    the file after the last try.
    """
    wait = FIRST_WAIT_S
    for attempt in range(RETRIES + 1):
        try:
            return shards.read(sample_id), shards
        except OSError as error:
            shard = int(np.searchsorted(np.cumsum(shards.shard_sizes), sample_id, side="right"))
            file = f"{shards.folder}/{shards.shard_names[shard]}"
            reason = error.strerror or str(error)
            if attempt == RETRIES:
                raise UserError(
                    f"{file} cannot be read after {RETRIES + 1} tries: {reason}; check the file system"
                ) from error
            log.warning("%s: %s; trying again in %.1f s", file, reason, wait)
            time.sleep(wait)
            wait *= 2
            shards = copy.copy(shards)
    raise AssertionError("unreachable")
