"""The report's section of a retrieval task: all metrics of every head beside chance."""

from collections.abc import Mapping
from typing import Any

from ..scores.retrieval_results import gallery_words
from ..tasks.metrics import UNITS
from .html import number, percent, plain, score_cell, table, text

__all__ = ["retrieval_section"]

ABOUT = (
    "R@K is the hit rate: the share of queries with at least one match among their K nearest. Every distinct "
    "picture or text of the test rows that has a match is a query once, and all of them are the gallery. "
    "Chance is that of a random order of the same galleries, and of median ranks the median."
)


def retrieval_section(results: Mapping[str, Any]) -> str:
    """The table of both ways; nothing for other tasks."""
    chances, heads = results.get("chances"), results.get("heads")
    if results.get("type") != "retrieval" or not isinstance(chances, dict) or not isinstance(heads, dict):
        return ""
    rows: list[list[Any]] = []
    for metric, chance in chances.items():
        share = metric not in UNITS
        level = number(chance)
        shown = (percent if share else plain)(level) if level == level else "-"
        scores = [score_cell(head.get("metrics", {}).get(metric), share=share) for head in heads.values()]
        rows.append([metric.replace("_", " "), *scores, shown])
    about = f"Among {gallery_words(results)}. {ABOUT}"
    return f'<h3>Retrieval</h3><p class="soft">{text(about)}</p>' + table(
        "", ["metric", *heads, "chance"], rows
    )
