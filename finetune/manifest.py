"""Labelled tables: CSV, TSV, JSONL and Parquet into rows of declared columns, and what can be wrong in them.

An empty cell is a missing modality, which models handle; a picture that is named and cannot be read is
broken, which is an error (see ``cells``). Nothing is guessed: columns are named in the config.
"""

import csv
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..configs.errors import UserError
from ..configs.files import resolve_data_path
from ..pretrain.probe import grouped_holdout
from ..pretrain.statistics import Ints
from .cells import Picture, PictureFolder
from .config import LabelledDataConfig, TaskConfig

__all__ = ["Rows", "Splits", "encode_targets", "parse_rows", "read_columns", "read_rows", "split_rows"]

Columns = dict[str, list[Any]]
SPLITS = ("train", "val", "test")
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")


@dataclass(frozen=True)
class Rows:
    """The rows of a table. ``images`` and ``texts`` hold None where a modality is missing; an absent modality
    is absent from ``modalities``."""

    source: str
    ids: list[str]
    modalities: tuple[str, ...]
    images: list[Picture | None]
    texts: list[str | None]
    targets: list[Any]
    groups: list[str]
    splits: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: Ints) -> "Rows":
        """The given rows, in the given order."""
        names = ("ids", "images", "texts", "targets", "groups", "splits")
        picked = {n: [values[i] for i in rows] if (values := getattr(self, n)) else values for n in names}
        return replace(self, **picked)


@dataclass(frozen=True)
class Splits:
    """Row numbers of each part: ``train`` fits, ``inner`` stops and chooses, ``test`` is scored once."""

    train: Ints
    inner: Ints
    test: Ints


def read_columns(path: Path) -> Columns:
    """All columns of a table file. CSV and TSV cells are strings. Raises UserError if it cannot be read."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: a table must end in {', '.join(FORMATS)}; convert it")
    try:
        if path.suffix.lower() == ".parquet":
            return pq.read_table(path).to_pydict()
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".jsonl":
                return _json_columns(file, path)
            return _csv_columns(file, path)
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: {reason}; give the path of a labelled table") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except pa.ArrowException as error:
        raise UserError(f"{path} is not Parquet ({str(error).splitlines()[0]}); write it again") from error


def _csv_columns(file: Iterable[str], path: Path) -> Columns:
    csv.field_size_limit(1 << 27)
    try:
        lines = list(csv.reader(file, delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True))
    except csv.Error as error:
        raise UserError(f"{path} is not a table of separated values ({error}); quote its cells") from error
    lines = [line for line in lines if line]
    if not lines:
        raise UserError(f"{path} is empty; its first line must name the columns")
    names = [name.strip() for name in lines[0]]
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: column '{repeated[0]}' stands twice; rename one")
    for number, line in enumerate(lines[1:], 1):
        if len(line) != len(names):
            raise UserError(
                f"{path}: row {number} has {len(line)} cells instead of {len(names)}; quote cells with commas"
            )
    return {name: [line[i] for line in lines[1:]] for i, name in enumerate(names)}


def _json_columns(file: Iterable[str], path: Path) -> Columns:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}); mend it") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} must be an object of columns, not {type(row).__name__}")
        rows.append(row)
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def read_rows(config: LabelledDataConfig, task: TaskConfig) -> Rows:
    """Read and check the labelled table of a config; see ``parse_rows``."""
    path = resolve_data_path(config.manifest)
    folder = PictureFolder(path.parent, resolve_data_path(config.root) if config.root else None)
    return parse_rows(read_columns(path), config, folder, source=str(path), target=task.target)


def parse_rows(
    columns: Mapping[str, Sequence[Any]],
    config: LabelledDataConfig,
    folder: PictureFolder,
    *,
    source: str,
    target: str | None,
) -> Rows:
    """Rows of the declared columns; ``target`` None leaves labels, groups and splits out (for prediction).

    Raises UserError for a column that is not there, an empty label, a repeated id, a row without any
    modality, a path outside the folder, an unknown split, and a group that straddles splits.
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

    modalities = {k: m.column for k, m in config.modalities.items()}
    if target is None:  # a table to predict may lack a modality altogether
        modalities = {k: name for k, name in modalities.items() if name in columns} or modalities
    cells = {k: column(f"data.modalities.{k}.column", name) for k, name in modalities.items()}
    labelled = target is not None
    ids = _ids(column("data.id", config.id) if config.id and (labelled or config.id in columns) else None, n)
    if labelled and (repeated := [name for name, count in Counter(ids).items() if count > 1]):
        raise UserError(
            f"{source}: id '{repeated[0]}' stands on {ids.count(repeated[0])} rows; make it unique"
        )
    where = [f"{source}: row {i + 1}" for i in range(n)]
    images = (
        [folder.parse(cell, w) for cell, w in zip(cells["image"], where, strict=True)]
        if "image" in cells
        else []
    )
    texts = [_text(cell, w) for cell, w in zip(cells["text"], where, strict=True)] if "text" in cells else []
    for i in range(n):
        if (not images or images[i] is None) and (not texts or texts[i] is None):
            raise UserError(
                f"{where[i]} has neither {' nor '.join(config.modalities)}; fill a cell or remove it"
            )
    rows = Rows(source, ids, tuple(config.modalities), images or [None] * n, texts or [None] * n, [], [], [])
    if target is None:
        return rows
    targets = list(column("task.target", target))
    for i, value in enumerate(targets):
        if is_missing(value):
            raise UserError(f"{where[i]}: column '{target}' is empty; label the row or remove it")
    groups = [str(g) for g in column("data.group", config.group)] if config.group else ids
    splits = [str(s) for s in column("data.split", config.split)] if config.split else []
    rows = replace(rows, targets=targets, groups=groups, splits=splits)
    _check_splits(rows, config)
    return rows


def is_missing(cell: Any) -> bool:
    """Whether a cell is empty: None, NaN or nothing but white space."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return True
    return isinstance(cell, str) and not cell.strip()


def _ids(column: Sequence[Any] | None, n: int) -> list[str]:
    return [str(i) for i in range(n)] if column is None else [str(cell) for cell in column]


def _text(cell: Any, where: str) -> str | None:
    if is_missing(cell):
        return None
    if not isinstance(cell, str):
        raise UserError(
            f"{where}: the text is {type(cell).__name__} {str(cell)[:40]!r}; write it as a string"
        )
    return cell


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


def encode_targets(rows: Rows, task: TaskConfig, splits: Splits, *, min_rows: int) -> tuple[Ints, list[str]]:
    """Class numbers int64 [n] and class names. Binary: number 1 is the positive class.

    Raises UserError for labels that are not of the task, classes with too few training rows, and classes of
    val or test that training does not have.
    """
    labels = [_plain(value) for value in rows.targets]
    classes = _binary_classes(rows, labels, task) if task.type == "binary" else _classes(labels, task, splits)
    number = {name: i for i, name in enumerate(classes)}
    for i, label in enumerate(labels):
        if label not in number:
            known = ", ".join(classes[:12]) + (", .." if len(classes) > 12 else "")
            raise UserError(
                f"{rows.source}: row {i + 1}: label '{label}' in column '{task.target}' is no class of the "
                f"training rows ({known}); remove the row or add training rows"
            )
    targets = np.array([number[label] for label in labels], dtype=np.int64)
    counts = np.bincount(targets[splits.train], minlength=len(classes))
    if (few := int(counts.argmin())) >= 0 and counts[few] < min_rows:
        raise UserError(
            f"{rows.source}: class '{classes[few]}' in column '{task.target}' has {counts[few]} training "
            f"rows, needed are {min_rows}; add rows, remove the class or lower data.min_class_rows"
        )
    return targets, classes


def _plain(value: Any) -> str:
    """A label as text: numbers without a fraction as integers, so that 1, 1.0 and "1" are one."""
    if isinstance(value, bool):
        return str(int(value))
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value).strip()


def _classes(labels: list[str], task: TaskConfig, splits: Splits) -> list[str]:
    classes = list(task.classes) if task.classes else sorted({labels[i] for i in splits.train})
    if len(classes) < 2:
        raise UserError(f"task.target: column '{task.target}' holds one class in training; two are needed")
    return classes


def _binary_classes(rows: Rows, labels: list[str], task: TaskConfig) -> list[str]:
    """Negative and positive name; 'true' and 'false' are turned into 1 and 0 in place."""
    found = sorted(set(labels))
    if task.positive is not None:
        positive = str(task.positive)
        others = [name for name in found if name != positive]
        if len(others) != 1 or positive not in found:
            raise UserError(
                f"{rows.source}: column '{task.target}' must hold '{positive}' (task.positive) and one other "
                f"label, not {', '.join(found[:6])}; use task.type multiclass or mend the column"
            )
        return [others[0], positive]
    words = {"true": "1", "false": "0", "0": "0", "1": "1"}
    for i, label in enumerate(labels):
        if label.lower() not in words:
            raise UserError(
                f"{rows.source}: row {i + 1}: '{label}' in column '{task.target}' is neither 0 nor 1; name "
                "the positive label as task.positive"
            )
        labels[i] = words[label.lower()]
    return ["0", "1"]
