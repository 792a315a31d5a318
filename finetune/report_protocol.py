"""In words: on what a fine-tuning run was scored, how often its test split was looked at, and from which
probabilities on labels are said."""

from collections.abc import Mapping
from typing import Any

__all__ = ["looks_note", "protocol_note", "threshold_note"]

Json = Mapping[str, Any]
SHOWN = 8  # labels whose thresholds are told


def protocol_note(results: Json) -> str:
    """One sentence on which rows the scores are of; empty for results that do not say."""
    cv, holdout = _mapping(results.get("cv")), _mapping(results.get("holdout"))
    if holdout:
        beside = _mapping(holdout.get("cv"))
        if beside.get("rows") == "without_test":
            return "Scored on the held-out test split, which the cross-validation of this config leaves out."
        return (
            "Scored on the held-out test split, whose rows stand in the folds of this config's "
            "cross-validation too (eval.cv.rows: all): what was chosen by it has seen them."
        )
    if cv:
        folds = f"Scored by cross-validation, {cv.get('folds')} folds"
        if cv.get("rows") == "without_test":
            return f"{folds} without the rows of the test split, which diptych finetune --holdout scores."
        return f"{folds} of all rows."
    return "Scored on the fixed test split." if "test_looks" in results else ""


def looks_note(results: Json) -> str:
    """One sentence on how often the test split was looked at; empty where there is none."""
    looks = results.get("test_looks")
    if not isinstance(looks, int):
        return ""
    if looks == 1:
        return "Its rows have been looked at once in this folder: these are the first models scored on them."
    return (
        f"Its rows have been looked at {looks} times in this folder, by models that differ "
        "(test_looks.jsonl): whatever was changed because of earlier scores makes these too hopeful."
    )


def threshold_note(results: Json) -> str:
    """One sentence on the thresholds of the recommended head; empty for tasks without them."""
    threshold = _mapping(results.get("threshold"))
    limits = _mapping(_mapping(threshold.get("heads")).get(str(results.get("best"))))
    if not limits:
        return ""
    if threshold.get("setting") != "auto":
        return f"A label is said from a probability of {threshold.get('setting')} on (eval.threshold)."
    labels = [f"{name} {value:.3f}" for name, value in list(limits.items())[:SHOWN]]
    more = f" and {len(limits) - SHOWN} more labels" if len(limits) > SHOWN else ""
    fold = "; every fold's own are in results.json" if results.get("folds") else ""
    return (
        f"The {results.get('best')} head says a label from these probabilities on, which have the "
        f"greatest F1 on the inner rows: {', '.join(labels)}{more}{fold}."
    )


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
