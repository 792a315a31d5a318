"""How much each modality moved an answer: exact Shapley values over what may be seen.

v(S) is the answer with the modalities S alone; with M modalities there are 2^M of them, so all are computed:

    phi_k = sum over S without k of |S|! (M - |S| - 1)! / M! (v(S + k) - v(S))

(Shapley 1953; for two: half of v(k) - v() + v(both) - v(other)). They sum to v(all) - v(). A modality that a
row does not have, or that the head does not read, gets 0.

v() is the answer to nothing. Training never shows it: modality dropout and tables leave every row something.
For ``late``, ``weighted_sum``, ``gated`` and ``bottleneck`` it is a constant of their form; for others all
null vectors together, an input that no row had. Of two modalities v() moves both contributions alike, and
their difference is v(image) - v(text) whatever v() is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import factorial
from typing import Any

import numpy as np

from ...configs.errors import UserError
from ..tasks.task import Floats, Ints, Task

__all__ = ["MOST", "Explanation", "coalitions", "explained_class", "shapley", "values_of"]

MOST = 4
"""Modalities at most: 2^M answers are computed."""
LEAST = 1e-9
"""Probabilities are kept this far from 0 and 1, so that log odds are finite."""


@dataclass(frozen=True)
class Explanation:
    """``phi`` float64 [n, M], the contributions of ``modalities``; ``nothing`` and ``everything`` [n], the
    values that they lead from and to; ``classes``: the class explained in each row, None for regression;
    ``weights`` [n, M]: the head's own, where it has them (see ``presence.weights_of``)."""

    modalities: tuple[str, ...]
    phi: Floats
    nothing: Floats
    everything: Floats
    classes: list[str] | None
    weights: Floats | None = None

    def rows(self) -> list[dict[str, float]]:
        """Per row the contribution of every modality."""
        return [dict(zip(self.modalities, map(float, row), strict=True)) for row in self.phi]


def coalitions(modalities: Sequence[str]) -> list[frozenset[str]]:
    """All 2^M sets of modalities, the empty one first and the full one last. UserError for more than four."""
    if len(modalities) > MOST:
        raise UserError(
            f"{len(modalities)} modalities have {2 ** len(modalities)} combinations; explanations are made "
            f"for {MOST} at most"
        )
    sizes = range(len(modalities) + 1)
    return [frozenset(some) for size in sizes for some in combinations(modalities, size)]


def shapley(values: Mapping[frozenset[str], Floats], modalities: Sequence[str]) -> Floats:
    """phi [n, M] of the values [n] of all coalitions."""
    count = len(modalities)
    phi: list[Floats] = []
    for k in modalities:
        others = [some for some in values if k not in some]
        phi.append(
            sum(
                (
                    factorial(len(some)) * factorial(count - len(some) - 1) / factorial(count)
                    * (values[some | {k}] - values[some])
                    for some in others
                ),
                np.zeros_like(values[frozenset()]),
            )
        )  # fmt: skip
    return np.stack(phi, axis=1)


def explained_class(task: Task, p: Floats, of: str | None) -> Ints | None:
    """The class number int64 [n] that is explained: ``of``, or the predicted one (multilabel: the most
    probable label). None for regression. UserError for a class that the task does not have."""
    if task.type == "regression":
        if of is not None:
            raise UserError(f"'{of}' cannot be explained: regression has no classes; leave it out")
        return None
    if of is not None:
        if of not in task.classes:
            known = ", ".join(task.classes[:12])
            raise UserError(f"'{of}' is no class of the run; it has {known}")
        return np.full(len(p), task.classes.index(of))
    return p.argmax(1) if task.type == "multilabel" else task.predicted(p)


def values_of(p: Floats, classes: Ints | None) -> Floats:
    """v [n] of answers [n, C]: log odds of a class, or the predicted number."""
    if classes is None:
        return p[:, 0]
    chosen: Any = np.clip(p[np.arange(len(p)), classes], LEAST, 1 - LEAST)
    return np.log(chosen) - np.log1p(-chosen)
