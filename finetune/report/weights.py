"""The report's section on heads that weigh their modalities: learned weights, and how gates are spread."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...configs.errors import UserError
from ..adapt.presence import weights_of
from ..encoders.features import FeatureRows
from ..fusion.operators import Gated, Head
from ..fusion.ordinal import Ordinal
from ..fusion.pooling import Pooled
from ..predictor import Predictor
from ..runs.saved import read_json
from ..tables.manifest import Rows
from ..tasks.metrics import Floats
from .charts import Series, line_chart
from .html import Html, missing, table, text

__all__ = ["weight_section"]

BINS = 20
ABOUT = (
    "A weight says how much of a modality is taken, not what it says; weights of a row sum to 1. Gates are "
    "the mean over hidden units and seeds, of rows that have all modalities, by the model that predictions "
    "use."
)


def weight_section(folder: Path, rows: Rows | None) -> str:
    """Weights of every head of the run that has some; ``rows``: tested rows, which gates need (None: they
    cannot be had)."""
    try:
        names = [str(name) for name in read_json(folder / "run.json")["heads"]]
    except (UserError, KeyError, TypeError):
        return ""
    lines: list[list[Any]] = []
    charts: list[str] = []
    notes: list[str] = []
    for name in names:
        try:
            predictor = Predictor.load(folder, head=name)
            if not predictor.has_weights:
                continue
            weights = _weights(predictor, rows)
        except UserError as error:
            notes.append(missing(f"Weights of {name} cannot be had: {error}", "diptych finetune"))
            continue
        if weights is None:
            notes.append(missing(f"Gates of {name} need the run's table.", "diptych report"))
            continue
        lines.append(_line(name, predictor, weights))
        if len(weights) > 1:
            charts.append(_spread(name, predictor, weights))
    if not lines and not notes:
        return ""
    heads = table("", ["head", "weight of each modality"], lines, left=2)
    drawn = f'<div class="charts">{"".join(charts)}</div>' if charts else ""
    return f'<h3>Weights</h3><p class="soft">{text(ABOUT)}</p>{heads}{drawn}{"".join(notes)}'


def _weights(predictor: Predictor, rows: Rows | None) -> Floats | None:
    """[n, M] of rows, or [1, M] where all rows have the same."""
    heads = [_core(one.head) for one in predictor.saved]
    if isinstance(heads[0], Gated):
        if rows is None:
            return None
        whole = [i for i in range(len(rows)) if all(cells[i] is not None for cells in rows.cells.values())]
        if not whole:
            return None
        return predictor.weights_of(rows.take(np.array(whole)))
    anything = FeatureRows({}, {k: torch.zeros(1, dtype=torch.int64) for k in predictor.modalities})
    return np.mean([weights_of(head, anything, batch_size=1) for head in heads], axis=0)


def _core(head: Head) -> Head:
    """The head that weighs, without what thresholds or pools around it."""
    while isinstance(head, Ordinal | Pooled):
        head = head.inner
    return head


def _line(name: str, predictor: Predictor, weights: Floats) -> list[Any]:
    parts: list[str] = []
    for k, own in zip(predictor.modalities, weights.T, strict=True):
        low, middle, high = np.quantile(own, [0.05, 0.5, 0.95])
        said = f"{middle:.2f}" if len(own) == 1 else f"{middle:.2f} <small>{low:.2f} to {high:.2f}</small>"
        parts.append(f'<span class="weight">{text(k)} {said}</span>')
    kind = "the same for all rows" if len(weights) == 1 else f"median and 5 to 95 % of {len(weights)} rows"
    return [
        Html(f"{text(name)}<small>{text(kind)}</small>"),
        Html(f'<span class="wraps">{"".join(parts)}</span>'),
    ]


def _spread(name: str, predictor: Predictor, weights: Floats) -> str:
    """Shares of rows by weight, one line per modality."""
    edges = np.linspace(0, 1, BINS + 1)
    middles = ((edges[1:] + edges[:-1]) / 2).tolist()
    series = [
        Series(k, middles, (np.histogram(own, edges)[0] / len(own)).tolist())
        for k, own in zip(predictor.modalities, weights.T, strict=True)
    ]
    return line_chart(f"Gates of {name}: share of rows", series, x_name="weight", from_zero=True)
