"""The data sets of a run, opened: shards, what a filter leaves of them, and the order over all."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from .captions import CaptionConfig, texts_under
from .config import DataConfig
from .filters import Selection, select
from .mixture import Mixture
from .order import AnyOrder, Order
from .reading import read_many_retrying
from .shards import RawSample, ShardSet, open_shards

__all__ = [
    "Source",
    "check_keys",
    "describe",
    "fingerprint",
    "make_order",
    "open_sources",
    "resumed_order",
]

Ints = NDArray[np.int64]

LOOKED_AT = 200  # samples whose JSON is looked at for the keys of captions


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


def check_keys(source: Source, weight_key: str | None) -> list[str]:
    """What to say of JSON keys that captions are to be drawn from, or weights read from, and none of some
    samples has.

    A key of ``fields`` or a ``weight_key`` that is misspelt would mean another training than the one that was
    asked for: raises UserError. Of a remote set the first samples are looked at, which may be of one kind,
    and ``names`` and ``tags`` are taken where there are any: of these a line is returned.
    """
    if not source.captions.keys() and weight_key is None:
        return []
    metas = _some_metas(source)
    lines: list[str] = []
    for key in source.captions.keys() if metas else ():
        if any(texts_under(meta, key) for meta in metas):
            continue
        there = {name for meta in metas for name in meta if texts_under(meta, name)}
        told = _missing(
            source, len(metas), f"has a text under '{key}' of its JSON; there is text under", there
        )
        if key in source.captions.fields and not source.shards.is_remote:
            raise UserError(f"data.captions: {told}: name one of these or take the weight away")
        lines.append(told)
    if weight_key is not None and metas and not any(weight_key in meta for meta in metas):
        there = {name for meta in metas for name in meta}
        told = _missing(source, len(metas), f"has '{weight_key}' in its JSON; there is", there)
        if not source.shards.is_remote:
            raise UserError(f"data.weight_key: {told}: name one of these or take the key away")
        lines.append(f"all weigh alike: {told}")
    return lines


def _missing(source: Source, looked_at: int, what: str, there: set[str]) -> str:
    names = ", ".join(sorted(there)[:12]) or "no key"
    return f"none of {looked_at} samples of {source.label} {what} {names}"


def _some_metas(source: Source) -> list[dict[str, Any]]:
    """The JSON of some samples: spread over a local set, the first ones of a remote one."""
    shards, total = source.shards, int(source.shard_sizes.sum())
    among = min(total, LOOKED_AT) if shards.is_remote else total
    ordinals = np.unique(np.linspace(0, among - 1, LOOKED_AT).round().astype(np.int64))
    raws, _ = read_many_retrying(shards, source.sample_ids(ordinals).tolist())
    return [raw.meta for raw in raws if isinstance(raw, RawSample)]


def fingerprint(sources: Sequence[Source]) -> str:
    """Hash of what is trained on: of one whole data set its own, else of all and what is chosen of them."""
    if len(sources) == 1 and sources[0].selection is None:
        return sources[0].shards.fingerprint
    return hashlib.sha256("\n".join(" ".join(part) for part in parts(sources)).encode()).hexdigest()


def parts(sources: Sequence[Source]) -> list[list[str]]:
    """Of each source the hashes of its shards and of its filter, which is empty where there is none: what the
    fingerprint is made of, where it is not one set's own."""
    return [
        [source.shards.fingerprint, "" if source.selection is None else source.selection.digest]
        for source in sources
    ]


def _what_differs(sources: Sequence[Source], stored: Sequence[Sequence[str]] | None) -> str:
    """In words, what of the data is not a stored state's; ``stored``: its ``parts``, if it has them."""
    mine = parts(sources)
    if stored is None or len(stored) != len(mine):
        return "the data is not that of the checkpoint; give the same shards and filters"
    which = next(i for i, (a, b) in enumerate(zip(mine, stored, strict=True)) if a != list(b))
    label = sources[which].label
    if mine[which][0] != stored[which][0]:
        return f"the shards of {label} are not those of the checkpoint; give the same"
    return f"the filter of {label} does not choose what the checkpoint's chose; give the same one"


def make_order(
    config: DataConfig, sources: Sequence[Source], *, seed: int, global_batch_size: int
) -> AnyOrder:
    """The order that a config asks for. Raises UserError if it does not fit the data."""
    settings: dict[str, Any] = {"seed": seed, "global_batch_size": global_batch_size}
    settings |= {"lanes": config.lanes, "window": config.window}
    if len(sources) == 1 and config.epoch_samples is None:
        return Order(sources[0].shard_sizes, **settings)
    return Mixture(
        [source.shard_sizes for source in sources],
        weights=_weights(sources),
        epoch_samples=config.epoch_samples,
        **settings,
    )


def resumed_order(order: AnyOrder, sources: Sequence[Source], state: Mapping[str, Any]) -> AnyOrder:
    """The order of a stored state. Raises UserError if data or settings are not the state's."""
    mine = order.state() | {"fingerprint": fingerprint(sources)}
    if mine["fingerprint"] != state.get("fingerprint"):
        told = f"data.train: {_what_differs(sources, state.get('parts'))}"
        _same(mine, state, "fingerprint", told)
    for key, name in (("seed", "seed"), ("global_batch_size",) * 2, ("epoch_samples", "data.epoch_samples")):
        told = f"{name}: {mine.get(key)} is not the checkpoint's {state.get(key)}; set it back"
        _same(mine, state, key, told)
    settings = {key: state[key] for key in ("seed", "global_batch_size", "lanes", "window")}
    if isinstance(order, Order):
        return Order(sources[0].shard_sizes, **settings)
    settings["epoch_samples"] = state["epoch_samples"]
    sizes = [source.shard_sizes for source in sources]
    asked = Mixture(sizes, weights=_weights(sources), **settings)  # blocks may have another size
    _same(
        asked.state(),
        state,
        "quota",
        "data.train: the weights of the sources are not the checkpoint's; set them back",
    )
    return asked


def _same(mine: Mapping[str, Any], state: Mapping[str, Any], key: str, told: str) -> None:
    if mine.get(key) != state.get(key):
        raise UserError(f"{told}, or start a new run from its weights")


def _weights(sources: Sequence[Source]) -> list[float] | None:
    """All weights, None where there are none."""
    return [source.weight for source in sources if source.weight is not None] or None


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
    epoch = order.steps_per_epoch * order.global_batch_size
    if isinstance(order, Mixture):
        passes = ", ".join(
            f"{source.label} {weight * epoch / source.shard_sizes.sum():.3g} times"
            for source, weight in zip(sources, weights, strict=True)
        )
        lines.append(f"an epoch of {epoch:,} samples goes through {passes}")
    elif rest := int(sources[0].shard_sizes.sum()) - epoch:
        lines.append(f"each epoch leaves out {rest:,} samples, fewer than a global batch, others each time")
    if limit := _narrow(sources, order):
        lines.append(limit)
    return lines


def _narrow(sources: Sequence[Source], order: AnyOrder) -> str | None:
    """A warning if a small source keeps the lanes of a large mixture few."""
    if not isinstance(order, Mixture) or order.lanes == order.wanted_lanes:
        return None
    least = min(sources, key=lambda source: int(source.shard_sizes.sum()))
    return (
        f"{order.lanes} lanes instead of {order.wanted_lanes}, since {least.label} has only "
        f"{int(least.shard_sizes.sum()):,} samples: batches come from fewer places in the large sets; leave "
        "it out, or join it to another set"
    )
