"""The report's figures of a fine-tuning run's answers: training, ROC and PR curves, confusion, residuals."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..scores.intervals import paired_intervals
from ..tasks.metrics import Floats, Ints
from ..tasks.task import Task
from .charts import Series, line_chart, scatter_chart
from .html import Html, count, percent, score_cell, table, text
from .points import pr_points, roc_points, stepped, thinned
from .predictions import Predictions

__all__ = ["confusion_section", "curve_section", "residual_section"]

DRAWN = 6
"""Curves in one figure at most, those of the most frequent classes."""
LISTED = 40
"""Classes in the table of areas at most."""
MATRIX = 20
"""Classes of a confusion matrix at most; of more the most frequent confusions are listed."""
POINTS = 1200
"""Points of a residual plot at most."""
WORK = 20_000_000
"""Rows times resamples of one class's intervals at most, but 100 resamples always."""
BINARY = Task("binary", ("rest", "class"))


def curve_section(found: Predictions, results: Mapping[str, Any], head: str, *, samples: int = 1000) -> str:
    """ROC and PR curves: of a binary task of the head and of each single modality; else of each class
    against the rest. Areas are the metrics AUROC and AP."""
    task = found.task
    if task.type == "ordinal":
        return ""
    if task.type == "binary":
        heads = results.get("heads", {})
        singles = [name for name in found.p if heads.get(name, {}).get("stage") == "single"]
        names = list(dict.fromkeys([head, *singles]))
        positive = found.targets == 1
        curves = [(name, positive, found.p[name][:, 1]) for name in names]
        rows = [_known(results, name) for name in names]
        note = f"The positive class is {task.classes[1]}. Dashes: what guessing gives."
        return _drawn("ROC and precision-recall", curves, note) + _areas("head", names, rows)
    by_size = [int(c) for c in np.argsort(-_sizes(found), kind="stable")]
    defined = [c for c in by_size if 0 < _positive(found, c).sum() < len(found.ids)]
    listed, p = defined[:LISTED], found.p[head]
    curves = [(task.classes[c], _positive(found, c), p[:, c]) for c in listed]
    rows = [_measured(found, positive, scores, samples) for _, positive, scores in curves]
    what = "label" if task.type == "multilabel" else "class"
    note = f"Each {what} of {head} against the rest"
    if len(defined) > DRAWN:
        note += f"; drawn are the {DRAWN} most frequent of {len(defined)}"
    if len(defined) > LISTED:
        note += f", listed {LISTED}"
    if undefined := len(by_size) - len(defined):
        note += f"; {undefined} without a positive or a negative row have no curve"
    title = f"ROC and precision-recall of each {what}"
    return _drawn(title, curves[:DRAWN], note + ".") + _areas(what, [c[0] for c in curves], rows)


def _sizes(found: Predictions) -> Ints:
    return np.array([_positive(found, c).sum() for c in range(len(found.task.classes))], dtype=np.int64)


def _positive(found: Predictions, c: int) -> Any:
    return found.targets[:, c] == 1 if found.task.type == "multilabel" else found.targets == c


def _drawn(title: str, curves: Sequence[tuple[str, Any, Floats]], note: str) -> str:
    roc: list[Series] = []
    pr: list[Series] = []
    shares: set[float] = set()
    for name, positive, scores in curves:
        if not 0 < positive.sum() < len(positive):
            continue
        roc.append(Series(name, *thinned(*roc_points(positive, scores))))
        pr.append(Series(name, *thinned(*stepped(*pr_points(positive, scores)))))
        shares.add(float(positive.mean()))
    if not roc:
        return ""
    guess = Series("guessing", [0.0, 1.0], [0.0, 1.0], dashed=True)
    reference = shares.pop() if len(shares) == 1 else None
    charts = line_chart(
        "ROC: true positive rate", [*roc[: DRAWN - 1], guess] if len(roc) >= DRAWN else [*roc, guess],
        x_name="false positive rate", from_zero=True,
    ) + line_chart(
        "Precision", pr, x_name="recall", from_zero=True, reference=reference, reference_name="guessing",
    )  # fmt: skip
    return f'<h3>{text(title)}</h3><p class="soft">{text(note)}</p><div class="charts">{charts}</div>'


def _known(results: Mapping[str, Any], name: str) -> list[Any]:
    """Areas that the run has measured already, with their intervals."""
    metrics = results.get("heads", {}).get(name, {}).get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    return [score_cell(metrics.get(metric)) for metric in ("auroc", "ap")]


def _measured(found: Predictions, positive: Any, scores: Floats, samples: int) -> list[Any]:
    """Areas of one class against the rest, with intervals over the groups, and its share."""
    samples = max(min(samples, 100), min(samples, WORK // max(1, len(scores))))
    p = np.stack([1 - scores, scores], axis=1)
    made, _ = paired_intervals(
        positive.astype(np.int64), {"c": p}, ("auroc", "ap"), found.groups, samples=samples
    )
    areas = [score_cell(made["c"][metric].as_dict()) for metric in ("auroc", "ap")]
    return [*areas, Html(f"{count(int(positive.sum()))}<small>{percent(float(positive.mean()))}</small>")]


def _areas(what: str, names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = [what, "AUROC, area under ROC", "AP, area under precision", "rows of it"]
    width = max((len(row) for row in rows), default=0) + 1
    return table("", head[:width], [[name, *row] for name, row in zip(names, rows, strict=True)])


def confusion_section(found: Predictions, head: str) -> str:
    """What the head said of the rows of each class; nothing for multilabel tasks."""
    task = found.task
    if task.type == "multilabel":
        return ""
    said: Ints = task.predicted(found.decided(head))
    n = len(task.classes)
    seen = np.bincount(found.targets * n + said, minlength=n * n).reshape(n, n)
    title = f"<h3>Confusion of {text(head)}</h3>"
    if n > MATRIX:
        wrong = seen - np.diag(np.diag(seen))
        order = np.argsort(-wrong, axis=None, kind="stable")[:15]
        pairs = [(int(i) // n, int(i) % n) for i in order if wrong.flat[i]]
        rows = [[task.classes[a], task.classes[b], count(int(wrong[a, b]))] for a, b in pairs]
        if not rows:
            return f'{title}<p class="soft">No row was confused.</p>'
        return title + table("The most frequent confusions", ["is", "was called", "rows"], rows, left=2)
    share = seen / np.maximum(seen.sum(1, keepdims=True), 1)
    rows = [
        [name, *(_cell(int(seen[i, j]), float(share[i, j]), right=i == j) for j in range(n))]
        for i, name in enumerate(task.classes)
    ]
    note = '<p class="soft">Rows: the truth. Columns: what was said, with the share of the row.</p>'
    return title + note + table("", ["truth", *task.classes], rows)


def _cell(rows: int, share: float, *, right: bool) -> Html:
    kind = "right" if right else "wrong"
    below = f"<small>{percent(share)}</small>" if rows else ""
    return Html(f'<span class="share {kind}" style="--a:{0.55 * share:.2f}">{count(rows)}{below}</span>')


def residual_section(found: Predictions, head: str) -> str:
    """Answers of a regression head against the truth, and what is left of it against the answers."""
    answers, truth = found.p[head][:, 0], found.targets
    chosen = np.arange(len(answers))
    if len(answers) > POINTS:  # evenly over the table's order
        chosen = np.linspace(0, len(answers) - 1, POINTS).round().astype(np.int64)
    said, true = answers[chosen], truth[chosen]
    ends = [float(min(said.min(), true.min())), float(max(said.max(), true.max()))]
    bias, spread = float((answers - truth).mean()), float((answers - truth).std())
    some = f"{count(len(chosen))} of {count(len(answers))} rows" if len(chosen) < len(answers) else "All rows"
    note = (
        f"{some} of {head}. Residual: answer less truth; its mean is {bias:.4g}, its standard deviation "
        f"{spread:.4g}."
    )
    charts = scatter_chart(
        "Answer", true.tolist(), said.tolist(), x_name="truth", line=Series("answer = truth", ends, ends)
    ) + scatter_chart(
        "Residual", said.tolist(), (said - true).tolist(), x_name="answer",
        line=Series("no error", [float(said.min()), float(said.max())], [0.0, 0.0]),
    )  # fmt: skip
    return f'<h3>Residuals</h3><p class="soft">{text(note)}</p><div class="charts">{charts}</div>'
