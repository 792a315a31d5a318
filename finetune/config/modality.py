"""The config of a labelled table's modalities: which columns they stand in, and of what kind they are."""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from ...configs.load import StrictModel
from .head import OPTIONS

__all__ = ["ENCODED", "ModalityConfig", "Pool", "check_names"]

ENCODED = ("image", "text")
"""Modalities that the checkpoint's towers read."""
Pool = Literal["mean", "attention"]
TAKEN = ("group", "token_ids", "all", "both", "prediction", "explained")
"""What means something else beside modalities: in features, in results and in answers."""


class ModalityConfig(StrictModel):
    """One modality of the table, of one kind: ``column`` holds pictures or texts for the checkpoint's towers,
    ``numeric`` and ``categorical`` are tabular columns, ``embedding`` holds vectors that were made before."""

    column: str | None = None
    """image and text: the column of pictures or texts."""
    pool: Pool | None = None
    """image: a cell may hold several pictures, or frames of a video, of which one vector is made: the mean of
    their embeddings, brought back to length 1, or a mean by weights that each head learns (attention, Ilse et
    al. 2018, arXiv 1802.04712). Null: one picture per cell."""
    separator: str | None = Field(default=None, min_length=1)
    """image: what stands between several paths in a text cell; lists (Parquet, JSONL) need none."""
    numeric: tuple[str, ...] = ()
    """Columns of numbers, as the table has them."""
    categorical: tuple[str, ...] = ()
    """Columns of categories."""
    embedding: str | None = None
    """Column of lists of numbers (Parquet, JSONL), all of one length."""

    @property
    def tabular(self) -> bool:
        """Whether it is made of tabular columns."""
        return bool(self.numeric or self.categorical)

    @property
    def columns(self) -> dict[str, tuple[str, ...]]:
        """Its columns, under the keys that name them."""
        named = {"column": (self.column,), "numeric": self.numeric, "categorical": self.categorical}
        named["embedding"] = (self.embedding,)
        return {key: names for key in named if (names := tuple(n for n in named[key] if n is not None))}

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = (self.column is not None) + self.tabular + (self.embedding is not None)
        if kinds != 1:
            raise ValueError(
                "a modality is one of {column: C} (image, text), {numeric: [..], categorical: [..]} and "
                "{embedding: C}; give one of them"
            )
        for key in ("numeric", "categorical"):
            names = getattr(self, key)
            if repeated := [name for name in names if names.count(name) > 1]:
                raise ValueError(f"{key}: column '{repeated[0]}' stands twice; remove one")
        if self.separator is not None and self.pool is None:
            raise ValueError("separator: several pictures need a pool; set pool: mean or attention")
        return self


def check_names(modalities: Mapping[str, ModalityConfig]) -> None:
    """Raise ValueError for a name that does not fit the kind of its modality, or that is taken."""
    if not modalities:
        raise ValueError("name at least one modality, for instance {image: {column: image}}")
    for name, declared in modalities.items():
        if name in ENCODED:
            if declared.column is None:
                raise ValueError(f"{name}: it is read by the checkpoint's tower; give {{column: C}}")
            if name != "image" and declared.pool is not None:
                raise ValueError(f"{name}: pool is for pictures; remove it")
            continue
        if declared.column is not None:
            raise ValueError(
                f"{name}: a column for the checkpoint's towers is called image or text; rename it, or give "
                "numeric, categorical or embedding"
            )
        _check_free(name)


def _check_free(name: str) -> None:
    """A free name becomes a head, a folder, a column of answers and a part of modules."""
    from torch import nn  # here, as configs of pictures and texts alone do without torch

    if not (name.isascii() and name.isidentifier()) or name.startswith("_"):
        raise ValueError(f"'{name}' cannot name a modality: use letters, digits and _, a letter first")
    parts = [f"{known}_" for known in ENCODED]
    taken = name in (*OPTIONS, *TAKEN) or name.startswith(tuple(parts)) or name.endswith("_present")
    if taken or hasattr(nn.ModuleDict, name) or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"'{name}' cannot name a modality, as it means something else; call it otherwise")
