"""The answers that a fine-tuning run left in ``predictions.parquet``, as the report reads them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..tasks.task import Floats, Ints, Task
from ..tasks.thresholds import decided, has_thresholds

__all__ = ["Predictions", "Unreadable", "read_predictions"]

FILE = "predictions.parquet"


class Unreadable(Exception):
    """The answers cannot be had; the message says why."""


@dataclass(frozen=True)
class Predictions:
    """Test rows, of a cross-validation out-of-fold rows, a row once per repeat.

    targets: as ``Task`` has them; p: answers float64 [n, C] per head; repeat, fold: int64 [n], None on fixed
    splits.
    """

    task: Task
    ids: list[str]
    groups: list[str]
    targets: Any
    p: dict[str, Floats]
    repeat: Ints | None
    fold: Ints | None
    limits: dict[str, Floats] = field(default_factory=dict[str, Floats])
    """From which probability on labels are said, per head [n, 1] or [n, labels]; no entry: one half."""

    def decided(self, head: str) -> Floats:
        """What a head says, as probabilities of 0 and 1 (see ``thresholds.decided``)."""
        return decided(self.task, self.p[head], self.limits.get(head, np.full((1, 1), 0.5)))


def read_predictions(folder: Path, results: Mapping[str, Any]) -> Predictions:
    """The answers of a run with these results; ``Unreadable`` if there are none that fit."""
    path = folder / FILE
    if not path.is_file():
        raise Unreadable(f"there is no {path}")
    try:
        columns = _columns(path)
        task = Task(results["type"], tuple(map(str, results["classes"])))
        repeat, fold = _numbers(columns.get("repeat")), _numbers(columns.get("fold"))
        names = list(map(str, results["heads"]))
        return Predictions(
            task,
            [str(cell) for cell in columns["id"]],
            [str(cell) for cell in columns["group"]],
            _targets(task, columns["target"]),
            {name: _answers(task, columns, name) for name in names},
            repeat,
            fold,
            _limits(task, results, names, repeat, fold, len(columns["id"])),
        )
    except (KeyError, TypeError, ValueError, pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise Unreadable(f"{path} does not fit results.json ({reason})") from error


def _columns(path: Path) -> dict[str, list[Any]]:
    return {str(name): cells for name, cells in pq.read_table(path).to_pydict().items()}


def _numbers(cells: list[Any] | None) -> Ints | None:
    return None if cells is None else np.array(cells, dtype=np.int64)


def _limits(
    task: Task,
    results: Mapping[str, Any],
    names: Sequence[str],
    repeat: Ints | None,
    fold: Ints | None,
    n: int,
) -> dict[str, Floats]:
    """The thresholds of every head and row: of a cross-validation those of the row's fold."""
    if not has_thresholds(task.type):
        return {}
    labels = task.classes[1:] if task.type == "binary" else task.classes
    made = {name: np.full((n, len(labels)), 0.5) for name in names}
    if repeat is None or fold is None:
        parts: list[tuple[Any, Any]] = [(np.ones(n, dtype=bool), results.get("threshold"))]
    else:
        parts = [
            ((repeat == part.get("repeat")) & (fold == part.get("fold")), part.get("threshold"))
            for part in results.get("folds", [])
        ]
    for rows, found in parts:
        heads = found.get("heads", {}) if isinstance(found, dict) else {}
        for name in names:
            if name in heads:
                made[name][rows] = [float(heads[name][label]) for label in labels]
    return made


def _targets(task: Task, cells: list[Any]) -> Any:
    """What ``results.write_predictions`` made of targets, the way back."""
    if task.type == "regression":
        return np.array(cells, dtype=np.float64)
    if task.type == "multilabel":
        return np.array([[name in row for name in task.classes] for row in map(set, cells)], dtype=np.int64)
    number = {name: i for i, name in enumerate(task.classes)}
    return np.array([number[str(cell)] for cell in cells], dtype=np.int64)


def _answers(task: Task, columns: Mapping[str, list[Any]], name: str) -> Floats:
    if task.type == "regression":
        return np.array(columns[f"{name}:prediction"], dtype=np.float64)[:, None]
    if task.type == "binary":
        positive = np.array(columns[f"{name}:{task.classes[1]}"], dtype=np.float64)
        return np.stack([1 - positive, positive], axis=1)
    found = [np.array(columns[f"{name}:{label}"], dtype=np.float64) for label in task.classes]
    return np.stack(found, axis=1)
