"""The report's table of a fine-tuning run's score with modalities missing."""

from collections.abc import Mapping
from typing import Any

from ..tasks.metrics import UNITS
from .html import Html, interval, number, percent, plain, score_cell, table, text

__all__ = ["missing_section"]

ABOUT = (
    "A column's rate is the share of test rows with several modalities that lose one. Where one is seen "
    "alone, rows that lose it are answered by what else they have. Below each score its 95 % interval, and "
    "the paired difference to the score with everything that is there."
)


def missing_section(results: Mapping[str, Any]) -> str:
    """Score of the recommended head by what is seen and how much is missing; nothing for runs without it."""
    found = results.get("missing")
    cells = found.get("cells") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(cells, list):
        return ""
    metric = str(found.get("metric"))
    share = metric not in UNITS
    lines: dict[str, list[Any]] = {}
    rates: dict[float, None] = {}
    for cell in (cell for cell in cells if isinstance(cell, dict)):
        rates[number(cell.get("rate"))] = None
        seen = str(cell.get("seen"))
        name = seen if seen in ("both", "all") else f"{seen} alone"
        lines.setdefault(name, []).append(_score(cell, metric, share=share))
    if not lines:
        return ""
    rows = [[name, *scores] for name, scores in lines.items()]
    about = f"{text(metric)} of {text(found.get('head'))}. {text(ABOUT)}"
    head = ["seen", *(f"{100 * rate:.0f} % missing" for rate in rates)]
    return f'<h3>Missing modalities</h3><p class="soft">{about}</p>' + table("", head, rows)


def _score(cell: Mapping[str, Any], metric: str, *, share: bool) -> Html:
    metrics, diff = cell.get("metrics"), cell.get("diff")
    score = score_cell(metrics.get(metric) if isinstance(metrics, dict) else None, share=share)
    value = number(diff.get("value")) if isinstance(diff, dict) else float("nan")
    if not isinstance(diff, dict) or value != value:
        return score
    sign = "+" if value > 0 else ""
    shown = (percent if share else plain)(value)
    return Html(f"{score}<small>{sign}{shown} ({interval(diff, share=share)})</small>")
