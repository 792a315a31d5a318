"""What would stop a run, or leave it without a sense, and can be told of a table's parts before anything is
encoded or trained. A run asks it of every part; ``--validate`` collects what it says."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch

from ...configs.errors import UserError
from ..config import FinetuneConfig
from ..config.space import candidates
from ..encoders.columns import fit_columns
from ..fusion.operators import check_heads
from ..tables.links import MISSING, PICTURE, TEXT, components
from ..tables.manifest import Rows, Splits
from ..tasks.retrieval_metrics import chances
from ..tasks.targets import Targets, encode_targets, make_task
from ..tasks.task import Floats, Task, higher_is_better
from .folds import Fold

__all__ = ["Planned", "check_inner", "faults", "prepare", "without"]

Planned = tuple[Fold | None, Splits]
Check = Callable[[FinetuneConfig, Rows, Planned, Targets, Task], None]


def prepare(config: FinetuneConfig, rows: Rows, part: Planned) -> tuple[Targets, Task]:
    """Targets of all rows and the task of one part of ``session.plan``.

    Raises UserError for what would stop training, or would stop it by a metric that says nothing.
    """
    targets, classes = _encode(config, rows, part)
    task = make_task(config.task, classes)
    for check in CHECKS.values():
        check(config, rows, part, targets, task)
    return targets, task


def without(splits: Splits, bad: Sequence[int]) -> Splits:
    """The splits without some rows."""
    return Splits(*(part[~np.isin(part, bad)] for part in (splits.train, splits.inner, splits.test)))


def faults(
    config: FinetuneConfig, rows: Rows, parts: Iterable[Planned], broken: Sequence[int] = ()
) -> dict[str, str]:
    """What a run refuses in some part, of every kind the first sentence: what ``prepare`` refuses, and inner
    rows that say nothing once those that are ``broken`` are left out."""
    found: dict[str, str] = {}
    for part in parts:
        kind = "targets"
        try:
            targets, classes = _encode(config, rows, part)
            kind = "class_weight"
            task = make_task(config.task, classes)
        except UserError as error:
            found.setdefault(kind, str(error))
            continue
        asked = [(kind, check, part) for kind, check in CHECKS.items()]
        asked += [("inner_metric", check_inner, (part[0], without(part[1], broken)))] if broken else []
        for kind, check, some in asked:
            try:
                check(config, rows, some, targets, task)
            except UserError as error:
                found.setdefault(kind, str(error))
    return found


def check_inner(config: FinetuneConfig, rows: Rows, part: Planned, targets: Targets, task: Task) -> None:
    """Raise UserError where the metric that stops is undefined on the inner rows, or the same whatever is
    answered: perfect answers and answers that are all wrong tell it."""
    fold, splits = part
    metric = config.early_stopping.metric
    metric = task.primary if metric == "auto" else metric
    if metric not in task.metrics:
        return
    inner = targets[splits.inner]
    if task.type == "retrieval":
        if len(inner) and chances(inner)["mean_recall"] < 1:  # False of NaN
            return
    elif len(inner):
        best, worst = (task.value(metric, inner, answers) for answers in _extremes(task, inner))
        if best > worst if higher_is_better(metric) else best < worst:  # False of NaN
            return
    target = config.task.target
    several = ", ".join(target or [str(m.column) for m in config.data.modalities.values()])
    columns = f"column '{target}'" if isinstance(target, str) else f"columns {several}"
    where = "" if fold is None else f" of fold {fold.fold} of repeat {fold.repeat}"
    if fold is None and config.eval.folds is not None:
        where = " of the training on all rows"
    val = config.eval.folds is None and "val" in rows.splits
    mend = "choose other val rows" if val else "set a larger eval.inner_share"
    raise UserError(
        f"{rows.source}: what the {len(inner)} inner rows{where} hold in {columns} leaves {metric}, which "
        f"stops training, without a meaning; {mend} or early_stopping.metric: loss"
    )


def _extremes(task: Task, targets: Targets) -> tuple[Floats, Floats]:
    """Answers [n, C] that are all right, and ones that are all wrong."""
    if task.type == "regression":
        return targets[:, None], (2 * targets.max() + 1 - targets)[:, None]
    if task.type in ("multilabel", "vqa"):
        return targets.astype(np.float64), 1.0 - targets
    known = np.eye(len(task.classes))
    return known[targets], known[(targets + 1) % len(task.classes)]


def _check_metric(config: FinetuneConfig, rows: Rows, part: Planned, targets: Targets, task: Task) -> None:
    task.check_metric(config.early_stopping.metric)


def _check_heads(config: FinetuneConfig, rows: Rows, part: Planned, targets: Targets, task: Task) -> None:
    for heads in candidates(config):
        check_heads(heads, {}, task.outputs, task.link)


def _check_pairs(config: FinetuneConfig, rows: Rows, part: Planned, targets: Targets, task: Task) -> None:
    fold, splits = part
    if task.type == "retrieval":
        train = targets[splits.train]
        pairs = train[(train[:, PICTURE] != MISSING) & (train[:, TEXT] != MISSING)]
        if components(*pairs.T[:3]).max(initial=0) == 0:
            raise UserError(
                f"{_of(fold)}{rows.source}: retrieval needs two or more training rows with picture and "
                "text that do not belong together; add some"
            )


def _check_weights(config: FinetuneConfig, rows: Rows, part: Planned, targets: Targets, task: Task) -> None:
    fold, splits = part
    weights = [rows.weights[i] for i in splits.train] if rows.weights else None
    try:
        task.weights(torch.from_numpy(targets[splits.train]), weights)
    except UserError as error:
        raise UserError(f"{_of(fold)}{error}") from error


def _check_columns(config: FinetuneConfig, rows: Rows, part: Planned, targets: Targets, task: Task) -> None:
    fold, splits = part
    try:
        fit_columns(rows.take(splits.train))
    except UserError as error:
        raise UserError(f"{_of(fold)}{error}") from error


CHECKS: dict[str, Check] = {
    "early_stopping": _check_metric,
    "heads": _check_heads,
    "columns": _check_columns,
    "pairs": _check_pairs,
    "weights": _check_weights,
    "inner_metric": check_inner,
}


def _encode(config: FinetuneConfig, rows: Rows, part: Planned) -> tuple[Targets, list[str]]:
    fold, splits = part
    try:
        return encode_targets(rows, config.task, splits, min_rows=config.data.min_class_rows)
    except UserError as error:
        if fold is None:
            raise
        raise UserError(f"{_of(fold)}{error}, or set fewer folds") from error


def _of(fold: Fold | None) -> str:
    return "" if fold is None else f"fold {fold.fold} of repeat {fold.repeat}: "
