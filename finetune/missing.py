"""What is left of a head's score when modalities are missing from the test rows.

One row of the matrix sees whatever is there, one per modality sees that modality alone; the columns hide
modalities of more and more rows. A missing rate is the share of rows with several modalities that lose one,
as in Lee et al. 2023 (arXiv 2303.03369). Which rows and which modality, a hash of the row's id says, so a
row hit at one rate is hit at every higher one, in every fold and repeat. No row loses all it has.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .adapt.presence import Shown
from .heads import head_answers
from .scores.intervals import paired_intervals
from .session import Session
from .tasks.targets import Targets
from .tasks.task import Floats, Ints

__all__ = ["RATES", "Scenario", "missing_answers", "missing_matrix", "scenarios"]

RATES = (0.0, 0.3, 0.7)
SEED = 0


@dataclass(frozen=True)
class Scenario:
    """One cell of the matrix. ``kept``: None for all modalities, or the one that is seen alone."""

    kept: str | None
    rate: float

    def name(self, modalities: Sequence[str]) -> str:
        """``both`` (of more than two: ``all``), or the modality."""
        return self.kept or ("both" if len(modalities) == 2 else "all")

    def shown(self, ids: Sequence[str], present: Shown) -> dict[str, NDArray[np.bool_]]:
        """Rows in which each modality is seen, bool [n], out of those that have it.

        Of all: a row that is hit loses one modality by chance. Of one alone: a row that is hit loses that one
        and is answered by its others; every other row that has it loses its others.
        """
        names = list(present)
        there = np.stack([present[k] for k in names], axis=1)
        several = there.sum(1) > 1
        hit = several & (np.array([_chance(i, "") for i in ids]) < self.rate)
        hidden = np.zeros_like(there)
        if self.kept is None:
            drawn = np.array([[_chance(i, k) for k in names] for i in ids]).reshape(there.shape)
            lost = np.where(there, drawn, 2.0).argmin(1)
            hidden[hit, lost[hit]] = True
        else:
            own = names.index(self.kept)
            has = there[:, own]
            hidden[has & ~hit] = True
            hidden[:, own] = has & hit
        return {k: there[:, j] & ~hidden[:, j] for j, k in enumerate(names)}


def _chance(row_id: str, what: str) -> float:
    """A number in [0, 1) that depends on the row's id and on what it decides."""
    digest = hashlib.sha256(f"{SEED}\0{what}\0{row_id}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:6]) / 2**48


def scenarios(modalities: Sequence[str]) -> list[Scenario]:
    """The cells of the matrix, row by row; none for a single modality."""
    if len(modalities) < 2:
        return []
    return [Scenario(kept, rate) for kept in (None, *modalities) for rate in RATES]


def _seen(session: Session, rows: Ints) -> list[dict[str, NDArray[np.bool_]]]:
    index = session.features.index
    present = {k: index[k].cpu().numpy()[rows] >= 0 for k in session.rows.modalities}
    ids = [session.rows.ids[i] for i in rows]
    return [scenario.shown(ids, present) for scenario in scenarios(session.rows.modalities)]


def missing_answers(session: Session, name: str, rows: Ints) -> Floats:
    """Probabilities [S, n, C] of a saved head on the rows in each of the S scenarios; S is 0 for a head that
    reads one modality, where there is one alone, and for retrieval, where a missing one asks for nothing."""
    alone = session.config.all_heads()[name].single or session.task.type == "retrieval"
    if alone or not scenarios(session.rows.modalities):
        return np.zeros((0, len(rows), 1))
    return np.stack(head_answers(session, name, rows, _seen(session, rows)))


def missing_matrix(
    session: Session, name: str, rows: Ints, targets: Targets, answers: Floats, said: Floats
) -> dict[str, Any]:
    """``missing``: the head's first metric, and the one that chose it, in every scenario, with intervals.

    rows: numbers [n], a row once per repeat; targets: theirs [n]; answers: [S, n, C], and what is said of
    them (see ``thresholds.decided``). Empty without answers. ``diff`` is the paired difference of the first
    metric to that of all modalities and rate 0, positive where the scenario is better. ``present``: the share
    of rows in which each modality was seen.
    """
    if len(answers) == 0:
        return {}
    task, modalities = session.task, session.rows.modalities
    metrics = tuple(dict.fromkeys((task.metrics[0], task.primary)))
    cells = scenarios(modalities)
    names = [f"{cell.name(modalities)} {cell.rate}" for cell in cells]
    scores, diffs = paired_intervals(
        targets,
        dict(zip(names, answers, strict=True)),
        metrics,
        [session.rows.groups[i] for i in rows],
        task=task,
        said=dict(zip(names, said, strict=True)),
        against=names[0],
        samples=session.config.eval.bootstrap,
    )
    made: list[dict[str, Any]] = []
    for cell, key, seen in zip(cells, names, _seen(session, rows), strict=True):
        made.append(
            {
                "seen": cell.name(modalities),
                "rate": cell.rate,
                "present": {k: float(mask.mean()) for k, mask in seen.items()},
                "metrics": {metric: _plain(scores[key][metric].as_dict()) for metric in metrics},
                "diff": _plain(diffs[key].as_dict()) if key in diffs else None,
            }
        )
    return {"missing": {"head": name, "metric": metrics[0], "rates": list(RATES), "cells": made}}


def _plain(interval: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no NaN."""
    return {k: v if v == v else None for k, v in interval.items()}
