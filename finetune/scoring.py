"""What a run makes of its trained heads: which one it recommends, and scores of rows that none has seen."""

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from ..configs.files import atomic_write_text
from ..pretrain.statistics import Interval
from .config import ENCODED
from .heads import kept_thresholds
from .runs.saved import read_json
from .scores.intervals import paired_intervals
from .scores.results import SHARES, headline, make_results, write_predictions
from .scores.verdict import no_verdict
from .session import Session
from .tasks.targets import Targets
from .tasks.task import Floats, Ints, Task, higher_is_better
from .tasks.thresholds import has_thresholds

__all__ = [
    "choose",
    "evaluate",
    "fusion_gain",
    "named_thresholds",
    "rechosen",
    "threshold_facts",
    "write_run",
]

Json = dict[str, Any]


def choose(task: Task, inner: Mapping[str, Mapping[str, float]], singles: Collection[str]) -> tuple[str, str]:
    """The recommended head and the best single modality, both by the inner rows alone. ``singles``: names of
    the heads that read one modality."""
    sign = 1 if higher_is_better(task.primary) else -1

    def score(name: str) -> tuple[float, float]:
        return sign * inner[name][task.primary], -inner[name]["loss"]

    if task.type == "retrieval":  # the baseline is what the encoders do by themselves
        return max(
            (name for name in inner if name != "zero_shot"), key=score, default="zero_shot"
        ), "zero_shot"
    fused = [name for name in inner if name not in singles] or list(inner)
    return max(fused, key=score), max((name for name in inner if name in singles), key=score)


def write_run(session: Session, heads: list[str], best: str) -> None:
    """run.json: what a prediction needs beside heads and encoders."""
    data = session.config.data
    document = {
        "task": session.task.type,
        "makes_negatives": session.task.negatives is not None,
        "classes": list(session.task.classes),
        "target": session.config.task.target,
        "modalities": {
            k: m.model_dump(mode="json", exclude_defaults=True) for k, m in data.modalities.items()
        },
        "separator": session.config.task.separator,
        "id": data.id,
        "group": data.group,
        "bootstrap": session.config.eval.bootstrap,
        "widths": session.widths,
        "token_widths": session.token_widths,
        "pooled": session.pooled,
        "max_pixels": data.max_pixels,
        "heads": heads,
        "keys": {name: read_json(session.head_folder(name) / "head.json")["key"] for name in heads},
        "best": best,
        "thresholds": {name: kept_thresholds(session, name) for name in heads},
        "encoder_sha256": session.fingerprint,
    }
    atomic_write_text(session.folder / "run.json", json.dumps(document, indent=1) + "\n")


def threshold_facts(session: Session, limits: Mapping[str, list[float]]) -> Json:
    """``threshold`` of results.json: ``eval.threshold`` and what it comes to, per head and label; empty for
    tasks without thresholds."""
    if not has_thresholds(session.task.type):
        return {}
    heads = {name: named_thresholds(session.task, values) for name, values in limits.items()}
    return {"threshold": {"setting": session.config.eval.threshold, "heads": heads}}


def named_thresholds(task: Task, limits: Sequence[float]) -> dict[str, float]:
    """Thresholds by label; of binary tasks that of the positive one."""
    return dict(zip(task.classes[-len(limits) :], limits, strict=True))


def evaluate(
    session: Session,
    rows: Ints,
    targets: Targets,
    p: Mapping[str, Floats],
    said: Mapping[str, Floats],
    documents: Mapping[str, Json],
    *,
    best: str,
    single: str,
    more: Mapping[str, Any] | None = None,
) -> Json:
    """Scores of test rows with intervals, and what is told with them; writes predictions.parquet.

    rows: numbers [n], a row once per repeat; targets: theirs [n]; p: probabilities [n, C] per head; said:
    what is said of them (see ``thresholds.decided``); documents: what head.json holds, per head; more:
    further columns of the predictions.
    """
    task, config = session.task, session.config
    groups = [session.rows.groups[i] for i in rows]
    scores, gains = paired_intervals(
        targets,
        p,
        task.metrics,
        groups,
        task=task,
        said=said,
        against=single,
        samples=config.eval.bootstrap,
    )
    everything = np.arange(len(rows))
    write_predictions(session.folder, task, session.rows.take(rows), targets, everything, p, more)
    result = make_results(task, documents, scores, gains, targets, p, best=best, single=single)
    result |= {
        "target": config.task.target,
        "n_test": len(set(rows.tolist())),
        "n_test_groups": len(set(groups)),
        "checkpoint": config.model.name,
        "encoder_sha256": session.fingerprint,
    }
    if task.negatives is not None:
        result["note"] = _made_note(config.task.negatives, result)
    gain = fusion_gain(result)
    told: Json = {"headline": headline(result)} | ({"fusion_gain": gain} if gain else {})
    return {"task": config.name} | told | result


def _made_note(negatives: int, result: Mapping[str, Any]) -> str:
    """What the made pairs of a matching task mean for its scores, and a check that they do."""
    alone = [
        f"{name} {value:.3f}"
        for name in ENCODED
        if (value := result["heads"][name]["metrics"]["auroc"]["value"]) is not None
    ]
    share = "half" if negatives == 1 else f"{negatives} of {negatives + 1}"
    return (
        f"Of these rows {share} were made: each picture with the text of another. Either modality alone is "
        f"at chance by construction, an AUROC of 0.5; found: {', '.join(alone)}."
    )


def rechosen(session: Session, rows: Ints, targets: Targets, p: Floats, single: Floats) -> Json:
    """Score and gain of answers [n, C] that several heads gave, each in the folds that chose it, over those
    of the single modalities that were chosen so; the first metric, which tells whether p are probabilities or
    what is said (see ``thresholds.decided``)."""
    metric = session.task.metrics[0]
    groups = [session.rows.groups[i] for i in rows]
    scores, gains = paired_intervals(
        targets,
        {"chosen": p, "single": single},
        [metric],
        groups,
        task=session.task,
        against="single",
        samples=session.config.eval.bootstrap,
    )
    told = {key: _plain(one) for key, one in (("score", scores["chosen"][metric]), ("gain", gains["chosen"]))}
    return {"metric": metric, **told}


def _plain(interval: Interval) -> dict[str, float | None]:
    """An interval for JSON, which has no NaN."""
    return {key: value if value == value else None for key, value in interval.as_dict().items()}


def fusion_gain(result: Mapping[str, Any]) -> Json | None:
    """The recommended head's gain over the best single modality, with one sentence, which tells no
    interval of too few groups; None where nothing was fused, or where the metric is undefined."""
    versus = result["heads"][result["best"]].get("vs_best_single")
    values = [] if versus is None else [versus[key] for key in ("diff", "low", "high")]
    if versus is None or any(value is None for value in values):
        return None
    if versus["metric"] in SHARES:
        of = f"points of {versus['metric']}"
        diff, low, high = (f"{100 * value:+.1f}" for value in values)
    else:
        of = versus["metric"]
        diff, low, high = (f"{value:+.4g}" for value in values)
    between = no_verdict(result) or f"95 % interval {low} to {high}"
    over = f"Fusion gain over the best single modality ({versus['against']})"
    if result["type"] == "retrieval":
        over = "Gain over zero-shot"
    text = f"{over}: {diff} {of} ({between}), head {result['best']}."
    return {"head": result["best"]} | dict(versus) | {"text": text}
