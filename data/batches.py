"""From (epoch, step) to one rank's batch: read, decode, augment, tokenise. What a worker process runs.

A damaged sample keeps its row: a blank image, an empty caption, ``valid`` False, and an entry in ``bad``. So
positions never shift, and every rank has the rows it is meant to have.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from ..configs.errors import UserError
from .augment import AugmentConfig, finish
from .captions import CaptionConfig, choose_text, word
from .datasets import Source
from .decode import Bytes, DecodeError, decode_crop
from .order import AnyOrder, rank_slice
from .permutation import SampleRandom
from .reading import read_many_retrying
from .shards import DamagedSample, RawSample
from .stages import Shape, Shapes
from .text import Tokenizer, caption_hash

__all__ = ["Batch", "BatchMaker", "Failure", "Recipe"]

Batch = dict[str, Any]

# Small images cost a quarter less when some are decoded before any is finished: the code of each half stays
# in the caches. Their crops are in memory at once.
TOGETHER = 16
REQUESTS = 128  # samples fetched together from a remote, where each takes a round trip
_AUGMENT, _CAPTION = 0, 1  # what a sample's random numbers are for


@dataclass(frozen=True)
class Recipe:
    """What a batch is made by, beside the data and its order."""

    shapes: Shapes
    augment: AugmentConfig
    captions: CaptionConfig
    max_pixels: int
    on_bad: Literal["mask", "raise"]
    weight_key: str | None
    rank: int
    world_size: int


@dataclass(frozen=True)
class Failure:
    """A UserError on its way out of a worker: torch would wrap a raised one in the worker's traceback."""

    message: str


@dataclass(frozen=True)
class _Row:
    """A row of a batch: which sample of which source, for the how-manieth time, and its bytes."""

    source: int
    epoch: int
    sample_id: int
    raw: RawSample | DamagedSample


@dataclass
class _Made:
    """What becomes of the rows, in their order."""

    shape: Shape
    image: Bytes
    texts: list[str] = field(default_factory=list[str])
    captions: list[str] = field(default_factory=list[str])
    draws: list[float] = field(default_factory=list[float])
    weights: list[float] = field(default_factory=list[float])
    bad: dict[int, DamagedSample] = field(default_factory=dict[int, DamagedSample])

    def leave_out(self, row: int, damaged: DamagedSample) -> None:
        """A row of nothing."""
        self.image[row] = 255
        self.bad[row] = damaged
        self.texts.append("")
        self.captions.append("")
        self.draws.append(0.0)
        self.weights.append(0.0)


class BatchMaker(Dataset[Any]):
    """A map from (epoch, step) to this rank's batch. Pickles, so that any start method of workers serves."""

    def __init__(
        self, sources: Sequence[Source], order: AnyOrder, tokenizer: Tokenizer, recipe: Recipe, seed: int
    ) -> None:
        self.sources = list(sources)
        self.order = order
        self.recipe = recipe
        lengths = {shape.text_len for shape in recipe.shapes.all()}
        self._tokenizers = {length: tokenizer.shortened(length) for length in lengths}
        self._random = SampleRandom(seed)

    def __getitem__(self, index: tuple[int, int]) -> Batch | Failure:
        try:
            return self.batch(*index)
        except UserError as error:
            return Failure(str(error))

    def batch(self, epoch: int, step: int) -> Batch:
        """One local batch of b rows; see ``Stream`` for its entries. Raises UserError."""
        recipe = self.recipe
        rows = rank_slice(recipe.rank, recipe.world_size, self.order.global_batch_size)
        places = self.order.places(epoch, step, rows)
        ids = np.empty_like(places.ordinal)
        for s, source in enumerate(self.sources):
            mine = places.source == s
            ids[mine] = source.sample_ids(places.ordinal[mine])
        order = self.order
        shape = recipe.shapes.at((epoch * order.steps_per_epoch + step) * order.global_batch_size)
        made = self._make(shape, places.source.tolist(), places.epoch.tolist(), ids.tolist())
        return self._batch(made, places.source, ids, epoch, step)

    def _batch(
        self, made: _Made, source: NDArray[np.int16], ids: NDArray[np.int64], epoch: int, step: int
    ) -> Batch:
        recipe = self.recipe
        tokenizer = self._tokenizers[made.shape.text_len]
        token_ids, seq_lens = tokenizer.pack(made.captions, recipe.captions.truncate, made.draws)
        valid = torch.ones(len(ids), dtype=torch.bool)
        valid[list(made.bad)] = False
        weights = {"weight": torch.tensor(made.weights)} if recipe.weight_key is not None else {}
        return weights | {
            "image": torch.from_numpy(made.image),
            "token_ids": token_ids,
            "seq_lens": seq_lens,
            "valid": valid,
            "sample_id": torch.from_numpy(ids),
            "source": torch.from_numpy(source),
            "caption_hash": torch.tensor([caption_hash(text) for text in made.texts], dtype=torch.int64),
            "epoch": epoch,
            "step": step,
            "cut_captions": tokenizer.cut,
            "bad": [
                {"shard": bad.shard, "key": bad.key, "reason": bad.reason, "epoch": epoch, "step": step}
                | {"source": int(source[row]), "sample_id": int(ids[row])}
                for row, bad in made.bad.items()
            ],
        }

    def _make(self, shape: Shape, sources: list[int], epochs: list[int], ids: list[int]) -> _Made:
        """Images uint8 [b, 3, S, S] and texts of the rows."""
        side = shape.image_size
        # filled by numpy, which copies interleaved pixels into planes twice as fast as torch
        made = _Made(shape, np.empty((len(ids), 3, side, side), dtype=np.uint8))
        far = any(source.shards.is_remote for source in self.sources)
        step = REQUESTS if far else TOGETHER
        for start in range(0, len(ids), step):
            part = slice(start, start + step)
            raws = self._read(sources[part], ids[part])
            rows = [_Row(*row) for row in zip(sources[part], epochs[part], ids[part], raws, strict=True)]
            for first in range(0, len(rows), TOGETHER):
                self._finish(rows[first : first + TOGETHER], start + first, made)
        return made

    def _read(self, sources: list[int], ids: list[int]) -> list[RawSample | DamagedSample]:
        out: list[Any] = [None] * len(ids)
        for s in dict.fromkeys(sources):
            rows = [row for row, source in enumerate(sources) if source == s]
            own = self.sources[s]
            raws, shards = read_many_retrying(own.shards, [ids[row] for row in rows])
            if shards is not own.shards:
                self.sources[s] = replace(own, shards=shards)
            for row, raw in zip(rows, raws, strict=True):
                out[row] = raw
        return out

    def _finish(self, rows: list[_Row], start: int, made: _Made) -> None:
        """Decode and augment a few rows into their places from ``start`` on, and word their captions."""
        recipe = self.recipe
        crops = [self._crop(row, made.shape.image_size) for row in rows]
        for number, (row, crop) in enumerate(zip(rows, crops, strict=True), start):
            weight = None if isinstance(crop, DamagedSample) else self._weight(row.raw)
            bad = crop if isinstance(crop, DamagedSample) else weight
            if isinstance(bad, DamagedSample):
                if recipe.on_bad == "raise":
                    raise UserError(f"{bad}; set data.on_bad: mask to go on without it") from bad
                made.leave_out(number, bad)
                continue
            assert isinstance(row.raw, RawSample)
            assert not isinstance(crop, DamagedSample)
            assert isinstance(weight, float)
            made.weights.append(weight)
            made.image[number] = finish(crop[0], made.shape.image_size, recipe.augment, crop[1]).numpy()
            rng = self._random.at(row.epoch, row.sample_id, _CAPTION, row.source)
            config = self.sources[row.source].captions if self.sources else recipe.captions
            text = choose_text(config, row.raw.caption, row.raw.meta, rng)
            made.texts.append(text)
            made.captions.append(word(config, text, rng))
            made.draws.append(rng.random() if recipe.captions.truncate == "random" else 0.0)

    def _weight(self, raw: RawSample | DamagedSample) -> float | DamagedSample:
        """What the sample counts in the loss: a number of its JSON, 1 where there is none."""
        key = self.recipe.weight_key
        assert isinstance(raw, RawSample)
        if key is None or (value := raw.meta.get(key)) is None:
            return 1.0
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            return DamagedSample(raw.shard, raw.key, f"its {key} is {str(value)[:40]!r}, not a weight")
        return float(value)

    def _crop(self, row: _Row, image_size: int) -> tuple[Bytes, list[float]] | DamagedSample:
        if isinstance(row.raw, DamagedSample):
            return row.raw
        recipe = self.recipe
        rng = self._random.at(row.epoch, row.sample_id, _AUGMENT, row.source)
        try:
            return decode_crop(row.raw.image, image_size, recipe.augment, rng, max_pixels=recipe.max_pixels)
        except DecodeError as error:
            return DamagedSample(row.raw.shard, row.raw.key, error.reason)
