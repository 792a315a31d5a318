"""Where heads get features of rows from: tables of frozen features, or encoders at work."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..pretrain.model import LoadedModel
from .cells import Picture, PictureReader
from .encoding import read_pixels
from .features import FeatureRows, extract
from .manifest import Rows

__all__ = ["LiveRows", "Part", "Source", "encode_rows"]


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
    """

    model: LoadedModel
    images: Sequence[Picture | None]
    texts: Sequence[str | None]
    modalities: tuple[str, ...]
    max_pixels: int
    reader: PictureReader
    read: tuple[str, ...] | None = None
    groups: Tensor | None = None
    """Int64 [n] as in ``FeatureRows``."""

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings of the rows; zeros where a modality is missing."""
        assert not tokens, "token features are not computed with gradients"
        numbers, root = rows.tolist(), self.model.model
        features: dict[str, Tensor] = {} if self.groups is None else {"group": self.groups[rows]}
        present: dict[str, Tensor] = {}
        for k in self.modalities:
            items: Sequence[Any] = [(self.images if k == "image" else self.texts)[i] for i in numbers]
            there = torch.tensor([item is not None for item in items], dtype=torch.bool)
            present[k] = there.to(self.model.device)
            if self.read is not None and k not in self.read:
                continue
            out = torch.zeros(len(items), self.model.embed_dim, device=self.model.device)
            given = [item for item in items if item is not None]
            if given and k == "image":
                pixels, broken = read_pixels(self.model, given, self.reader, self.max_pixels)
                assert not any(broken), f"a picture changed while it was trained on: {broken}"
                out = out.index_put((there.nonzero()[:, 0].to(out.device),), root.encode_image(pixels))
            elif given:
                encoded = root.encode_text(*self.model.tokenizer.pack(given))
                out = out.index_put((there.nonzero()[:, 0].to(out.device),), encoded)
            features[k] = out
        return features, present


def encode_rows(rows: LiveRows, modalities: tuple[str, ...]) -> FeatureRows:
    """Features of these modalities of live rows as their encoders are now, without gradients, each distinct
    item encoded once."""
    items = Rows("", [""] * len(rows), modalities, list(rows.images), list(rows.texts), [], [], [])
    features, _ = extract(rows.model, items, max_pixels=rows.max_pixels)
    return replace(features, groups=rows.groups)
