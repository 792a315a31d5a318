"""Scores of a finished run on another labelled table."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ..config import LabelledDataConfig, TaskConfig
from ..tables.files import Columns
from ..tables.links import linked
from ..tables.manifest import Rows, Splits, group_names
from ..tasks.targets import Targets, encode_targets
from ..tasks.task import Floats, Task
from .intervals import paired_intervals

__all__ = ["score_table"]


def score_table(
    task: Task, info: Mapping[str, Any], columns: Columns, rows: Rows, p: Floats, said: Floats
) -> dict[str, Any]:
    """``n``, ``n_groups`` and ``metrics`` with intervals of answers p [n, C] to labelled rows, and of what is
    said of them (see ``thresholds.decided``).

    info: run.json. Raises UserError for a target column that is not there, empty or unknown labels.
    """
    group = info.get("group")
    numbers = [str(i) for i in range(len(rows))]  # ids may repeat here
    groups = group_names(columns[group], numbers) if group in columns else None
    if task.type == "retrieval":
        rows = _linked(info, columns, replace(rows, ids=numbers, groups=groups or numbers))
        groups, targets = rows.groups, np.array(rows.targets)
    else:
        targets = _targets(task, info, columns, rows)
    scores, _ = paired_intervals(
        targets,
        {"head": p},
        task.metrics,
        groups,
        task=task,
        said={"head": said},
        samples=int(info.get("bootstrap", 1000)),
    )
    plain = {name: interval.as_dict() for name, interval in scores["head"].items()}
    return {
        "n": len(rows),
        "n_groups": len(rows) if groups is None else len(set(groups)),
        "metrics": {n: {k: v if v == v else None for k, v in one.items()} for n, one in plain.items()},
    }


def _linked(info: Mapping[str, Any], columns: Columns, rows: Rows) -> Rows:
    """Rows whose targets and groups are those of a retrieval task."""
    target = info["target"]
    if target is not None and target not in columns:
        raise UserError(f"{rows.source} has no column '{target}', the run's target; add it")
    cells = [] if target is None else list(columns[target])
    data = LabelledDataConfig(manifest=rows.source, modalities=rows.declared)
    return linked(replace(rows, targets=cells), TaskConfig(type="retrieval", target=target), data)


def _targets(task: Task, info: Mapping[str, Any], columns: Columns, rows: Rows) -> Targets:
    """Targets of all rows in the run's classes; none is a training row."""
    if info.get("makes_negatives"):
        raise UserError(
            f"{rows.source}: the run made the pairs that do not match itself, so no column tells them; use "
            "predict and score its answers"
        )
    target = info["target"] if isinstance(info["target"], str) else tuple(info["target"])
    names = (target,) if isinstance(target, str) else target
    for name in names:
        if name not in columns:
            raise UserError(f"{rows.source} has no column '{name}', the run's target; add it")
    cells = columns[target] if isinstance(target, str) else zip(*(columns[n] for n in names), strict=True)
    yes_no = task.type == "binary" and task.classes == ("0", "1")
    made: dict[str, Any] = {"type": task.type, "target": target}
    if task.type in ("multilabel", "vqa"):
        made |= {"separator": info.get("separator")}
    if task.type == "binary" and not yes_no:  # a table may hold one of the two alone
        made["type"] = "multiclass"
    if not yes_no and task.type != "regression" and isinstance(target, str):
        made["classes"] = task.classes
    everything = np.arange(len(rows))
    splits = Splits(everything[:0], everything[:0], everything)
    return encode_targets(replace(rows, targets=list(cells)), TaskConfig(**made), splits, min_rows=0)[0]
