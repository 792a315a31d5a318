"""Modalities that need no encoder: tabular columns and embeddings that were made before.

Tabular cells become a vector by what the training rows show, and no other rows: numbers less their mean over
their standard deviation, categories one-hot. That is scikit-learn's ``StandardScaler`` and
``OneHotEncoder(min_frequency=2, handle_unknown="infrequent_if_exist")``. A category of a single training row
counts as unknown, so that what is made of unknown ones is learned (Good 1953: what is seen once tells how
much is never seen). An empty cell of a row that has others is the column's mean, or no category, and is said
by an indicator. Elements that are the same in all training rows have no learned weight; they are left out.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Annotated, Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, TypeAdapter

from ...configs.errors import UserError
from ...configs.load import StrictModel
from ..config.modality import ModalityConfig
from ..tables.manifest import Rows
from .features import FeatureRows

__all__ = ["ColumnState", "column_features", "fit_columns", "read_states"]

LEAST_ROWS = 2
"""Training rows of a category that is told from others."""
MOST_VALUES = 1024
"""Categories of a column that are told from others, the most frequent ones."""
FARTHEST = 1e6
"""Standard deviations that a number is taken to be from the mean at most."""

Record = tuple[Any, ...]


class Number(StrictModel):
    """A column of numbers. ``scale``: the standard deviation, 0 if all training rows have one number;
    ``missing``: whether the training rows show an empty cell."""

    column: str
    mean: float
    scale: float
    missing: bool

    @property
    def width(self) -> int:
        """Elements of the vector."""
        return int(self.scale > 0) + int(self.missing)

    def encode(self, cells: Sequence[float | None]) -> NDArray[np.float32]:
        """float32 [n, width]: the standardised number, and whether it is missing."""
        x = np.array([math.nan if cell is None else cell for cell in cells], dtype=np.float64)
        parts: list[Any] = []
        if self.scale > 0:
            with np.errstate(over="ignore"):
                z = np.clip((x - self.mean) / self.scale, -FARTHEST, FARTHEST)
            parts.append(np.where(np.isnan(x), 0.0, z))
        if self.missing:
            parts.append(np.isnan(x))
        return np.stack(parts, axis=1).astype(np.float32) if parts else np.zeros((len(x), 0), np.float32)


class Category(StrictModel):
    """A column of categories. ``values``: those that are told from others, in order; ``unknown``,
    ``missing``: whether training rows show others, and empty cells."""

    column: str
    values: tuple[str, ...]
    unknown: bool
    missing: bool

    @property
    def width(self) -> int:
        """Elements of the vector: one for each outcome, none if there is only one."""
        outcomes = len(self.values) + self.unknown + self.missing
        return outcomes if outcomes > 1 else 0

    def encode(self, cells: Sequence[str | None]) -> NDArray[np.float32]:
        """float32 [n, width], one-hot; zeros for an outcome that no training row shows."""
        out = np.zeros((len(cells), self.width), dtype=np.float32)
        if self.width == 0:
            return out
        place = {value: i for i, value in enumerate(self.values)}
        unknown = len(self.values) if self.unknown else -1
        missing = self.width - 1 if self.missing else -1
        found = np.array([missing if c is None else place.get(c, unknown) for c in cells], dtype=np.int64)
        out[np.flatnonzero(found >= 0), found[found >= 0]] = 1.0
        return out


class TabularState(StrictModel):
    """How tabular cells become vectors."""

    kind: Literal["tabular"] = "tabular"
    numeric: tuple[Number, ...]
    categorical: tuple[Category, ...]

    @property
    def width(self) -> int:
        """Elements of the vector."""
        return sum(column.width for column in (*self.numeric, *self.categorical))

    def drawn(self, declared: ModalityConfig, draw: Random) -> dict[str, Any]:
        """Cells of a random row, by column: also unknown categories, and rarely an empty cell."""
        cells: dict[str, Any] = {one.column: one.mean + one.scale * draw.gauss() for one in self.numeric}
        for one in self.categorical:
            cells[one.column] = draw.choice([*one.values, None, "none of these"])
        if all(cell is None for cell in cells.values()):
            cells[self.categorical[0].column] = "none of these"
        return cells

    def encode(self, records: Sequence[Record], where: str) -> NDArray[np.float32]:
        """float32 [n, width] of the cells of rows, numbers first."""
        columns = (*self.numeric, *self.categorical)
        cells = list(zip(*records, strict=True)) or [()] * len(columns)
        parts = [column.encode(cast(Any, some)) for column, some in zip(columns, cells, strict=True)]
        return np.concatenate(parts, axis=1)


class EmbeddingState(StrictModel):
    """Vectors as they are; ``width``: their length."""

    kind: Literal["embedding"] = "embedding"
    width: int = Field(ge=1)

    def drawn(self, declared: ModalityConfig, draw: Random) -> dict[str, Any]:
        """The cell of a random row, by column."""
        return {str(declared.embedding): [draw.gauss() for _ in range(self.width)]}

    def encode(self, vectors: Sequence[NDArray[np.float32]], where: str) -> NDArray[np.float32]:
        """float32 [n, width]. UserError for vectors of another length."""
        if vectors and len(vectors[0]) != self.width:
            raise UserError(
                f"{where}: embeddings have {len(vectors[0])} numbers, and the run was trained on "
                f"{self.width}; make them by the same model"
            )
        return np.stack(vectors) if vectors else np.zeros((0, self.width), dtype=np.float32)


ColumnState = TabularState | EmbeddingState
"""What the training rows say of a modality without encoder."""
_STATES: TypeAdapter[dict[str, ColumnState]] = TypeAdapter(
    dict[str, Annotated[ColumnState, Field(discriminator="kind")]]
)


def read_states(document: Mapping[str, Any]) -> dict[str, ColumnState]:
    """States from what head.json holds of them; ValueError if they are none."""
    return _STATES.validate_json(json.dumps(document))


def fit_columns(train: Rows) -> dict[str, ColumnState]:
    """The state of every modality without encoder, from the training rows alone.

    Raises UserError for columns that say nothing because they are the same in all rows, or where no training
    row has the modality.
    """
    states: dict[str, ColumnState] = {}
    for k, declared in train.declared.items():
        if declared.column is not None:
            continue
        cells = [cell for cell in train.cells[k] if cell is not None]
        if not cells:
            raise UserError(
                f"{train.source}: no training row has {k}; fill cells or remove data.modalities.{k}"
            )
        if declared.embedding is not None:
            states[k] = EmbeddingState(width=len(cells[0]))
            continue
        columns = list(zip(*cells, strict=True))
        numbers = len(declared.numeric)
        state = TabularState(
            numeric=tuple(map(_number, declared.numeric, columns[:numbers])),
            categorical=tuple(map(_category, declared.categorical, columns[numbers:])),
        )
        if state.width == 0:
            named = ", ".join((*declared.numeric, *declared.categorical))
            raise UserError(
                f"{train.source}: the training rows tell nothing apart in {named}; remove data.modalities.{k}"
            )
        states[k] = state
    return states


def _number(column: str, cells: Sequence[float | None]) -> Number:
    known = np.array([cell for cell in cells if cell is not None], dtype=np.float64)
    missing = len(known) < len(cells)
    if len(known) == 0:
        return Number(column=column, mean=0.0, scale=0.0, missing=False)
    with np.errstate(over="ignore", invalid="ignore"):
        mean, scale = float(known.mean()), float(known.std())
    if not math.isfinite(scale):
        raise UserError(
            f"column '{column}' holds numbers too large to be standardised; write them in another unit"
        )
    same = bool((known == known[0]).all())
    return Number(column=column, mean=mean, scale=0.0 if same else scale, missing=missing)


def _category(column: str, cells: Sequence[str | None]) -> Category:
    counts = Counter(cell for cell in cells if cell is not None)
    often = sorted((value for value in counts if counts[value] >= LEAST_ROWS), key=lambda v: (-counts[v], v))
    values = sorted(often[:MOST_VALUES])
    return Category(
        column=column,
        values=tuple(values),
        unknown=len(values) < len(counts),
        missing=None in cells,
    )


def column_features(rows: Rows, states: Mapping[str, ColumnState]) -> FeatureRows:
    """Vectors float32 [items, width] of the modalities without encoder, and which item each row has."""
    tables: dict[str, torch.Tensor] = {}
    index: dict[str, torch.Tensor] = {}
    for k, state in states.items():
        cells = rows.cells[k]
        there = torch.tensor([cell is not None for cell in cells], dtype=torch.bool)
        vectors = state.encode([cell for cell in cells if cell is not None], f"{rows.source}: {k}")
        tables[k] = torch.from_numpy(vectors)
        index[k] = torch.where(there, there.long().cumsum(0) - 1, -1)
    return FeatureRows(tables, index)
