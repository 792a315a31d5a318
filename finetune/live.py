"""Where heads get features of rows from: tables of frozen features, or encoders at work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..pretrain import distributed
from ..pretrain.model import LoadedModel
from .cells import Picture, PictureReader
from .encoding import read_pixels
from .features import FeatureRows, extract
from .manifest import Rows

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

    ``read``: the modalities whose features are wanted (None: all); of others only the presence is told.
    ``together``: all processes ask for the same rows at the same time; each encodes its share of them, and
    all get all features.
    """

    model: LoadedModel
    images: Sequence[Picture | None]
    texts: Sequence[str | None]
    modalities: tuple[str, ...]
    max_pixels: int
    reader: PictureReader
    read: tuple[str, ...] | None = None
    together: bool = False

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings of the rows; zeros where a modality is missing."""
        assert not tokens, "token features are not computed with gradients"
        numbers = rows.tolist()
        features: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        for k in self.modalities:
            items: Sequence[Any] = [(self.images if k == "image" else self.texts)[i] for i in numbers]
            there = torch.tensor([item is not None for item in items], dtype=torch.bool)
            present[k] = there.to(self.model.device)
            if self.read is not None and k not in self.read:
                continue
            out = torch.zeros(len(items), self.model.embed_dim, device=self.model.device)
            given = [item for item in items if item is not None]
            if given:
                encode = self._pictures if k == "image" else self._texts
                encoded = encode_split(encode, given, self.model, self.together)
                out = out.index_put((there.nonzero()[:, 0].to(out.device),), encoded)
            features[k] = out
        return features, present

    def _pictures(self, pictures: Sequence[Picture]) -> Tensor:
        pixels, broken = read_pixels(self.model, pictures, self.reader, self.max_pixels)
        assert not any(broken), f"a picture changed while it was trained on: {broken}"
        return self.model.model.encode_image(pixels)

    def _texts(self, texts: Sequence[str]) -> Tensor:
        return self.model.model.encode_text(*self.model.tokenizer.pack(texts))


def encode_split(
    encode: Callable[[Sequence[Any]], Tensor], items: Sequence[Any], model: LoadedModel, together: bool
) -> Tensor:
    """``encode(items)`` [n, D]. ``together``: process r of W encodes items r n / W to (r + 1) n / W and gets
    the gradient of those; all get all rows (see ``distributed.rows_of_all``)."""
    if not together:
        return encode(items)
    rank, world = distributed.rank(), distributed.world_size()
    own = items[rank * len(items) // world : (rank + 1) * len(items) // world]
    local = encode(own) if len(own) else torch.zeros(0, model.embed_dim, device=model.device)
    return distributed.rows_of_all(local)


def encode_rows(rows: LiveRows, modalities: tuple[str, ...]) -> FeatureRows:
    """Features of these modalities of live rows as their encoders are now, without gradients, each distinct
    item encoded once."""
    items = Rows("", [""] * len(rows), modalities, list(rows.images), list(rows.texts), [], [], [])
    features, _ = extract(rows.model, items, max_pixels=rows.max_pixels, together=rows.together)
    return features
