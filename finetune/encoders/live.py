"""Where heads get features of rows from: tables of frozen features, or encoders at work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from ...pretrain import distributed
from ...pretrain.model import Encoders
from ..config import ENCODED
from ..fusion.pooling import mean_pool
from ..tables.cells import Picture, PictureReader
from ..tables.manifest import Rows
from .encoding import read_pixels
from .features import FeatureRows, extract

__all__ = ["LiveRows", "Part", "Source", "encode_rows", "encode_split"]


class Source(Protocol):
    """Where heads get features of rows from: tables (``FeatureRows``) or encoders at work (``LiveRows``)."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features and presence of some rows."""
        ...


@dataclass(frozen=True)
class Part:
    """Rows with their targets, as ``Task`` describes them, and where rows do not count the same their weights
    in the training loss (see ``losses.loss_weights``)."""

    rows: Source
    targets: Tensor
    weights: Tensor | None = None


@dataclass(frozen=True)
class LiveRows:
    """Rows whose features are computed when they are asked for, with gradients where those are enabled.

    ``columns``: features of the same rows' modalities that no encoder reads. ``read``: the modalities whose
    features are wanted (None: all); of others only the presence is told. ``together``: all processes ask for
    the same rows at the same time; each encodes its share of them, and all get all features.
    """

    model: Encoders
    rows: Rows
    max_pixels: int
    reader: PictureReader
    columns: FeatureRows | None = None
    read: tuple[str, ...] | None = None
    groups: Tensor | None = None
    """Int64 [n] as in ``FeatureRows``."""
    together: bool = False

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of those that the encoders read."""
        return tuple(k for k in ENCODED if k in self.rows.cells)

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings of the rows; zeros where a modality is missing."""
        assert not tokens, "token features are not computed with gradients"
        numbers = rows.tolist()
        features: dict[str, Tensor] = {} if self.groups is None else {"group": self.groups[rows]}
        present: dict[str, Tensor] = {}
        for k in self.modalities:
            items: list[Any] = [self.rows.cells[k][i] for i in numbers]
            there = torch.tensor([item is not None for item in items], dtype=torch.bool)
            present[k] = there.to(self.model.device)
            if self.read is not None and k not in self.read:
                continue
            features |= self._images(items) if k == "image" else {k: self._texts(items, there)}
        if self.columns is not None:
            more = self.columns.batch(rows)
            features, present = features | more[0], present | more[1]
        return features, present

    def _texts(self, items: list[str | None], there: Tensor) -> Tensor:
        out = torch.zeros(len(items), self.model.widths["text"], device=self.model.device)
        given = [item for item in items if item is not None]
        if not given:
            return out

        def encode(texts: Sequence[str]) -> Tensor:
            return self.model.model.encode_text(*self.model.tokenizer.pack(texts))

        encoded = encode_split(encode, given, out[:0], self.together)
        return out.index_put((there.nonzero()[:, 0].to(out.device),), encoded)

    def _images(self, items: list[tuple[Picture, ...] | None]) -> dict[str, Tensor]:
        """``image`` [b, D], and for heads that pool every picture's own as ``FeatureRows.batch`` gives it."""
        pool = self.rows.declared["image"].pool
        counts = [len(item or ()) for item in items]
        mask = torch.arange(max(counts, default=1) or 1) < torch.tensor(counts)[:, None]
        mask = mask.to(self.model.device)
        out = torch.zeros(*mask.shape, self.model.widths["image"], device=self.model.device)
        if given := list(chain.from_iterable(item or () for item in items)):
            encoded = encode_split(self._pictures, given, out[:0, 0], self.together)
            out = out.index_put(mask.nonzero(as_tuple=True), encoded)
        if pool is None:
            return {"image": out[:, 0]}
        several = {"image_set": out, "image_set_mask": mask} if pool == "attention" else {}
        return {"image": mean_pool(out, mask)} | several

    def _pictures(self, pictures: Sequence[Picture]) -> Tensor:
        pixels, broken = read_pixels(self.model, pictures, self.reader, self.max_pixels)
        assert not any(broken), f"a picture changed while it was trained on: {broken}"
        return self.model.model.encode_image(pixels)


def encode_split(
    encode: Callable[[Sequence[Any]], Tensor], items: Sequence[Any], empty: Tensor, together: bool
) -> Tensor:
    """``encode(items)`` [n, D]; ``empty`` is [0, D]. ``together``: process r of W encodes items r n / W to
    (r + 1) n / W and gets the gradient of those; all get all rows (see ``distributed.rows_of_all``)."""
    if not together:
        return encode(items)
    rank, world = distributed.rank(), distributed.world_size()
    own = items[rank * len(items) // world : (rank + 1) * len(items) // world]
    return distributed.rows_of_all(encode(own) if len(own) else empty)


def encode_rows(rows: LiveRows, modalities: tuple[str, ...]) -> FeatureRows:
    """Features of these modalities of live rows as their encoders are now, without gradients, each distinct
    item encoded once."""
    some = replace(rows.rows, declared={k: rows.rows.declared[k] for k in modalities}, groups=[])
    features, _ = extract(rows.model, some, max_pixels=rows.max_pixels, together=rows.together)
    return replace(features, groups=rows.groups)
