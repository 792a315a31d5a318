"""Metrics of multilabel, ordinal and regression tasks against scikit-learn and scipy, weights included."""

import warnings
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr

from diptych.finetune.scores.intervals import paired_intervals
from diptych.finetune.tasks.task import BINS, Task

LABELS = Task("multilabel", ("a", "b", "c", "d"))
ORDERED = Task("ordinal", ("low", "mid", "high", "top"))
NUMBER = Task("regression", ())


def cases(task: Task, seed: int, n: int, *, ties: bool) -> tuple[Any, np.ndarray, np.ndarray]:
    """Targets, answers and whole-number weights; one label may have no positives, another no negatives."""
    random = np.random.default_rng(seed)
    weights = random.integers(0, 4, n)
    weights[:2] = 1
    if task is NUMBER:
        targets, answers = random.normal(3, 10, (2, n))
        if ties:
            targets, answers = np.round(targets, -1), np.round(answers, -1)
        return targets, answers[:, None], weights
    p = random.random((n, 4))
    if ties:
        p = np.round(p, 1)
    if task is LABELS:
        return (random.random((n, 4)) < random.random(4) ** 2).astype(np.int64), p, weights
    p = p + 0.05
    return random.integers(0, 4, n), p / p.sum(1, keepdims=True), weights


def pooled_gap(confidence: np.ndarray, hit: np.ndarray) -> float:
    total = 0.0
    for i in range(BINS):
        inside = (confidence >= i / BINS) & ((confidence < (i + 1) / BINS) | (i == BINS - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    return total


def of_labels(name: str, targets: np.ndarray, p: np.ndarray) -> float:
    said = (p >= 0.5).astype(int)
    if name == "macro_map":
        some = [c for c in range(4) if 0 < targets[:, c].sum() < len(targets)]
        scores = [sk.average_precision_score(targets[:, c], p[:, c]) for c in some]
        return float(np.mean(scores)) if scores else float("nan")
    if name == "micro_f1":
        return float(sk.f1_score(targets, said, average="micro", zero_division=0))
    if name == "macro_f1":
        some = (targets.sum(0) + said.sum(0)) > 0
        if not some.any():
            return float("nan")
        return float(
            np.mean([sk.f1_score(targets[:, c], said[:, c], zero_division=0) for c in np.flatnonzero(some)])
        )
    if name == "lrap":
        return float(sk.label_ranking_average_precision_score(targets, p))
    return pooled_gap(p.ravel(), targets.ravel())


def of_order(name: str, targets: np.ndarray, p: np.ndarray) -> float:
    middle = np.array([int(np.searchsorted(np.cumsum(row), 0.5 - 1e-9)) for row in p])
    if name == "qwk":
        return float(sk.cohen_kappa_score(targets, middle, weights="quadratic", labels=range(4)))
    if name == "mae_ranks":
        return float(sk.mean_absolute_error(targets, middle))
    if name == "accuracy":
        return float(sk.accuracy_score(targets, middle))
    return pooled_gap(p[np.arange(len(p)), middle], targets == middle)


def of_number(name: str, targets: np.ndarray, p: np.ndarray) -> float:
    answers = p[:, 0]
    if name == "rmse":
        return float(sk.root_mean_squared_error(targets, answers))
    if name == "mae":
        return float(sk.mean_absolute_error(targets, answers))
    if name == "r2":
        return float(sk.r2_score(targets, answers)) if len(set(targets)) > 1 else float("nan")
    return float(spearmanr(targets, answers).statistic)


TRUTH: dict[Task, Any] = {LABELS: of_labels, ORDERED: of_order, NUMBER: of_number}


@pytest.mark.parametrize(("task", "name"), [(t, m) for t in TRUTH for m in t.metrics])
@given(seed=st.integers(0, 10_000), n=st.integers(2, 60), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_metrics_are_scikit_learns_also_for_weighted_rows(
    task: Task, name: str, seed: int, n: int, ties: bool
) -> None:
    targets, p, weights = cases(task, seed, n, ties=ties)
    repeated = np.repeat(np.arange(n), weights)
    prepared = task.prepare(name)(targets, p)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scikit-learn's about undefined values
        for rows, given_weights in ((np.arange(n), np.ones(n)), (repeated, weights.astype(np.float64))):
            expected = TRUTH[task](name, targets[rows], p[rows])
            assert prepared(given_weights) == pytest.approx(expected, abs=1e-9, nan_ok=True)


def test_a_label_without_positives_or_without_negatives_is_left_out_and_not_scored_0() -> None:
    targets = np.array([[1, 0, 1], [0, 0, 1], [1, 0, 1]])
    p = np.array([[0.9, 0.8, 0.1], [0.2, 0.8, 0.1], [0.8, 0.8, 0.1]])
    assert LABELS.value("macro_map", targets, p) == 1
    assert np.isnan(LABELS.value("macro_map", targets[:, 1:], p[:, 1:]))


def test_metrics_that_are_undefined_are_nan() -> None:
    flat = np.full(3, 2.0)
    assert np.isnan(NUMBER.value("r2", flat, np.array([[1.0], [2.0], [3.0]])))
    assert np.isnan(NUMBER.value("spearman", flat, np.array([[1.0], [2.0], [3.0]])))
    sure = np.tile([[0.0, 1.0, 0.0, 0.0]], (3, 1))
    assert np.isnan(ORDERED.value("qwk", np.ones(3, dtype=np.int64), sure))


def test_a_gain_is_positive_where_a_predictor_is_better_also_if_less_is_better() -> None:
    random = np.random.default_rng(0)
    targets = random.normal(size=80)
    near, far = (targets + s * random.normal(size=80) for s in (0.3, 2.0))
    p = {"near": near[:, None], "far": far[:, None]}
    scores, gains = paired_intervals(targets, p, NUMBER.metrics, task=NUMBER, against="far", samples=200)
    assert scores["near"]["rmse"].value < scores["far"]["rmse"].value
    gain = gains["near"]
    assert gain.value == pytest.approx(scores["far"]["rmse"].value - scores["near"]["rmse"].value)
    assert 0 < gain.low < gain.value < gain.high
    backwards = paired_intervals(targets, p, NUMBER.metrics, task=NUMBER, against="near", samples=200)[1][
        "far"
    ]
    assert (backwards.value, backwards.low, backwards.high) == pytest.approx(
        (-gain.value, -gain.high, -gain.low)
    )


def test_intervals_of_ordered_classes_count_the_class_in_the_middle() -> None:
    p = np.tile([[0.4, 0.2, 0.0, 0.4]], (20, 1))  # most probable is the first, the middle lies in the second
    targets = np.tile([0, 1], 10)
    scores, _ = paired_intervals(targets, {"x": p}, ORDERED.metrics, task=ORDERED, samples=100)
    assert scores["x"]["accuracy"].value == 0.5
    assert scores["x"]["mae_ranks"].value == 0.5
    assert ORDERED.named(p[:1]) == ["mid"]


@pytest.mark.parametrize("task", [LABELS, ORDERED])
def test_reliability_holds_what_the_calibration_error_is_made_of(task: Task) -> None:
    targets, p, _ = cases(task, 3, 200, ties=False)
    bins = task.reliability(targets, p)
    assert sum(b["share"] for b in bins) == pytest.approx(1)
    gap = sum(b["share"] * abs(b["confidence"] - b["accuracy"]) for b in bins)
    assert gap == pytest.approx(task.value("ece", targets, p))
    assert NUMBER.reliability(np.ones(2), np.ones((2, 1))) == []


@pytest.mark.parametrize("task", [LABELS, ORDERED, NUMBER])
def test_the_loss_of_answers_is_their_negative_log_likelihood_or_squared_error(task: Task) -> None:
    targets, p, _ = cases(task, 5, 50, ties=False)
    if task is NUMBER:
        expected = sk.mean_squared_error(targets, p[:, 0])
    elif task is LABELS:
        expected = np.mean([sk.log_loss(targets[:, c], p[:, c], labels=[0, 1]) for c in range(4)])
    else:
        expected = sk.log_loss(targets, p, labels=range(4))
    assert task.log_loss(targets, p) == pytest.approx(expected)
