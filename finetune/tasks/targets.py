"""Target columns into numbers: class numbers, a 0 or 1 per label, or a quantity."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...configs.errors import UserError
from ..config import TaskConfig
from ..tables.cells import is_missing
from ..tables.manifest import Rows, Splits
from .task import Task
from .vqa import answers_of, canonical_answer, soft_targets, vocabulary

__all__ = ["Targets", "encode_targets", "make_task"]

Targets = NDArray[Any]
PAIR_CLASSES = ("0", "1")
"""Of matching tasks: a pair that does not match, and one that does."""
YES_NO = {"true": 1, "false": 0, "1": 1, "0": 0}


def encode_targets(
    rows: Rows, task: TaskConfig, splits: Splits, *, min_rows: int
) -> tuple[Targets, list[str]]:
    """Targets of all rows, as ``Task`` describes them, and the names of classes or labels. Binary: number 1
    is the positive class. Tasks of pairs: of rows as ``links.linked`` returns them.

    Raises UserError for empty cells and labels that are not of the task, classes with too few training rows,
    and classes of val or test that training does not have.
    """
    if task.of_pairs:  # what ``links.linked`` made
        return np.array(rows.targets, dtype=np.int64), list(PAIR_CLASSES) if task.type == "matching" else []
    if task.type == "regression":
        return _numbers(rows, task, splits), []
    if task.type == "vqa":
        return _answer_scores(rows, task, splits, min_rows)
    if task.type == "multilabel":
        return _label_table(rows, task, splits, min_rows)
    _refuse_empty(rows, task)
    labels = [_plain(value) for value in rows.targets]
    classes = _binary_classes(rows, labels, task) if task.type == "binary" else _classes(labels, task, splits)
    number = {name: i for i, name in enumerate(classes)}
    for i, label in enumerate(labels):
        if label not in number:
            raise UserError(
                f"{rows.source}: row {i + 1}: label '{label}' in column '{task.target}' is no class of the "
                f"training rows ({_known(classes)}); remove the row or add training rows"
            )
    targets = np.array([number[label] for label in labels], dtype=np.int64)
    _enough(rows, task, classes, np.bincount(targets[splits.train], minlength=len(classes)), min_rows)
    return targets, classes


def make_task(config: TaskConfig, classes: Sequence[str]) -> Task:
    """The task of a config with these classes; UserError if ``class_weight`` names another class."""
    weight: Any = config.class_weight
    if isinstance(weight, dict):
        if unknown := sorted(weight.keys() - set(classes)):
            raise UserError(
                f"task.class_weight: '{unknown[0]}' is no class of the task ({_known(classes)}); remove it"
            )
        weight = tuple(weight.get(name, 1.0) for name in classes)
        if not any(weight):
            raise UserError("task.class_weight: all classes have weight 0; give one of them more")
    if config.type == "matching":
        negatives = "hard" if config.hard_negatives else "random"
        return Task("binary", PAIR_CLASSES, "none", config.focal_gamma, negatives=negatives)
    return Task(config.type, tuple(classes), weight, config.focal_gamma)


def _refuse_empty(rows: Rows, task: TaskConfig) -> None:
    for i, value in enumerate(rows.targets):
        if is_missing(value):
            raise UserError(
                f"{rows.source}: row {i + 1}: column '{task.target}' is empty; label the row or remove it"
            )


def _known(classes: Sequence[str]) -> str:
    return ", ".join(classes[:12]) + (", .." if len(classes) > 12 else "")


def _enough(rows: Rows, task: TaskConfig, classes: Sequence[str], counts: Targets, min_rows: int) -> None:
    few = int(counts.argmin())
    if counts[few] < min_rows:
        kind = "label" if task.type == "multilabel" else "class"
        where = f" in column '{task.target}'" if isinstance(task.target, str) else ""
        raise UserError(
            f"{rows.source}: {kind} '{classes[few]}'{where} has {counts[few]} training "
            f"rows, needed are {min_rows}; add rows, remove the {kind} or lower data.min_class_rows"
        )


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
    for i, label in enumerate(labels):
        if label.lower() not in YES_NO:
            raise UserError(
                f"{rows.source}: row {i + 1}: '{label}' in column '{task.target}' is neither 0 nor 1; name "
                "the positive label as task.positive"
            )
        labels[i] = str(YES_NO[label.lower()])
    return ["0", "1"]


def _numbers(rows: Rows, task: TaskConfig, splits: Splits) -> Targets:
    """float64 [n], all of them finite."""
    _refuse_empty(rows, task)
    numbers = np.empty(len(rows))
    for i, value in enumerate(rows.targets):
        try:
            numbers[i] = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            numbers[i] = math.nan
        if not math.isfinite(numbers[i]):
            raise UserError(
                f"{rows.source}: row {i + 1}: '{value}' in column '{task.target}' is no finite number; mend "
                "it or remove the row"
            )
    if len(splits.train) and len(np.unique(numbers[splits.train])) < 2:
        raise UserError(
            f"{rows.source}: column '{task.target}' holds one number in all training rows; there is nothing "
            "to learn"
        )
    return numbers


def _label_table(
    rows: Rows, task: TaskConfig, splits: Splits, min_rows: int
) -> tuple[NDArray[np.int64], list[str]]:
    """0 and 1, int64 [n, L], and the labels."""
    if isinstance(task.target, str):
        labels = [
            _labels_of(value, task, f"{rows.source}: row {i + 1}") for i, value in enumerate(rows.targets)
        ]
        classes = list(task.classes) if task.classes else sorted({c for i in splits.train for c in labels[i]})
        if len(classes) < 2:
            found = f"{len(classes)} label{'s' if len(classes) != 1 else ''}"
            raise UserError(
                f"task.target: column '{task.target}' holds {found} in training; two are needed, and for one "
                "task.type: binary"
            )
        number = {name: i for i, name in enumerate(classes)}
        targets = np.zeros((len(rows), len(classes)), dtype=np.int64)
        for i, said in enumerate(labels):
            for label in said:
                if label not in number:
                    raise UserError(
                        f"{rows.source}: row {i + 1}: '{label}' in column '{task.target}' is no label of the "
                        f"training rows ({_known(classes)}); remove it or add training rows"
                    )
                targets[i, number[label]] = 1
    else:
        classes = list(task.columns)
        targets = np.array(
            [_yes_no(cells, classes, f"{rows.source}: row {i + 1}") for i, cells in enumerate(rows.targets)],
            dtype=np.int64,
        )
    _enough(rows, task, classes, targets[splits.train].sum(axis=0), min_rows)
    return targets, classes


def _answer_scores(
    rows: Rows, task: TaskConfig, splits: Splits, min_rows: int
) -> tuple[NDArray[np.float64], list[str]]:
    """Scores float64 [n, C] of answers, and the answers; see ``vqa``."""
    answers = answers_of(rows.targets, task.separator, str(task.target), rows.source)
    if task.classes is not None:
        classes = [canonical_answer(name) for name in task.classes]
    else:
        classes = vocabulary(answers, splits.train, most=task.vocabulary, min_rows=max(1, min_rows))
    if len(set(classes)) != max(2, len(classes)):
        raise UserError(
            f"{rows.source}: column '{task.target}' leaves {len(set(classes))} different answers that "
            f"{min_rows} training rows have; two are needed: lower data.min_class_rows or mend task.classes"
        )
    return soft_targets(answers, classes), classes


def _labels_of(value: Any, task: TaskConfig, where: str) -> list[str]:
    """The labels of one cell: a list, or text between separators. An empty list or text has none."""
    if task.separator is not None and isinstance(value, str):
        return [label for part in value.split(task.separator) if (label := part.strip())]
    if task.separator is None and isinstance(value, list | tuple):
        if any(is_missing(item) for item in value):
            raise UserError(f"{where}: a label in column '{task.target}' is empty; remove it from the list")
        return [_plain(item) for item in value]
    if value is None or (isinstance(value, float) and math.isnan(value)):
        none = "[]" if task.separator is None else "an empty text"
        raise UserError(
            f"{where}: column '{task.target}' is empty; give the row's labels ({none} for none) or remove it"
        )
    if task.separator is None:
        raise UserError(
            f"{where}: column '{task.target}' holds {str(value)[:40]!r} and no list; name what stands "
            "between labels as task.separator, or several columns of 0 and 1 as task.target"
        )
    raise UserError(
        f"{where}: column '{task.target}' holds {type(value).__name__} and no text; remove task.separator"
    )


def _yes_no(cells: Sequence[Any], columns: Sequence[str], where: str) -> list[int]:
    """0 or 1 of each label's own column."""
    found: list[int] = []
    for name, cell in zip(columns, cells, strict=True):
        if is_missing(cell):
            raise UserError(f"{where}: column '{name}' is empty; give 0 or 1 or remove the row")
        if (value := YES_NO.get(_plain(cell).lower())) is None:
            raise UserError(f"{where}: '{cell}' in column '{name}' is neither 0 nor 1; mend it")
        found.append(value)
    return found
