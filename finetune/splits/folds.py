"""Outer folds and inner splits: which rows train, which stop and choose, and which are tested.

Folds are scikit-learn's own and can be made again with it: repeat r of a run shuffles with the random state
``seed + r``. Groups are never divided. Where rows have one class each, folds are stratified by it
(StratifiedGroupKFold, or StratifiedKFold if no two rows share a group), else groups alone are dealt out
(GroupKFold).
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from sklearn.model_selection import GroupKFold, StratifiedGroupKFold, StratifiedKFold

from ...configs.errors import UserError
from ..config import CvConfig
from ..tables.manifest import Rows, Splits
from ..tasks.task import Ints

__all__ = ["Fold", "deal", "inner_split", "make_folds", "strata_of"]

MOST_PARTS = 10  # an inner split is m of k parts, k at most this


@dataclass(frozen=True)
class Fold:
    """One outer fold of one repeat, both counted from 0. ``splits.test`` is the fold itself."""

    repeat: int
    fold: int
    splits: Splits

    @property
    def name(self) -> str:
        """Folder of the fold's heads, relative to the run."""
        return f"folds/repeat_{self.repeat}/fold_{self.fold}"


def strata_of(targets: Any) -> Ints | None:
    """What folds are stratified by: class numbers int64 [n], or None for targets that are no classes."""
    return targets if targets.ndim == 1 and np.issubdtype(targets.dtype, np.integer) else None


def deal(groups: Sequence[str], strata: Ints | None, parts: int, seed: int) -> list[Ints]:
    """``parts`` disjoint sets of positions that together are all of them, each group in one of them.

    strata: int64 [n], or None. With as many groups as parts, which the caller sees to, no set is empty.
    """
    blank, names = np.zeros(len(groups)), np.asarray(groups)
    if strata is not None and np.bincount(strata).max() >= parts:  # smaller ones cannot be dealt evenly
        alone = len(set(groups)) == len(groups)  # then the same can be had without a loop over groups
        kind: Any = StratifiedKFold if alone else StratifiedGroupKFold
        splitter = kind(parts, shuffle=True, random_state=seed)
        with warnings.catch_warnings():  # of classes with fewer rows than parts: min_class_rows decides there
            warnings.simplefilter("ignore", UserWarning)
            dealt = [test for _, test in splitter.split(blank, strata, names)]
        if all(len(test) for test in dealt):  # few groups may leave a part without any
            return dealt
    splitter = GroupKFold(parts, shuffle=True, random_state=seed)
    return [test for _, test in splitter.split(blank, None, names)]


def inner_split(
    rows: Rows, among: Ints, strata: Ints | None, *, share: float, seed: int
) -> tuple[Ints, Ints]:
    """Row numbers of the training and the inner part of the rows ``among``, about ``share`` of them inner.

    ``strata`` int64 [n] of all rows is read at ``among`` alone. Raises UserError for a single group.
    """
    groups = [rows.groups[i] for i in among]
    n_groups = len(set(groups))
    if n_groups < 2:
        raise UserError(f"{rows.source}: one group cannot make an inner split; add rows of other groups")
    most = min(MOST_PARTS, n_groups)
    nearest = Fraction(share).limit_denominator(most)
    taken, parts = nearest.numerator, nearest.denominator
    if not 0 < taken < parts:
        taken, parts = (1 if taken == 0 else most - 1), most
    dealt = deal(groups, None if strata is None else strata[among], parts, seed)
    held = np.zeros(len(among), dtype=bool)
    held[np.concatenate(dealt[:taken])] = True
    return among[~held], among[held]


def make_folds(
    rows: Rows, strata: Ints | None, cv: CvConfig, *, inner_share: float, among: Ints | None = None
) -> list[Fold]:
    """All folds of all repeats; every row is tested once per repeat, of the rows ``among`` where given.

    strata: class numbers int64 [n] or None. Raises UserError for fewer groups than folds.
    """
    among = np.arange(len(rows)) if among is None else among
    groups = [rows.groups[i] for i in among]
    n_groups = len(set(groups))
    if n_groups < cv.folds:
        raise UserError(
            f"eval.cv.folds: {cv.folds} folds cannot be made of {n_groups} groups in {rows.source}; lower it"
        )
    strata = strata if cv.stratify else None
    folds: list[Fold] = []
    for repeat in range(cv.repeats):
        seed = cv.seed + repeat
        dealt = deal(groups, None if strata is None else strata[among], cv.folds, seed)
        for fold, test in enumerate(among[places] for places in dealt):
            rest = np.setdiff1d(among, test)
            train, inner = inner_split(rows, rest, strata, share=inner_share, seed=seed)
            folds.append(Fold(repeat, fold, Splits(train, inner, np.sort(test))))
    return folds
