"""What the report shows of single answers: curves, confusion, residuals, weights and errors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ..runs.saved import read_json
from ..tables.manifest import Rows
from .curves import confusion_section, curve_section, residual_section
from .errors import error_section
from .html import missing
from .predictions import Predictions, Unreadable, read_predictions
from .rows import rows_of, sample_of
from .weights import weight_section

__all__ = ["answer_sections"]

DRAWN = ("binary", "multiclass", "multilabel", "ordinal", "regression")
"""Types of tasks whose answers are drawn."""
GATED = 256
"""Rows whose gates are computed at most."""


def answer_sections(folder: Path, results: Mapping[str, Any]) -> str:
    """The sections of a run's recommended head; a line where they cannot be had."""
    head = str(results.get("best"))
    if results.get("type") not in DRAWN:
        return ""
    try:
        found = read_predictions(folder, results)
    except Unreadable as error:
        return "<h3>Answers</h3>" + missing(f"No curves: {error}.", "diptych finetune CONFIG")
    if head not in found.p:
        return ""
    if found.task.type == "regression":
        parts = [residual_section(found, head)]
    else:
        curves = curve_section(found, results, head, samples=_samples(folder))
        parts = [curves, confusion_section(found, head)]
    table = _table(folder, found)
    sampled = None if isinstance(table, str) else table[0].take(sample_of(table[1], GATED))
    parts.append(weight_section(folder, sampled))
    parts.append(error_section(folder, found, head, table))
    return "".join(parts)


def _samples(folder: Path) -> int:
    """Resamples of the run's own intervals."""
    try:
        return int(read_json(folder / "run.json")["bootstrap"])
    except (UserError, KeyError, TypeError, ValueError):
        return 1000


def _table(folder: Path, found: Predictions) -> tuple[Rows, dict[str, int]] | str:
    try:
        return rows_of(folder, found)
    except Unreadable as error:
        return str(error)
