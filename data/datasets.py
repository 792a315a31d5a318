"""The data sets of a run, opened: shards, what a filter leaves of them, and the order over all."""

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from .captions import CaptionConfig
from .config import DataConfig
from .filters import Selection, select
from .mixture import Mixture
from .order import AnyOrder, Order
from .shards import ShardSet, open_shards

__all__ = ["Source", "describe", "fingerprint", "make_order", "open_sources", "resumed_order"]

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Source:
    """One data set. Pickles, so that workers can open it again."""

    label: str
    shards: ShardSet
    selection: Selection | None
    weight: float | None
    captions: CaptionConfig

    @property
    def shard_sizes(self) -> Ints:
        """Samples per shard that take part, int64 [shards]."""
        return self.shards.shard_sizes if self.selection is None else self.selection.shard_sizes

    def sample_ids(self, ordinals: Ints) -> Ints:
        """Ids in the index, int64 [n], of ordinals among the samples that take part."""
        return ordinals if self.selection is None else self.selection.sample_ids(ordinals)


def open_sources(config: DataConfig, *, check_files: bool = True) -> list[Source]:
    """Open all sources and work out their filters. Raises UserError, as ``open_shards`` and ``select`` do."""
    sources: list[Source] = []
    for source in config.sources:
        shards = open_shards(source.data, check_files=check_files, **config.storage)
        selection = select(shards, source)
        captions = source.captions or config.captions
        sources.append(Source(source.label, shards, selection, source.weight, captions))
    return sources


def fingerprint(sources: Sequence[Source]) -> str:
    """Hash of what is trained on: of one whole data set its own, else of all and what is chosen of them."""
    if len(sources) == 1 and sources[0].selection is None:
        return sources[0].shards.fingerprint
    parts = [
        f"{source.shards.fingerprint} {'' if source.selection is None else source.selection.digest}"
        for source in sources
    ]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def make_order(
    config: DataConfig, sources: Sequence[Source], *, seed: int, global_batch_size: int
) -> AnyOrder:
    """The order that a config asks for. Raises UserError if it does not fit the data."""
    settings: dict[str, Any] = {"seed": seed, "global_batch_size": global_batch_size}
    settings |= {"lanes": config.lanes, "window": config.window}
    if len(sources) == 1 and config.epoch_samples is None:
        return Order(sources[0].shard_sizes, **settings)
    weights = [source.weight for source in sources if source.weight is not None]
    return Mixture(
        [source.shard_sizes for source in sources],
        weights=weights or None,
        epoch_samples=config.epoch_samples,
        **settings,
    )


def resumed_order(order: AnyOrder, sources: Sequence[Source], state: Mapping[str, Any]) -> AnyOrder:
    """The order of a stored state. Raises UserError if data or settings are not the state's."""
    mine = order.state() | {"fingerprint": fingerprint(sources)}
    told = {
        "fingerprint": "data.train: the data is not that of the checkpoint; give the same shards and filters",
        "seed": "seed: {0} is not the checkpoint's {1}; set it back",
        "global_batch_size": "global_batch_size: {0} is not the checkpoint's {1}; set it back",
        "quota": "data.train: the weights of the sources are not the checkpoint's; set them back",
        "epoch_samples": "data.epoch_samples: {0} is not the checkpoint's {1}; set it back",
    }
    for key, message in told.items():
        if key == "quota" and mine.get("lanes") != state.get("lanes"):
            continue  # blocks of another size; the weights are compared once lanes are the state's
        if state.get(key) != mine.get(key):
            told_now = message.format(mine.get(key), state.get(key))
            raise UserError(f"{told_now}, or start a new run from its weights")
    settings = {key: state[key] for key in ("seed", "global_batch_size", "lanes", "window")}
    if isinstance(order, Order):
        return Order(sources[0].shard_sizes, **settings)
    sizes = [source.shard_sizes for source in sources]
    return Mixture(sizes, state["quota"], epoch_samples=state["epoch_samples"], **settings)


def describe(sources: Sequence[Source], order: AnyOrder) -> list[str]:
    """What is trained on, in lines for people: samples, shares, and what an epoch leaves out."""
    lines: list[str] = []
    weights = order.effective_weights if isinstance(order, Mixture) else [1.0]
    for source, weight in zip(sources, weights, strict=True):
        kept, total = int(source.shard_sizes.sum()), len(source.shards)
        some = (
            f"{kept:,} of {total:,} samples pass the filter"
            if source.selection is not None
            else f"{total:,} samples"
        )
        share = f", {weight:.2%} of every epoch" if isinstance(order, Mixture) else ""
        lines.append(f"{source.label}: {some}{share}")
    if isinstance(order, Mixture):
        passes = ", ".join(
            f"{source.label} {weight * order.epoch_samples / source.shard_sizes.sum():.3g} times"
            for source, weight in zip(sources, weights, strict=True)
        )
        lines.append(f"an epoch of {order.epoch_samples:,} samples goes through {passes}")
    elif rest := int(sources[0].shard_sizes.sum()) - order.steps_per_epoch * order.global_batch_size:
        lines.append(f"each epoch leaves out {rest:,} samples, fewer than a global batch, others each time")
    return lines
