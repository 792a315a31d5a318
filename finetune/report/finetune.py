"""The report's sections of a fine-tuning run: the fusion heads beside each other."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..scores.verdict import no_verdict
from ..tasks.metrics import UNITS, higher_is_better
from .charts import Series, interval_bar, line_chart
from .html import (
    Html,
    cell,
    count,
    interval,
    mapping,
    missing,
    number,
    percent,
    plain,
    score_cell,
    table,
    text,
    tile,
)
from .protocol import protocol_note, threshold_note
from .retrieval import retrieval_section

__all__ = ["finetune_sections", "finetune_tiles"]

Json = Mapping[str, Any]
BEST_SINGLE = "the best single modality"
GAIN = (
    "Gain: paired difference to {over} on the same rows, positive where the head is "
    "better; a head is better only if the interval of its gain leaves out 0. The tinted head was chosen "
    "without the test rows."
)


def _single(head: Json) -> bool:
    """Whether a head reads one modality alone."""
    return head.get("stage") == "single"


def _primary(heads: Json) -> str | None:
    """The first metric that all heads have."""
    metrics = [list(mapping(mapping(head).get("metrics"))) for head in heads.values()]
    common = [m for m in (metrics[0] if metrics else []) if all(m in other for other in metrics)]
    return common[0] if common else None


def _ranked(heads: Json, metric: str) -> list[str]:
    """Names of the heads, best first by the metric; those without a number last."""

    def value(name: str) -> float:
        got = number(mapping(mapping(heads[name].get("metrics")).get(metric)).get("value"))
        return sign * got if got == got else float("-inf")

    sign = 1 if higher_is_better(metric) else -1
    return sorted(heads, key=lambda name: -value(name))


def _selected(heads: Json, metric: str, results: Json) -> str | None:
    """The head that the run chose on its inner split; only without one the best fused head of the table."""
    if results.get("best") in heads:
        return str(results["best"])
    return next((name for name in _ranked(heads, metric) if not _single(heads[name])), None)


def finetune_tiles(results: Json) -> list[str]:
    """Headline numbers: the best fused head and each single modality."""
    heads = {name: mapping(head) for name, head in mapping(results.get("heads")).items()}
    metric = _primary(heads)
    if metric is None:
        return []
    best = _selected(heads, metric, results)
    tiles: list[str] = []
    for name in [best, *(n for n in heads if (_single(heads[n]) or n == "zero_shot") and n != best)]:
        if name is None:
            continue
        score = dict(mapping(heads[name]["metrics"][metric]))
        levels = ("chance", "majority") if metric == "accuracy" else ("chance",)
        score |= {k: results[k] for k in levels if k in results}
        kind = "head" if results.get("type") == "retrieval" else "fused"
        what = f"{name} alone" if _single(heads[name]) else f"{kind}: {name}"
        note = f"{count(results.get('n_test'))} test rows"
        tiles.append(tile(f"{metric}, {what}", score, note, share=metric not in UNITS))
    return tiles


def finetune_sections(folder: Path, results: Json, epochs: Sequence[Json] = ()) -> str:
    """The fusion table and what it says; ``epochs``: the lines of metrics.jsonl."""
    heads = {name: mapping(head) for name, head in mapping(results.get("heads")).items()}
    metric = _primary(heads)
    if metric is None:
        return "<h2>Fusion</h2>" + missing(
            "No results.json yet:", f"diptych finetune {folder / 'config.yaml'}"
        )
    parts = [f"<h2>Fusion on {text(results.get('task', 'the task'))}</h2>"]
    if results.get("headline"):
        parts.append(f"<p>{text(results['headline'])}</p>")
    for note in (results.get("note"), protocol_note(results), threshold_note(results)):
        parts.append(f"<p>{text(note)}</p>" if note else "")
    rows = f"{count(results.get('n_train'))} training rows, {count(results.get('n_test'))} test rows."
    over = "zero-shot, the encoders as they were," if results.get("type") == "retrieval" else BEST_SINGLE
    parts.append(f'<p class="soft">{rows} {GAIN.format(over=over)}</p>')
    parts.append(_fusion_table(heads, metric, results))
    parts.append(retrieval_section(results))
    chosen = _selected(heads, metric, results)
    charts = _reliability(heads, chosen, results)
    if chosen is not None:
        charts += training_charts(epochs, chosen)
    parts.append(f'<div class="charts">{charts}</div>' if charts else "")
    return "".join(parts)


def _fusion_table(heads: dict[str, dict[str, Any]], metric: str, results: Json) -> str:
    ranked = _ranked(heads, metric)
    scores = [mapping(heads[name]["metrics"][metric]) for name in ranked]
    values = [number(s.get(k)) for s in scores for k in ("low", "high")]
    known = [v for v in values if v == v]
    chance = number(results.get("chance"))
    known += [chance] if chance == chance else []
    share = metric not in UNITS
    edge = 0.02 if share or not known else 0.05 * (max(known) - min(known))
    limits = (min(known) - edge, max(known) + edge) if known else (0.0, 1.0)
    others = [m for m in mapping(heads[ranked[0]].get("metrics")) if m != metric][:2]
    rows: list[list[Any]] = []
    for name, score in zip(ranked, scores, strict=True):
        head = heads[name]
        kind = " / ".join(str(head[k]) for k in ("stage", "level", "op") if head.get(k))
        ends = (number(score.get(k)) for k in ("value", "low", "high"))
        reference = chance if chance == chance else None
        rows.append(
            [
                cell(name, kind),
                score_cell(score, share=share),
                Html(interval_bar(*ends, reference=reference, limits=limits)),
                _gain(head, results, share=share),
                *(score_cell(mapping(head.get("metrics")).get(m), share=m not in UNITS) for m in others),
                count(head.get("params")),
                f"{number(head.get('seconds')):.1f} s" if number(head.get("seconds")) >= 0 else "-",
            ]
        )
    over = "zero-shot" if results.get("type") == "retrieval" else "best single"
    head_row = ["head", metric, "interval; dashes: chance", f"gain over {over}", *others]
    chosen = _selected(heads, metric, results)
    best = ranked.index(chosen) if chosen is not None else None
    return table("", [*head_row, "parameters", "time"], rows, best=best)


def _reliability(heads: dict[str, dict[str, Any]], chosen: str | None, results: Json) -> str:
    """Confidence against what was right, of the chosen head."""
    found = heads[chosen].get("reliability") if chosen is not None else None
    bins = [mapping(b) for b in found] if isinstance(found, list) else []
    if not bins:
        return ""
    points = [(number(b.get("confidence")), number(b.get("accuracy"))) for b in bins]
    labels = results.get("type") == "multilabel"
    return line_chart(
        f"Reliability of {chosen}: {'share of rows with the label' if labels else 'share that is right'}",
        [
            Series(str(chosen), [x for x, _ in points], [y for _, y in points], marked=True),
            Series("calibrated", [0.0, 1.0], [0.0, 1.0], dashed=True),
        ],
        x_name="probability of the label" if labels else "confidence",
        from_zero=True,
    )


def _gain(head: Json, results: Json, *, share: bool) -> Html:
    versus = mapping(head.get("vs_best_single"))
    diff = number(versus.get("diff"))
    if diff != diff:
        return Html("-")
    low, high = number(versus.get("low")), number(versus.get("high"))
    few = no_verdict(results)
    kind = "" if few else "good" if low > 0 else "bad" if high < 0 else ""
    sign = "+" if diff > 0 else ""
    against = f" against {text(versus['against'])}" if versus.get("against") else ""
    return Html(
        f'<span class="{kind}">{sign}{(percent if share else plain)(diff)}</span>'
        f"<small>{few or interval(versus, share=share)}{against}</small>"
    )


def training_charts(rows: Sequence[Json], head: str) -> str:
    """Loss and the chosen metric per epoch of the head that is kept: the mean over its seeds."""
    own = [row for row in rows if row.get("kind") == head and "fold" not in row]
    named = (key for row in own for key in row if key.startswith("inner_") and key != "inner_loss")
    known = list(dict.fromkeys(named))
    metric = "auroc" if "inner_auroc" in known else known[0].removeprefix("inner_") if known else ""
    found: dict[str, dict[int, list[float]]] = {}
    for row in own:
        for key in ("loss", "inner_loss", f"inner_{metric}"):
            value = row.get(key)
            if isinstance(value, int | float) and isinstance(row.get("epoch"), int):
                found.setdefault(key, {}).setdefault(row["epoch"], []).append(float(value))

    def series(key: str, name: str) -> Series:
        means = sorted((epoch, sum(values) / len(values)) for epoch, values in found.get(key, {}).items())
        return Series(name, [float(e + 1) for e, _ in means], [v for _, v in means], marked=len(means) < 30)

    losses = [series("loss", "training rows"), series("inner_loss", "inner rows")]
    return line_chart(f"Loss of {head}", losses, x_name="epochs") + line_chart(
        f"{metric} of {head} on the inner rows", [series(f"inner_{metric}", metric)], x_name="epochs"
    )
