"""The report's headline of a fine-tuning run, the fusion gain, and the table of its cross-validation."""

from collections.abc import Mapping, Sequence
from typing import Any

from ..scores.results import SHARES
from ..scores.verdict import no_verdict
from .html import count, mapping, number, table, text

__all__ = ["fold_section", "gain_tile"]

Json = Mapping[str, Any]
SPREAD = (
    "Scores of single folds show how much they differ. Folds share most of their training rows, so their "
    "spread is no interval; the intervals above come from resampling groups of out-of-fold rows."
)


def gain_tile(results: Json) -> list[str]:
    """The fusion gain over the best single modality, with its interval; nothing for runs without one."""
    gain = results.get("fusion_gain")
    if not isinstance(gain, dict):
        return []
    diff, low, high = (number(gain.get(key)) for key in ("diff", "low", "high"))
    points = gain.get("metric") in SHARES
    shown = [f"{100 * v:+.1f}" if points else f"{v:+.4g}" for v in (diff, low, high)]
    known = f"95 % interval {shown[1]} to {shown[2]}" if low == low and high == high else ""
    lines = [no_verdict(results) or known]
    lines.append(f"{'points of ' if points else ''}{gain.get('metric')}, {gain.get('head')}")
    below = "".join(f"<span>{text(line)}</span>" for line in lines if line)
    name = f"fusion gain over {gain.get('against')} alone"
    if results.get("type") == "retrieval":
        name = "gain over zero-shot"
    return [f'<div class="tile"><span class="name">{text(name)}</span><b>{shown[0]}</b>{below}</div>']


def fold_section(results: Json) -> str:
    """The fold table of a cross-validation; nothing for runs on fixed splits."""
    folds = [fold for fold in _list(results.get("folds")) if isinstance(fold, dict)]
    spread, heads = mapping(results.get("spread")), mapping(results.get("heads"))
    if not folds or not heads:
        return ""
    metric, names = str(folds[0].get("metric")), [str(name) for name in heads]
    points = metric in SHARES

    def shown(value: Any, sign: str = "") -> str:
        got = number(value)
        if got != got:
            return "-"
        return f"{100 * got:{sign}.1f}" if points else f"{got:{sign}.3f}"

    def line(title: str, tested: str, values: Sequence[Any], gain: Any) -> list[Any]:
        return [title, tested, *(shown(value) for value in values), shown(gain, "+")]

    rows = [
        line(
            f"repeat {fold.get('repeat')}, fold {fold.get('fold')}",
            f"{count(fold.get('n_test'))} rows, {count(fold.get('n_test_groups'))} groups",
            [mapping(fold.get("scores")).get(name) for name in names],
            fold.get("gain"),
        )
        for fold in folds
    ]
    for title, key in (("mean", "mean"), ("standard deviation", "sd"), ("least", "min"), ("greatest", "max")):
        rows.append(line(title, "", [mapping(spread.get(name)).get(key) for name in names], None))
    unit = f"{metric}, in percent" if points else metric
    head = ["fold", "tested", *names, "gain"]
    against = f"gain: {text(results.get('best'))} over {text(results.get('best_single'))}"
    about = f"{text(unit)}; {against}. {text(SPREAD)}"
    return f'<h3>Folds</h3><p class="soft">{about}</p>' + table("", head, rows)


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
