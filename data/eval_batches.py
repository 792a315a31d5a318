"""The evaluation loader: samples in order, unaugmented."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .decode import Interpolation, ResizeMode, eval_image
from .image_header import MAX_PIXELS
from .reading import decode_sample, read_retrying
from .shards import DamagedSample, RawSample, ShardSet

__all__ = ["EvalBatch", "eval_batches"]

log = logging.getLogger(__name__)


@dataclass
class EvalBatch:
    """Some samples as evaluation sees them: image uint8 [b, 3, S, S], captions and metas as stored, keys,
    sample_ids int64 [b]."""

    image: Tensor
    captions: list[str]
    metas: list[dict[str, Any]]
    keys: list[str]
    sample_ids: NDArray[np.int64]


def eval_batches(
    shards: ShardSet,
    *,
    image_size: int,
    batch_size: int = 256,
    sample_ids: Any = None,
    resize_mode: ResizeMode = "shortest",
    interpolation: Interpolation = "bicubic",
    fill_color: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[EvalBatch]:
    """All samples of a shard set in order, or those of ``sample_ids`` (integers [n]), for evaluation.

    Damaged samples are left out; one warning at the end names them. Raises UserError if a file cannot be
    read.
    """
    ids = np.arange(len(shards)) if sample_ids is None else np.asarray(sample_ids, dtype=np.int64)
    damaged: list[str] = []
    for start in range(0, len(ids), batch_size):
        samples: list[RawSample] = []
        images: list[Tensor] = []
        for sample_id in ids[start : start + batch_size].tolist():
            try:
                raw, shards = read_retrying(shards, sample_id)
                image = decode_sample(raw, max_pixels=max_pixels)
            except DamagedSample as error:
                damaged.append(f"{error.shard}: {error.key} ({error.reason})")
                continue
            images.append(
                eval_image(
                    image,
                    image_size,
                    resize_mode=resize_mode,
                    interpolation=interpolation,
                    fill_color=fill_color,
                )
            )
            samples.append(raw)
        if samples:
            yield EvalBatch(
                torch.stack(images),
                [raw.caption for raw in samples],
                [raw.meta for raw in samples],
                [raw.key for raw in samples],
                np.array([raw.sample_id for raw in samples], dtype=np.int64),
            )
    if damaged:
        names = ", ".join(damaged[:20]) + (", ..." if len(damaged) > 20 else "")
        log.warning("%s: %d damaged samples left out: %s", shards.folder, len(damaged), names)
