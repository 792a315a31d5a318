"""Labelled tables: CSV, TSV, JSONL and Parquet into rows of declared columns, and what can be wrong in them.

An empty cell is a missing modality, which models handle; a picture that is named and cannot be read is
broken, which is an error (see ``cells``). Nothing is guessed: columns are named in the config.
"""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ...configs.files import resolve_data_path
from ...pretrain.probe import grouped_holdout
from ...pretrain.statistics import Ints
from ..config import LabelledDataConfig, ModalityConfig, TaskConfig
from .cells import PictureFolder, embeddings, is_missing, records, text_of
from .files import read_columns
from .samples import Damaged
from .sources import Whole, read_source

__all__ = [
    "Rows",
    "Splits",
    "group_names",
    "parse_rows",
    "read_columns",
    "read_manifest",
    "read_rows",
    "split_rows",
]

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Rows:
    """The rows of a table. ``cells`` holds per modality one cell for every row, None where it is missing:
    ``image`` a tuple of pictures, ``text`` a string, a tabular modality the cells of its columns (see
    ``cells.records``), an embedding float32 [W]."""

    source: str
    ids: list[str]
    declared: dict[str, ModalityConfig]
    """The modalities in the config's order, and how the config declares them."""
    cells: dict[str, list[Any]]
    targets: list[Any] = field(default_factory=list[Any])
    groups: list[str] = field(default_factory=list[str])
    splits: list[str] = field(default_factory=list[str])
    weights: list[float] = field(default_factory=list[float])
    """Of the training loss; empty where all rows count the same."""
    first: int = 0
    """Rows of the table before these, which were read in chunks; messages count them."""
    damaged: tuple[Damaged, ...] = ()
    """Samples that are no rows, because they cannot be read."""

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the modalities."""
        return tuple(self.declared)

    def take(self, rows: Ints) -> "Rows":
        """The given rows, in the given order."""
        names = ("ids", "targets", "groups", "splits", "weights")
        picked = {n: [values[i] for i in rows] if (values := getattr(self, n)) else values for n in names}
        cells = {k: [values[i] for i in rows] for k, values in self.cells.items()}
        return replace(self, cells=cells, **picked)


@dataclass(frozen=True)
class Splits:
    """Row numbers of each part: ``train`` fits, ``inner`` stops and chooses, ``test`` is scored once."""

    train: Ints
    inner: Ints
    test: Ints


def read_rows(config: LabelledDataConfig, task: TaskConfig) -> Rows:
    """Read and check the labelled table of a config; see ``parse_rows``. Raises UserError also for a damaged
    sample, unless ``on_error`` lets it be left out."""
    table, folder = read_manifest(config)
    if table.damaged and config.on_error == "raise":
        more = f" ({len(table.damaged)} such samples)" if len(table.damaged) > 1 else ""
        raise UserError(f"{table.damaged[0]}{more}; mend it or set data.on_error=quarantine")
    rows = parse_rows(table.columns, config, folder, source=table.name, target=task.columns)
    return replace(rows, damaged=tuple(table.damaged))


def read_manifest(config: LabelledDataConfig) -> tuple[Whole, PictureFolder]:
    """The columns of ``data.manifest``, and where its pictures are looked for."""
    table = read_source(config.manifest, config.format, key="data.format")
    root = resolve_data_path(config.root) if config.root else None
    return table, PictureFolder(table.folder, root)


def parse_rows(
    columns: Mapping[str, Sequence[Any]],
    config: LabelledDataConfig,
    folder: PictureFolder,
    *,
    source: str,
    target: str | Sequence[str] | None,
    first: int = 0,
) -> Rows:
    """Rows of the declared columns; of several target columns each row's target is a tuple. ``target`` None
    leaves labels, weights, groups and splits out (for prediction). ``first``: rows of the table before these.

    Raises UserError for a column that is not there, a repeated id, a row without any modality, a path outside
    the folder, a weight that is none, an unknown split, and a group that straddles splits.
    """
    n = len(next(iter(columns.values()), []))
    if n == 0:
        raise UserError(f"{source} holds no rows; add some")

    def column(key: str, name: str) -> Sequence[Any]:
        if name not in columns:
            near = get_close_matches(name, list(columns), n=1, cutoff=0.5)
            hint = f"did you mean '{near[0]}'?" if near else f"it has {', '.join(map(str, columns))}"
            if key == "data.split":
                hint += "; null makes a split by chance, the same each time"
            raise UserError(f"{key}: {source} has no column '{name}'; {hint}")
        return columns[name]

    labelled = target is not None
    ids = _ids(column("data.id", config.id) if config.id and (labelled or config.id in columns) else None, n)
    if labelled and (repeated := [name for name, count in Counter(ids).items() if count > 1]):
        raise UserError(
            f"{source}: id '{repeated[0]}' stands on {ids.count(repeated[0])} rows; make it unique"
        )
    where = [f"{source}: row {first + i + 1}" for i in range(n)]
    if "__key__" in columns:
        where = [f"{place} ({key})" for place, key in zip(where, columns["__key__"], strict=True)]
    cells = _cells(config, columns, where, folder, column, partly=not labelled)
    for i in range(n):
        if all(some[i] is None for some in cells.values()):
            named = f"{'neither ' if len(cells) > 1 else 'no '}{' nor '.join(cells)}"
            raise UserError(f"{where[i]} has {named}; fill a cell or remove it")
    rows = Rows(source, ids, dict(config.modalities), cells, first=first)
    if target is None:
        return rows
    if isinstance(target, str):
        targets = list(column("task.target", target))
    else:
        targets = list(zip(*(column("task.target", name) for name in target), strict=True))
    weights = _weights(column("data.weight", config.weight), config.weight, where) if config.weight else []
    groups = group_names(column("data.group", config.group), ids) if config.group else ids
    splits = [str(s) for s in column("data.split", config.split)] if config.split else []
    rows = replace(rows, targets=targets, groups=groups, splits=splits, weights=weights)
    _check_splits(rows, config)
    return rows


def _cells(
    config: LabelledDataConfig,
    columns: Mapping[str, Sequence[Any]],
    where: Sequence[str],
    folder: PictureFolder,
    column: Callable[[str, str], Sequence[Any]],
    *,
    partly: bool,
) -> dict[str, list[Any]]:
    """The cells of every modality. ``partly``: a table to predict may lack columns, whose cells are then
    empty, but not all of them."""
    empty = [None] * len(where)
    named = [name for m in config.modalities.values() for names in m.columns.values() for name in names]
    partly = partly and any(name in columns for name in named)
    cells: dict[str, list[Any]] = {}
    for k, m in config.modalities.items():
        given = [
            empty if partly and name not in columns else column(f"data.modalities.{k}.{key}", name)
            for key, names in m.columns.items()
            for name in names
        ]
        if m.tabular:
            cells[k] = list(records(m, given, where))
        elif m.embedding is not None:
            cells[k] = list(embeddings(given[0], m.embedding, where))
        elif k == "image":
            cells[k] = [folder.several(cell, w, m) for cell, w in zip(given[0], where, strict=True)]
        else:
            cells[k] = [text_of(cell, w) for cell, w in zip(given[0], where, strict=True)]
    return cells


def group_names(cells: Sequence[Any], ids: Sequence[str]) -> list[str]:
    """The group of every row. A row whose cell is empty is a group of its own, named after its id; blanks
    before that name keep it apart from the names of the table."""
    named = [None if is_missing(cell) else str(cell) for cell in cells]
    alone = "row "
    while any(name is not None and name.startswith(alone) for name in named):
        alone = f" {alone}"
    return [alone + ids[i] if name is None else name for i, name in enumerate(named)]


def _ids(column: Sequence[Any] | None, n: int) -> list[str]:
    return [str(i) for i in range(n)] if column is None else [str(cell) for cell in column]


def _weights(cells: Sequence[Any], name: str, where: Sequence[str]) -> list[float]:
    """Finite numbers that are not negative."""
    weights: list[float] = []
    for cell, place in zip(cells, where, strict=True):
        try:
            weights.append(float(cell))
        except (TypeError, ValueError):
            weights.append(math.nan)
        if not (math.isfinite(weights[-1]) and weights[-1] >= 0):
            raise UserError(
                f"{place}: weight '{cell}' in column '{name}' is no number from 0 on; mend it or remove the "
                "row"
            )
    return weights


def _check_splits(rows: Rows, config: LabelledDataConfig) -> None:
    """Known names, train and test present, and no group on two sides."""
    if not rows.splits:
        return
    for i, split in enumerate(rows.splits):
        if split not in SPLITS:
            raise UserError(
                f"{rows.source}: row {i + 1}: split '{split}' is unknown in column '{config.split}'; use "
                f"{', '.join(SPLITS)}"
            )
    for needed in ("train", "test"):
        if needed not in rows.splits:
            raise UserError(
                f"{rows.source}: column '{config.split}' has no row of split {needed}; add some, or set "
                "data.split to null for a seeded split"
            )
    if config.group_across_splits == "allow":
        return
    seen: dict[str, str] = {}
    for group, split in zip(rows.groups, rows.splits, strict=True):
        if seen.setdefault(group, split) != split:
            raise UserError(
                f"{rows.source}: group '{group}' of column '{config.group}' stands in splits {seen[group]} "
                f"and {split}; keep each group in one split, or set data.group_across_splits=allow if the "
                "splits differ in something else"
            )


def split_rows(rows: Rows, config: LabelledDataConfig, *, inner_share: float, seed: int = 0) -> Splits:
    """Row numbers of train, inner and test: the split column's, or seeded ones that keep groups whole.

    Without val rows the inner part is taken out of train. Raises UserError where groups are too few to split.
    """
    everything = np.arange(len(rows))
    if rows.splits:
        named = np.array(rows.splits)
        train, inner, test = (everything[named == name] for name in SPLITS)
    else:
        test, train = _holdout(rows, everything, config.test_share, seed, "a test split")
        inner = everything[:0]
    if len(inner) == 0:
        inner, train = _holdout(rows, train, inner_share, seed + 1, "an inner split of the training rows")
    return Splits(train, inner, test)


def _holdout(rows: Rows, among: Ints, share: float, seed: int, what: str) -> tuple[Ints, Ints]:
    groups = [rows.groups[i] for i in among]
    if len(set(groups)) < 2:
        raise UserError(f"{rows.source}: one group cannot make {what}; add rows of other groups")
    held = grouped_holdout(groups, share=share, seed=seed)
    return among[held], among[~held]
