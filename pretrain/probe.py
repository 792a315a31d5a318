"""Linear probe: logistic regression on frozen image features, its penalty chosen inside the training
split."""

import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from ..configs.load import StrictModel
from .statistics import score

__all__ = ["ProbeConfig", "grouped_holdout", "linear_probe"]


class ProbeConfig(StrictModel):
    """The linear probe."""

    enabled: bool = True
    galleries: tuple[str, ...] = ("openmoji_no_people", "openmoji")
    """Galleries to test on; names that the data does not have are passed over."""
    target: str = "subgroup"
    """JSON field that holds the class name, in the train split and in the galleries."""
    holdout_by: str = "vendor"
    """JSON field whose groups the inner split keeps whole; where all samples share one, concepts are kept
    whole."""
    inverse_penalties: tuple[float, ...] = (0.001, 0.01, 0.1)
    """Values of scikit-learn's C to choose from, on standardised features."""
    max_train: int = 8000
    """At most this many training images, evenly spaced."""
    max_iterations: int = 100


def grouped_holdout(groups: Sequence[str], share: float = 0.2, seed: int = 0) -> NDArray[np.bool_]:
    """Mask bool [n] of whole groups, in a seeded order, until ``share`` of the rows is held out.

    The last group in is left out if the share is nearer without it; some rows always stay on both sides.
    """
    names, sizes = np.unique(np.asarray(groups), return_counts=True)
    assert len(names) > 1, "one group cannot be split"
    order = np.random.default_rng(seed).permutation(len(names))
    total = np.cumsum(sizes[order])[:-1]  # at least one group stays
    take = int(np.abs(total - share * sizes.sum()).argmin()) + 1
    return np.asarray(np.isin(np.asarray(groups), names[order[:take]]))


def _fit(features: Any, labels: Any, penalty: float, iterations: int, seed: int) -> LogisticRegression:
    model = LogisticRegression(C=penalty, max_iter=iterations, random_state=seed)
    with warnings.catch_warnings():  # stopping early is a regulariser here, and the choice of C sees it
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, labels)


def linear_probe(
    train_features: Any,
    train_labels: Sequence[str],
    train_groups: Sequence[str],
    tests: Sequence[tuple[Any, Sequence[str], Any]],
    config: ProbeConfig,
    *,
    samples: int = 2000,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Fit on train features [n, D], score each test ``(features [m, D], labels [m], concepts [m] or None)``.

    C is chosen by accuracy on an inner split of the training rows that keeps ``train_groups`` whole; the test
    rows are seen once. Test labels unknown to training count as misses. Returns for each test ``{"accuracy":
    Score, "classes", "n", "n_train", "C"}``.
    """
    scaler = StandardScaler().fit(np.asarray(train_features, dtype=np.float64))
    x: Any = scaler.transform(np.asarray(train_features, dtype=np.float64))
    y, held = np.asarray(train_labels), grouped_holdout(train_groups, seed=seed)
    accuracy = {
        c: _fit(x[~held], y[~held], c, config.max_iterations, seed).score(x[held], y[held])
        for c in sorted(config.inverse_penalties)
    }
    best = max(accuracy, key=lambda c: (accuracy[c], -c))  # of equals the stronger penalty
    model = _fit(x, y, best, config.max_iterations, seed)
    out: list[dict[str, Any]] = []
    for features, labels, concepts in tests:
        hits = model.predict(scaler.transform(np.asarray(features, dtype=np.float64))) == np.asarray(labels)
        majority = Counter(labels).most_common(1)[0][1] / len(labels)
        got = score(
            hits, concepts, chance=1 / len(model.classes_), majority=majority, samples=samples, seed=seed
        )
        out.append(
            {"accuracy": got, "classes": len(model.classes_), "n": len(labels), "n_train": len(y), "C": best}
        )
    return out
