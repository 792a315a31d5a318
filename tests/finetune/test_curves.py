"""Curves are scikit-learn's, point by point, and their areas are the metrics."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from diptych.finetune.report.points import pr_points, roc_points, stepped, thinned
from diptych.finetune.tasks.task import Task

ROWS = st.lists(st.tuples(st.booleans(), st.integers(0, 6)), min_size=2, max_size=40).filter(
    lambda rows: len({positive for positive, _ in rows}) == 2
)


@settings(max_examples=100, deadline=None)
@given(ROWS)
def test_points_and_areas_are_scikit_learns(rows: list[tuple[bool, int]]) -> None:
    positive = np.array([p for p, _ in rows])
    scores = np.array([s / 6 for _, s in rows])  # many ties
    false_rate, true_rate = roc_points(positive, scores)
    theirs = roc_curve(positive, scores, drop_intermediate=False)
    assert np.allclose(false_rate, theirs[0], atol=1e-12)
    assert np.allclose(true_rate, theirs[1], atol=1e-12)
    recall, precision = pr_points(positive, scores)
    p, r, _ = precision_recall_curve(positive, scores)
    assert np.allclose(recall, r[::-1], atol=1e-12)
    assert np.allclose(precision, p[::-1], atol=1e-12)
    answers = np.stack([1 - scores, scores], axis=1)
    task, targets = Task("binary", ("0", "1")), positive.astype(np.int64)
    area = float(np.trapezoid(true_rate, false_rate))
    assert area == pytest.approx(task.value("auroc", targets, answers), abs=1e-12)
    assert area == pytest.approx(roc_auc_score(positive, scores), abs=1e-12)
    xs, ys = stepped(recall, precision)
    area = float(np.trapezoid(ys, xs))
    assert area == pytest.approx(task.value("ap", targets, answers), abs=1e-12)
    assert area == pytest.approx(average_precision_score(positive, scores), abs=1e-12)


@pytest.mark.parametrize("n", [3, 240, 241, 5000])
def test_fewer_points_keep_the_curve(n: int) -> None:
    random = np.random.default_rng(n)
    positive = random.random(n) < 0.5
    positive[:2] = [True, False]
    xs, ys = roc_points(positive, random.random(n) + 0.4 * positive)
    x, y = thinned(xs, ys)
    assert len(x) <= 240
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    assert set(zip(x, y, strict=True)) <= set(zip(xs.tolist(), ys.tolist(), strict=True))
    assert np.trapezoid(y, x) == pytest.approx(np.trapezoid(ys, xs), abs=0.01)
