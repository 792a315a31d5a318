"""In words: on what a fine-tuning run was scored, how often its test split was looked at, and from which
probabilities on labels are said."""

from collections.abc import Mapping
from typing import Any

from .html import mapping

__all__ = ["protocol_note", "threshold_note"]

Json = Mapping[str, Any]
SHOWN = 8  # labels whose thresholds are told


def protocol_note(results: Json) -> str:
    """On which rows the scores are, and how often these were looked at; empty for results that do not say."""
    cv = mapping(results.get("cv"))
    if cv:
        folds = f"Scored by cross-validation, {cv.get('folds')} folds"
        if cv.get("rows") == "without_test":
            return f"{folds} without the rows of the test split, which diptych finetune --holdout scores."
        return f"{folds} of all rows."
    if "test_looks" not in results:
        return ""
    beside = mapping(mapping(results.get("holdout")).get("cv"))
    kind = "held-out" if beside else "fixed"
    text = f"Scored on the {kind} test split, {_looks(results['test_looks'])}."
    if not beside:
        return text
    if beside.get("rows") == "without_test":
        return f"{text} The cross-validation of this config leaves its rows out."
    return (
        f"{text} The cross-validation of this config has its rows in the folds too (eval.cv.rows: all): what "
        "was chosen by it has seen them."
    )


def _looks(looks: Any) -> str:
    if looks == 1:
        return "the first time in this folder"
    return (
        f"set of models number {looks} of this folder (test_looks.jsonl): what was changed because of "
        "earlier scores makes these too hopeful"
    )


def threshold_note(results: Json) -> str:
    """The thresholds of the recommended head; empty for tasks without them and for one half."""
    threshold = mapping(results.get("threshold"))
    limits = mapping(mapping(threshold.get("heads")).get(str(results.get("best"))))
    if not limits or threshold.get("setting") == 0.5:
        return ""
    if threshold.get("setting") != "auto":
        return f"A label is said from a probability of {threshold.get('setting')} on (eval.threshold)."
    labels = [f"{name} {value:.3f}" for name, value in list(limits.items())[:SHOWN]]
    more = f" and {len(limits) - SHOWN} more labels" if len(limits) > SHOWN else ""
    fold = "; every fold's own are in results.json" if results.get("folds") else ""
    return (
        f"The {results.get('best')} head says a label from these probabilities on, which have the greatest "
        f"F1 on the inner rows: {', '.join(labels)}{more}{fold}."
    )
