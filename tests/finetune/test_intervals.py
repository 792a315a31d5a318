"""Bootstrap intervals of several predictors against the plain bootstrap of each."""

import numpy as np
import pytest
import sklearn.metrics as sk

from diptych.finetune.scores.intervals import paired_intervals
from diptych.finetune.tasks.task import Floats, Ints, predicted
from diptych.pretrain.statistics import bootstrap_means, bootstrap_metric

N = 120


def data(seed: int = 0) -> tuple[Ints, dict[str, Floats], list[str]]:
    random = np.random.default_rng(seed)
    targets = random.integers(0, 2, N)
    p: dict[str, Floats] = {}
    for name, skill in (("good", 2.0), ("poor", 0.3)):
        positive = 1 / (1 + np.exp(-(skill * (2 * targets - 1) + random.normal(size=N))))
        p[name] = np.stack([1 - positive, positive], axis=1)
    return targets, p, [f"g{i // 3}" for i in range(N)]


def test_intervals_are_those_of_resampling_rows_of_groups_one_by_one() -> None:
    targets, p, groups = data()
    scores, _ = paired_intervals(targets, p, ["accuracy", "auroc"], groups, samples=200)
    for name in p:
        hits = predicted(p[name]) == targets
        assert scores[name]["accuracy"] == bootstrap_means(hits, groups, samples=200)[0]

        def auroc(rows: Ints, name: str = name) -> float:
            return float(sk.roc_auc_score(targets[rows], p[name][rows, 1]))

        expected = bootstrap_metric(auroc, N, groups, samples=200)
        got = scores[name]["auroc"]
        assert (got.value, got.low, got.high) == pytest.approx((expected.value, expected.low, expected.high))


def test_gains_are_paired_and_narrower_than_the_two_intervals() -> None:
    targets, p, groups = data()
    scores, gains = paired_intervals(targets, p, ["accuracy"], groups, against="poor", samples=500)
    right = np.stack([predicted(p[name]) == targets for name in ("good", "poor")]).astype(float)
    expected = bootstrap_means(right[0] - right[1], groups, samples=500)[0]
    got = gains["good"]
    assert (got.value, got.low, got.high) == pytest.approx((expected.value, expected.low, expected.high))
    assert list(gains) == ["good"]
    assert got.value == scores["good"]["accuracy"].value - scores["poor"]["accuracy"].value
    same = paired_intervals(targets, p | {"twin": p["poor"]}, ["accuracy"], against="poor")[1]["twin"]
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_the_interval_covers_the_truth_about_95_times_in_100() -> None:
    covered = 0
    for seed in range(200):
        random = np.random.default_rng(seed)
        hits = random.random(N) < 0.7
        p = np.where(hits[:, None], [[0.0, 1.0]], [[1.0, 0.0]])
        scores, _ = paired_intervals(np.ones(N, dtype=np.int64), {"x": p}, ["accuracy"], samples=200)
        covered += scores["x"]["accuracy"].low <= 0.7 <= scores["x"]["accuracy"].high
    assert 0.90 <= covered / 200 <= 0.985


def test_ten_hits_of_ten_are_not_certainty() -> None:
    p = np.tile([[0.0, 1.0]], (10, 1))
    scores, _ = paired_intervals(np.ones(10, dtype=np.int64), {"x": p}, ["accuracy", "auroc"])
    assert scores["x"]["accuracy"].low == pytest.approx(0.025**0.1)
    assert np.isnan(scores["x"]["auroc"].value)
