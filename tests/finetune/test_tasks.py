"""Metrics against scikit-learn, calibration against a search, losses against their definition."""

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.configs.errors import UserError
from diptych.finetune.tasks.task import BINS, METRICS, Task, calibrate, metric_value, predicted

BINARY = Task("binary", ("no", "yes"))
THREE = Task("multiclass", ("a", "b", "c"))


def rows(seed: int, n: int, classes: int, *, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Targets, probabilities and whole-number weights, the first rows with one of each class."""
    random = np.random.default_rng(seed)
    targets = np.concatenate([np.arange(classes), random.integers(0, classes, n)])
    p = random.random((n + classes, classes)) ** 2
    if ties:
        p = np.round(p, 1) + 0.05
    p = p / p.sum(1, keepdims=True)
    weights = random.integers(0, 4, n + classes)
    weights[:classes] = 1
    return targets, p, weights


def truth(name: str, targets: np.ndarray, p: np.ndarray) -> float:
    said = predicted(p)
    if name == "accuracy":
        return float(sk.accuracy_score(targets, said))
    if name == "auroc":
        return float(sk.roc_auc_score(targets, p[:, 1]))
    if name == "ap":
        return float(sk.average_precision_score(targets, p[:, 1]))
    if name == "f1":
        return float(sk.f1_score(targets, said))
    if name == "macro_f1":
        return float(sk.f1_score(targets, said, average="macro"))
    if name == "balanced_accuracy":
        return float(sk.balanced_accuracy_score(targets, said))
    if name == "brier":
        if p.shape[1] == 2:
            return float(sk.brier_score_loss(targets, p[:, 1]))
        return float(np.mean(np.sum((p - np.eye(p.shape[1])[targets]) ** 2, axis=1)))
    assert name == "ece"
    confidence, hit, total = p.max(1), said == targets, 0.0
    for i in range(BINS):
        low, high = i / BINS, (i + 1) / BINS
        inside = (confidence >= low) & ((confidence < high) | (i == BINS - 1))
        if inside.any():
            total += inside.mean() * abs(confidence[inside].mean() - hit[inside].mean())
    return float(total)


@pytest.mark.parametrize(("task", "name"), [(t, m) for t in (BINARY, THREE) for m in t.metrics])
@given(seed=st.integers(0, 10_000), n=st.integers(0, 60), ties=st.booleans())
@settings(max_examples=40, deadline=None)
def test_metrics_are_scikit_learns_also_for_weighted_rows(
    task: Task, name: str, seed: int, n: int, ties: bool
) -> None:
    targets, p, weights = rows(seed, n, len(task.classes), ties=ties)
    assert metric_value(name, targets, p) == pytest.approx(truth(name, targets, p), abs=1e-9)
    repeated = np.repeat(np.arange(len(targets)), weights)
    got = METRICS[name](targets, p)(weights.astype(np.float64))
    assert got == pytest.approx(truth(name, targets[repeated], p[repeated]), abs=1e-9)


def test_undefined_metrics_are_nan() -> None:
    p = np.array([[0.3, 0.7], [0.6, 0.4]])
    assert np.isnan(metric_value("auroc", np.array([1, 1]), p))
    assert np.isnan(metric_value("auroc", np.array([0, 0]), p))
    assert np.isnan(metric_value("ap", np.array([0, 0]), p))
    assert metric_value("f1", np.array([0, 0]), p[1:].repeat(2, 0)) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_the_mean_negative_log_likelihood_of_smoothed_targets(smoothing: float) -> None:
    random = torch.Generator().manual_seed(0)
    for task in (BINARY, THREE):
        logits = torch.randn(20, task.outputs, generator=random, dtype=torch.float64)
        targets = torch.randint(len(task.classes), (20,), generator=random)
        p = torch.from_numpy(task.probabilities(logits))
        wanted = torch.nn.functional.one_hot(targets, len(task.classes)) * (1 - smoothing)
        wanted = wanted + smoothing / len(task.classes)
        expected = -(wanted * p.log()).sum(1).mean()
        torch.testing.assert_close(task.loss(logits, targets, smoothing), expected)
        assert np.allclose(p.sum(1), 1)


def test_calibration_finds_the_scale_and_shift_that_the_logits_were_spoiled_by() -> None:
    random = torch.Generator().manual_seed(0)
    true = 2 * torch.randn(4000, 1, generator=random, dtype=torch.float64)
    targets = (torch.rand(4000, generator=random, dtype=torch.float64) < true[:, 0].sigmoid()).long()
    spoiled = true * 5 - 3  # 0.2 * (spoiled + 3) is right again
    scale, shift = calibrate(BINARY, spoiled, targets, "platt")
    assert scale == pytest.approx(0.2, abs=0.02)
    assert shift == pytest.approx(0.6, abs=0.1)
    only = calibrate(BINARY, spoiled, targets, "temperature")
    assert only[1] == 0
    losses = [float(BINARY.loss(a * spoiled, targets)) for a in np.geomspace(0.01, 10, 400)]
    assert float(BINARY.loss(only[0] * spoiled, targets)) <= min(losses) + 1e-3
    assert calibrate(BINARY, spoiled, targets, "none") == (1.0, 0.0)


def test_calibration_stays_finite_where_all_rows_are_told_apart() -> None:
    logits = torch.tensor([[-1.0], [1.0], [-2.0], [2.0]])
    scale, shift = calibrate(BINARY, logits, torch.tensor([0, 1, 0, 1]), "platt")
    assert 1 < scale < 1e3
    assert abs(shift) < 1


def test_of_two_equal_classes_the_second_is_said_and_of_more_the_first() -> None:
    assert predicted(np.array([[0.5, 0.5], [0.6, 0.4]])).tolist() == [1, 0]
    assert predicted(np.array([[0.4, 0.4, 0.2]])).tolist() == [0]


def test_a_metric_of_another_task_is_a_mistake_of_the_user() -> None:
    assert BINARY.check_metric("auto") == "auroc"
    assert THREE.check_metric("auto") == "accuracy"
    assert THREE.check_metric("loss") == "loss"
    with pytest.raises(UserError, match=r"'auroc' is no metric of multiclass tasks"):
        THREE.check_metric("auroc")
