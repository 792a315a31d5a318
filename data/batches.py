"""From (epoch, step) to one rank's batch: read, decode, augment, tokenise. What a worker process runs.

A damaged sample keeps its row: a blank image, an empty caption, ``valid`` False, and an entry in ``bad``. So
positions never shift, and every rank has the rows it is meant to have.
"""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..configs.errors import UserError
from .augment import AugmentConfig, least_side, train_image
from .captions import CaptionConfig, choose_caption
from .decode import DecodeError, decode_image
from .order import Order
from .permutation import SampleRandom
from .shards import DamagedSample, RawSample, ShardSet
from .text import Tokenizer, caption_hash

__all__ = ["BatchMaker", "Failure", "Recipe", "decode_sample", "read_retrying"]

log = logging.getLogger(__name__)

Batch = dict[str, Any]
P = ParamSpec("P")
T = TypeVar("T")

RETRIES = 5
FIRST_WAIT_S = 0.2  # doubled at each retry: 6 seconds in all
TOGETHER = 16  # samples that are read, then decoded, then augmented; their full-size pixels are in memory
_AUGMENT, _CAPTION = 0, 1  # what a sample's random numbers are for


@dataclass(frozen=True)
class Recipe:
    """What a batch is made by, beside the data and its order."""

    image_size: int
    augment: AugmentConfig
    captions: CaptionConfig
    max_pixels: int
    on_bad: Literal["mask", "raise"]
    rank: int
    world_size: int


@dataclass(frozen=True)
class Failure:
    """A UserError on its way out of a worker: torch would wrap a raised one in the worker's traceback."""

    message: str


class BatchMaker(Dataset[Any]):
    """A map from (epoch, step) to this rank's batch. Pickles, so that any start method of workers serves."""

    def __init__(self, shards: ShardSet, order: Order, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self.shards = shards
        self.order = order
        self.tokenizer = tokenizer
        self.recipe = recipe
        self._random = SampleRandom(order.seed)

    def __getitem__(self, index: tuple[int, int]) -> Batch | Failure:
        try:
            return self.batch(*index)
        except UserError as error:
            return Failure(str(error))

    def batch(self, epoch: int, step: int) -> Batch:
        """One local batch of b rows; see ``Stream`` for its entries. Raises UserError."""
        recipe = self.recipe
        ids = self.order.local_batch(epoch, step, recipe.rank, recipe.world_size)
        # filled by numpy, which copies interleaved pixels into planes twice as fast as torch
        image = np.empty((len(ids), 3, recipe.image_size, recipe.image_size), dtype=np.uint8)
        valid = torch.ones(len(ids), dtype=torch.bool)
        captions: list[str] = []
        bad: list[dict[str, Any]] = []
        for start in range(0, len(ids), TOGETHER):
            few = ids[start : start + TOGETHER].tolist()
            for row, (sample_id, made) in enumerate(zip(few, self._samples(epoch, few), strict=True), start):
                if isinstance(made, DamagedSample):
                    if recipe.on_bad == "raise":
                        raise UserError(f"{made}; mend or remove it, or set data.on_bad: mask") from made
                    image[row], valid[row] = 255, False
                    place = {"epoch": epoch, "step": step, "sample_id": sample_id}
                    bad.append({"shard": made.shard, "key": made.key, "reason": made.reason} | place)
                    captions.append("")
                else:
                    image[row] = made[0].numpy()
                    captions.append(made[1])
        token_ids, seq_lens = self.tokenizer.pack(captions)
        return {
            "image": torch.from_numpy(image),
            "token_ids": token_ids,
            "seq_lens": seq_lens,
            "valid": valid,
            "sample_id": torch.from_numpy(ids),
            "source": torch.zeros(len(ids), dtype=torch.int16),
            "caption_hash": torch.tensor([caption_hash(caption) for caption in captions], dtype=torch.int64),
            "epoch": epoch,
            "step": step,
            "bad": bad,
        }

    def _samples(self, epoch: int, ids: list[int]) -> list[tuple[Tensor, str] | DamagedSample]:
        """Pixels uint8 [3, S, S] and caption of a few samples, or what is wrong with them.

        One kind of work after another, not one sample after another: code that is warm in the caches takes a
        quarter less time for small images.
        """
        recipe = self.recipe
        least = least_side(recipe.image_size, recipe.augment)
        raws = [_attempt(self._read, sample_id) for sample_id in ids]
        images = [
            raw
            if isinstance(raw, DamagedSample)
            else _attempt(decode_sample, raw, max_pixels=recipe.max_pixels, least=least)
            for raw in raws
        ]
        made: list[tuple[Tensor, str] | DamagedSample] = []
        for raw, image in zip(raws, images, strict=True):
            if isinstance(image, DamagedSample):
                made.append(image)
                continue
            assert isinstance(raw, RawSample)
            rng = self._random.at(epoch, raw.sample_id, _AUGMENT)
            pixels = train_image(image, recipe.image_size, recipe.augment, rng)
            rng = self._random.at(epoch, raw.sample_id, _CAPTION)
            made.append((pixels, choose_caption(recipe.captions, raw.caption, raw.meta, rng)))
        return made

    def _read(self, sample_id: int) -> RawSample:
        raw, self.shards = read_retrying(self.shards, sample_id)
        return raw


def _attempt(make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | DamagedSample:
    try:
        return make(*args, **kwargs)
    except DamagedSample as error:
        return error


def decode_sample(raw: RawSample, *, max_pixels: int, least: int | None = None) -> Tensor:
    """Pixels uint8 [3, H, W] of a sample; see ``decode_image``. Raises DamagedSample."""
    try:
        return decode_image(raw.image, max_pixels=max_pixels, least=least)
    except DecodeError as error:
        raise DamagedSample(raw.shard, raw.key, error.reason) from error


def read_retrying(shards: ShardSet, sample_id: int) -> tuple[RawSample, ShardSet]:
    """Read a sample, again and with fresh file handles where the file system fails.

    Returns the set that served too, to be used from then on. Raises DamagedSample, and UserError that names
    the file after the last try.
    """
    wait = FIRST_WAIT_S
    for attempt in range(RETRIES + 1):
        try:
            return shards.read(sample_id), shards
        except OSError as error:
            shard = int(np.searchsorted(np.cumsum(shards.shard_sizes), sample_id, side="right"))
            file = shards.folder / shards.shard_names[shard]
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
