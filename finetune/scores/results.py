"""What a run leaves: results.json with scores beside chance, gains over the best single modality and one
sentence; and the predictions they were made from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ...configs.files import temporary_beside
from ...pretrain.statistics import Interval
from ..tables.manifest import Rows
from ..tasks.metrics_more import defined_labels
from ..tasks.task import Floats, Ints, Task
from .retrieval_results import guessing, rank_columns, retrieval_headline
from .verdict import no_verdict

__all__ = ["SHARES", "headline", "make_results", "told", "write_predictions"]


def make_results(
    task: Task,
    documents: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Interval]],
    gains: Mapping[str, Interval],
    targets: Any,
    p: Mapping[str, Floats],
    *,
    best: str,
    single: str,
) -> dict[str, Any]:
    """``heads``: per head its kind, size, time, inner scores, test metrics with intervals, reliability, and
    gain over the single modality ``single`` on the first metric (positive is better); ``best``,
    ``best_single``, and the levels of guessing (see ``_guessing``)."""
    heads: dict[str, Any] = {}
    for name, document in documents.items():
        made: dict[str, Any] = {
            key: document[key] for key in ("stage", "level", "params", "seconds", "inner")
        }
        made |= {"op": document["config"]["op"], "method": document["adapt"]["method"]}
        made |= {"seeds": [seed["seed"] for seed in document["seeds"]]}
        made["metrics"] = {metric: _plain(interval) for metric, interval in scores[name].items()}
        if name in gains and document["stage"] != "single":
            gain = _plain(gains[name])
            versus = {"diff": gain["value"], "low": gain["low"], "high": gain["high"], "against": single}
            made["vs_best_single"] = versus | {"metric": task.metrics[0]}
        if task.type != "regression":
            made["reliability"] = task.reliability(targets, p[name])
        heads[name] = made
    return {
        "type": task.type,
        "classes": list(task.classes),
        "heads": heads,
        "best": best,
        "best_single": single,
        **_guessing(task, targets),
    }


def _guessing(task: Task, targets: Any) -> dict[str, Any]:
    """``chance``, what the first metric is without knowledge: 1 / classes; the mean share of positives
    (multilabel); 0 (ordinal); the error of the best constant answer (regression). ``majority``: the share of
    the most frequent class. ``labels_scored``: labels with positive and negative rows, out of all."""
    if task.type == "retrieval":
        return guessing(targets)
    if task.type == "regression":
        return {"chance": float(targets.std())}
    if task.type == "vqa":
        levels = {"chance": targets.mean(), "majority": targets.mean(axis=0).max()}
        levels["ceiling"] = targets.max(axis=1).mean()
        return {name: float(value) for name, value in levels.items()}
    if task.type == "multilabel":
        defined = defined_labels(targets)
        chance = float(targets[:, defined].mean()) if defined.any() else None
        return {"chance": chance, "labels_scored": int(defined.sum())}
    majority = float(np.bincount(targets).max() / len(targets))
    return {"chance": 0.0 if task.type == "ordinal" else 1 / len(task.classes), "majority": majority}


def _plain(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON, which has no NaN."""
    return {k: v if v == v else None for k, v in interval.as_dict().items()}


SHARES = ("accuracy", "macro_map", "mean_recall", "vqa_accuracy")
"""First metrics that are told in percent."""


def headline(result: Mapping[str, Any]) -> str:
    """One sentence on the recommended head."""
    if result["type"] == "retrieval":
        return retrieval_headline(result)
    best = result["heads"][result["best"]]
    metric = next(iter(best["metrics"]))
    score = {key: told(value, metric) for key, value in best["metrics"][metric].items()}
    chance, rows = told(result["chance"], metric), f"the {result['n_test']:,} test rows"
    value, between = score["value"], f"95 % interval {score['low']} to {score['high']}"
    labels = f"{result.get('labels_scored')} of {len(result['classes'])} labels"
    constant = f"{chance} for the best constant answer"
    said = {
        "multilabel": f"has a macro mAP of {value} % over {labels} on {rows} ({between}; chance {chance})",
        "regression": f"is wrong by {value} (RMSE) on {rows} ({between}; {constant})",
        "vqa": f"has a VQA accuracy of {value} % on {rows} ({between}; {_levels(result)})",
        "ordinal": f"has a quadratic-weighted kappa of {value} on {rows} ({between}; chance 0)",
    }.get(result["type"])
    if said is None:
        guessing = f"chance {chance}, majority {told(result['majority'], metric)}"
        said = f"is right on {value} % of {rows} ({between}; {guessing})"
    text = f"The {result['best']} head, chosen on the inner rows, {said}"
    versus = best.get("vs_best_single")
    if versus is None or versus["low"] is None:
        return text + "."
    verdict = "better than" if versus["low"] > 0 else "worse than" if versus["high"] < 0 else "not told from"
    diff, low, high = (told(versus[key], metric, "+") for key in ("diff", "low", "high"))
    gain = f"that is {diff} points" if metric in SHARES else f"a gain of {diff}"
    if few := no_verdict(result):
        return text + f"; {gain} over the best single modality, {versus['against']}: {few}."
    return text + f"; {gain} ({low} to {high}), {verdict} the best single modality, {versus['against']}."


def _levels(result: Mapping[str, Any]) -> str:
    """What the best constant answer scores, and what the best answers of the vocabulary would."""
    levels = [told(result.get(name), "vqa_accuracy") for name in ("majority", "ceiling")]
    return f"{levels[0]} for the best constant answer, {levels[1]} for the best of the vocabulary"


def told(value: float | None, metric: str, sign: str = "") -> str:
    """A score in words: shares as percents, others with three or four digits."""
    if value is None:
        return "undefined"
    if metric in SHARES:
        return f"{100 * value:{sign}.1f}"
    return f"{value:{sign}.4g}" if metric == "rmse" else f"{value:{sign}.3f}"


def write_predictions(
    folder: Path,
    task: Task,
    rows: Rows,
    targets: Any,
    chosen: Ints,
    p: Mapping[str, Floats],
    more: Mapping[str, Any] | None = None,
) -> None:
    """``predictions.parquet``: for each head the probabilities [n, C] on the ``chosen`` rows, for regression
    the answers, for retrieval ranks (see ``rank_columns``); every number of results.json can be made again
    from them. ``more``: further columns [n]."""
    table: dict[str, Any] = {
        "id": [rows.ids[i] for i in chosen],
        "group": [rows.groups[i] for i in chosen],
    }
    if task.type != "retrieval":
        table["target"] = _named_targets(task, targets[chosen])
    if task.type == "vqa":
        table["target_score"] = [row[row > 0].tolist() for row in targets[chosen]]
    table |= more or {}
    if task.type == "retrieval":
        table |= rank_columns(targets[chosen], p)
        p = {}
    for name, got in p.items():
        if task.type == "regression":
            table[f"{name}:prediction"] = got[:, 0]
            continue
        for c, label in enumerate(task.classes):
            if task.type != "binary" or c == 1:
                table[f"{name}:{label}"] = got[:, c]
    with temporary_beside(folder / "predictions.parquet") as temporary:
        pq.write_table(pa.table(table), temporary)


def _named_targets(task: Task, targets: Any) -> Any:
    """Targets in the table's words; of multilabel tasks a list column."""
    if task.type == "regression":
        return targets
    if task.type in ("multilabel", "vqa"):
        names = [[task.classes[c] for c in np.flatnonzero(row)] for row in targets]
        return pa.array(names, pa.list_(pa.string()))
    return [task.classes[t] for t in targets]
