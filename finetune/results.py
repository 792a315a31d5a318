"""What a run leaves: results.json with scores beside chance, gains over the best single modality and one
sentence; and the predictions they were made from."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..configs.files import temporary_beside
from ..pretrain.statistics import Interval
from .config import SINGLE
from .manifest import Rows
from .tasks import Floats, Ints, Task

__all__ = ["headline", "make_results", "write_predictions"]


def make_results(
    task: Task,
    documents: Mapping[str, Mapping[str, Any]],
    scores: Mapping[str, Mapping[str, Interval]],
    gains: Mapping[str, Interval],
    targets: Ints,
    *,
    best: str,
    single: str,
) -> dict[str, Any]:
    """``heads``: per head its kind, size, time, inner scores, test metrics with intervals and gain over the
    single modality ``single`` on the first metric; ``best``, ``best_single``, ``chance``, ``majority``."""
    heads: dict[str, Any] = {}
    for name, document in documents.items():
        made: dict[str, Any] = {
            key: document[key] for key in ("stage", "level", "params", "seconds", "inner")
        }
        made |= {"op": document["config"]["op"], "method": document["adapt"]["method"]}
        made |= {"seeds": [seed["seed"] for seed in document["seeds"]]}
        made["metrics"] = {metric: _plain(interval) for metric, interval in scores[name].items()}
        if name in gains and name not in SINGLE:
            gain = gains[name]
            versus = {"diff": gain.value, "low": gain.low, "high": gain.high, "against": single}
            made["vs_best_single"] = versus | {"metric": task.metrics[0]}
        heads[name] = made
    majority = float(np.bincount(targets).max() / len(targets))
    return {
        "type": task.type,
        "classes": list(task.classes),
        "heads": heads,
        "best": best,
        "best_single": single,
        "chance": 1 / len(task.classes),
        "majority": majority,
    }


def _plain(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON, which has no NaN."""
    return {k: v if v == v else None for k, v in interval.as_dict().items()}


def headline(result: Mapping[str, Any]) -> str:
    """One sentence on the recommended head."""
    best = result["heads"][result["best"]]
    score = {key: 100 * value for key, value in best["metrics"]["accuracy"].items()}
    guessing = f"chance {100 * result['chance']:.1f}, majority {100 * result['majority']:.1f}"
    text = (
        f"The {result['best']} head, chosen on the inner rows, is right on {score['value']:.1f} % of "
        f"the {result['n_test']:,} test rows (95 % interval {score['low']:.1f} to {score['high']:.1f}; "
        f"{guessing})"
    )
    versus = best.get("vs_best_single")
    if versus is None:
        return text + "."
    verdict = "better than" if versus["low"] > 0 else "worse than" if versus["high"] < 0 else "not told from"
    return text + (
        f"; that is {100 * versus['diff']:+.1f} points ({100 * versus['low']:+.1f} to "
        f"{100 * versus['high']:+.1f}), {verdict} the best single modality, {versus['against']}."
    )


def write_predictions(
    folder: Path, task: Task, rows: Rows, targets: Ints, chosen: Ints, p: Mapping[str, Floats]
) -> None:
    """``predictions.parquet``: for each head the probabilities [n, C] on the ``chosen`` rows; every number of
    results.json can be made again from them."""
    table: dict[str, Any] = {
        "id": [rows.ids[i] for i in chosen],
        "group": [rows.groups[i] for i in chosen],
        "target": [task.classes[t] for t in targets[chosen]],
    }
    for name, got in p.items():
        for c, label in enumerate(task.classes):
            if task.type == "multiclass" or c == 1:
                table[f"{name}:{label}"] = got[:, c].astype(np.float32)
    with temporary_beside(folder / "predictions.parquet") as temporary:
        pq.write_table(pa.table(table), temporary)
