"""The report's table of the settings that a search chose."""

from collections.abc import Mapping
from typing import Any

from .html import Html, cell, count, mapping, number, plain, table, text

__all__ = ["search_section"]

ABOUT = (
    "Inner scores after a search are too hopeful: they are the best of many tries on the same few rows. Only "
    "the scores above count; they are of rows that no trial has seen. Bold settings differ from the config."
)


def search_section(results: Mapping[str, Any]) -> str:
    """What was chosen for every head and fold, and the inner score before and after; nothing for runs
    without a search."""
    found = results.get("search")
    if not isinstance(found, dict):
        return ""
    rows = [
        row
        for part, last in (("heads", False), ("final", True))
        for name, entries in mapping(found.get(part)).items()
        for row in _rows(name, entries if isinstance(entries, list) else [entries], found, last=last)
    ]
    rows += [[name, "", "none", "-", "-", "as the config says"] for name in _list(found.get("as_written"))]
    metric = text(found.get("metric"))
    about = (
        f"{count(found.get('trials'))} trials per head, the first as the config is written, each with one "
        f"seed and judged by {metric} on the inner rows. {text(ABOUT)}"
    )
    head = ["head", "", "chosen trial", f"inner {metric}, as written", "chosen", "settings"]
    return f'<h3>Search</h3><p class="soft">{about}</p>' + table("", head, rows, left=2)


def _rows(name: str, entries: list[Any], found: Mapping[str, Any], *, last: bool) -> list[list[Any]]:
    rows: list[list[Any]] = []
    for entry in map(mapping, entries):
        where = f"repeat {entry['repeat']}, fold {entry['fold']}" if "fold" in entry else ""
        scores = [plain(number(entry.get(key))) for key in ("before", "after")]
        seconds = f"{number(entry.get('seconds')):.1f} s"
        chosen = cell(f"{count(entry.get('chosen'))} of {count(found.get('trials'))}", seconds)
        rows.append([name, "all rows" if last else where, chosen, *scores, _settings(entry)])
    return rows


def _settings(entry: Mapping[str, Any]) -> Html:
    written = mapping(entry.get("written"))
    parts: list[str] = []
    for key, value in mapping(entry.get("settings")).items():
        shown = f"{text(key)}&nbsp;{text(f'{value:.3g}' if isinstance(value, float) else value)}"
        parts.append(shown if written.get(key) == value else f"<b>{shown}</b>")
    return Html(", ".join(parts))


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
