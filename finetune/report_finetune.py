"""The report's sections of a fine-tuning run: the fusion heads beside each other."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .report_charts import interval_bar
from .report_html import Html, cell, count, interval, missing, number, percent, score_cell, table, text, tile

__all__ = ["finetune_sections", "finetune_tiles"]

Json = Mapping[str, Any]
SINGLE = ("image", "text")
GAIN = (
    "Gain: paired difference to the best single modality on the same rows; a head is better only if the "
    "interval of its gain leaves out 0. The tinted head was chosen without the test rows."
)


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _primary(heads: Json) -> str | None:
    """The metric that all heads have: accuracy where there is one, else the first."""
    metrics = [list(_mapping(_mapping(head).get("metrics"))) for head in heads.values()]
    common = [m for m in (metrics[0] if metrics else []) if all(m in other for other in metrics)]
    return "accuracy" if "accuracy" in common else (common[0] if common else None)


def _ranked(heads: Json, metric: str) -> list[str]:
    """Names of the heads, best first by the metric; those without a number last."""

    def value(name: str) -> float:
        got = number(_mapping(_mapping(heads[name].get("metrics")).get(metric)).get("value"))
        return got if got == got else float("-inf")

    lower_is_better = metric in ("rmse", "mae", "brier", "ece", "loss")
    return sorted(heads, key=lambda name: value(name) if lower_is_better else -value(name))


def _selected(heads: Json, metric: str, results: Json) -> str | None:
    """The head that the run chose on its inner split; only without one the best fused head of the table."""
    if results.get("best") in heads:
        return str(results["best"])
    return next((name for name in _ranked(heads, metric) if name not in SINGLE), None)


def finetune_tiles(results: Json) -> list[str]:
    """Headline numbers: the best fused head and each single modality."""
    heads = {name: _mapping(head) for name, head in _mapping(results.get("heads")).items()}
    metric = _primary(heads)
    if metric is None:
        return []
    best = _selected(heads, metric, results)
    tiles: list[str] = []
    for name in [best, *(n for n in SINGLE if n in heads and n != best)]:
        if name is None:
            continue
        score = dict(_mapping(heads[name]["metrics"][metric]))
        score |= {k: results[k] for k in ("chance", "majority") if metric == "accuracy" and k in results}
        what = f"{name} alone" if name in SINGLE else f"fused: {name}"
        tiles.append(tile(f"{metric}, {what}", score, f"{count(results.get('n_test'))} test rows"))
    return tiles


def finetune_sections(folder: Path, results: Json) -> str:
    """The fusion table and what it says."""
    heads = {name: _mapping(head) for name, head in _mapping(results.get("heads")).items()}
    metric = _primary(heads)
    if metric is None:
        return "<h2>Fusion</h2>" + missing(
            "No results.json yet:", f"diptych finetune {folder / 'config.yaml'}"
        )
    parts = [f"<h2>Fusion on {text(results.get('task', 'the task'))}</h2>"]
    if results.get("headline"):
        parts.append(f"<p>{text(results['headline'])}</p>")
    rows = f"{count(results.get('n_train'))} training rows, {count(results.get('n_test'))} test rows."
    parts.append(f'<p class="soft">{rows} {GAIN}</p>')
    parts.append(_fusion_table(heads, metric, results))
    return "".join(parts)


def _fusion_table(heads: dict[str, dict[str, Any]], metric: str, results: Json) -> str:
    ranked = _ranked(heads, metric)
    scores = [_mapping(heads[name]["metrics"][metric]) for name in ranked]
    values = [number(s.get(k)) for s in scores for k in ("low", "high")]
    known = [v for v in values if v == v]
    chance = number(results.get("chance")) if metric == "accuracy" else float("nan")
    known += [chance] if chance == chance else []
    limits = (min(known) - 0.02, max(known) + 0.02) if known else (0.0, 1.0)
    others = [m for m in _mapping(heads[ranked[0]].get("metrics")) if m != metric][:2]
    rows: list[list[Any]] = []
    for name, score in zip(ranked, scores, strict=True):
        head = heads[name]
        kind = " / ".join(str(head[k]) for k in ("stage", "level", "op") if head.get(k))
        ends = (number(score.get(k)) for k in ("value", "low", "high"))
        reference = chance if chance == chance else None
        rows.append(
            [
                cell(name, kind),
                score_cell(score),
                Html(interval_bar(*ends, reference=reference, limits=limits)),
                _gain(head),
                *(score_cell(_mapping(head.get("metrics")).get(m)) for m in others),
                count(head.get("params")),
                f"{number(head.get('seconds')):.1f} s" if number(head.get("seconds")) >= 0 else "-",
            ]
        )
    head_row = ["head", metric, "interval; dashes: chance", "gain over best single", *others]
    chosen = _selected(heads, metric, results)
    best = ranked.index(chosen) if chosen is not None else None
    return table("", [*head_row, "parameters", "time"], rows, best=best)


def _gain(head: Json) -> Html:
    versus = _mapping(head.get("vs_best_single"))
    diff = number(versus.get("diff"))
    if diff != diff:
        return Html("-")
    low, high = number(versus.get("low")), number(versus.get("high"))
    kind = "good" if low > 0 else "bad" if high < 0 else ""
    sign = "+" if diff > 0 else ""
    against = f" against {text(versus['against'])}" if versus.get("against") else ""
    return Html(
        f'<span class="{kind}">{sign}{percent(diff)}</span><small>{interval(versus)}{against}</small>'
    )
