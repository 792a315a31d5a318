"""Intervals against what they promise: coverage, grouping, pairing, no false certainty."""

import numpy as np
import pytest

from diptych.configs.errors import UserError
from diptych.pretrain import statistics
from diptych.pretrain.statistics import Score, bootstrap_means, bootstrap_metric, score


def test_95_percent_intervals_of_clustered_rows_hold_the_truth_about_95_percent_of_the_time() -> None:
    rng = np.random.default_rng(0)
    covered = {"grouped": 0, "rows": 0}
    for trial in range(300):
        level = rng.beta(2, 2, size=60)  # each concept has its own hit rate, mean 0.5
        groups = np.repeat(np.arange(60), 8)
        hits = rng.random(480) < level[groups]
        grouped = bootstrap_means(hits, groups, samples=400, seed=trial)[0]
        rows = bootstrap_means(hits, samples=400, seed=trial)[0]
        covered["grouped"] += grouped.low <= 0.5 <= grouped.high
        covered["rows"] += rows.low <= 0.5 <= rows.high
    assert 0.91 <= covered["grouped"] / 300 <= 0.98
    assert covered["rows"] / 300 < 0.85  # what happens if the groups are forgotten


def test_the_interval_of_independent_rows_agrees_with_the_normal_approximation() -> None:
    hits = np.arange(1000) < 300
    got = bootstrap_means(hits, samples=4000)[0]
    half = 1.96 * np.sqrt(0.3 * 0.7 / 1000)
    assert got.value == 0.3
    assert got.low == pytest.approx(0.3 - half, abs=0.002)
    assert got.high == pytest.approx(0.3 + half, abs=0.002)


def test_all_hits_or_all_misses_do_not_look_like_certainty() -> None:
    none, all_ = bootstrap_means(np.stack([np.zeros(10), np.ones(10)], axis=1))
    assert (none.value, none.low) == (0, 0)
    assert none.high == pytest.approx(0.3085, abs=1e-4)  # Clopper-Pearson, 0 of 10, 97.5 %
    assert (all_.value, all_.high) == (1, 1)
    assert all_.low == pytest.approx(0.6915, abs=1e-4)
    one_group = bootstrap_means(np.zeros(10), np.zeros(10))[0]
    assert one_group.high == pytest.approx(0.975)  # ten rows of one concept say little


def test_results_do_not_depend_on_the_chunk_size_or_on_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).random((51, 3))
    groups = np.arange(51) % 17
    whole = bootstrap_means(values, groups, samples=301, seed=5)
    assert bootstrap_means(values, groups, samples=301, seed=5) == whole
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    for a, b in zip(bootstrap_means(values, groups, samples=301, seed=5), whole, strict=True):
        assert (a.low, a.high) == pytest.approx((b.low, b.high), abs=1e-12)
    assert bootstrap_means(values, groups, samples=301, seed=6) != whole


def test_a_metric_that_is_a_mean_has_the_interval_of_the_mean() -> None:
    values = np.random.default_rng(2).random(60)
    groups = np.array([f"g{i % 13}" for i in range(60)])
    general = bootstrap_metric(lambda rows: float(values[rows].mean()), 60, groups, samples=500, seed=3)
    direct = bootstrap_means(values, groups, samples=500, seed=3)[0]
    assert general.as_dict() == pytest.approx(direct.as_dict(), abs=1e-12)


def test_a_paired_difference_is_narrower_than_the_difference_of_two_intervals() -> None:
    rng = np.random.default_rng(3)
    shared = rng.random(400)
    a, b = shared < 0.6, shared < 0.55  # two predictors that fail on the same rows
    paired = bootstrap_metric(lambda rows: float(a[rows].mean() - b[rows].mean()), 400, samples=500)
    apart = bootstrap_means(np.stack([a, b], axis=1), samples=500)
    assert paired.low > 0
    assert apart[0].low < apart[1].high


def test_samples_where_a_metric_is_undefined_are_left_out() -> None:
    one_class = bootstrap_metric(lambda rows: float("nan"), 5)
    assert np.isnan(one_class.low)
    target = np.array([1, 0, 0, 0])
    sometimes = bootstrap_metric(
        lambda rows: 1.0 if target[rows].any() else float("nan"), 4, samples=50, seed=1
    )
    assert (sometimes.low, sometimes.high) == (1, 1)


def test_scores_become_plain_numbers_with_chance_and_majority_only_where_there_is_one() -> None:
    got = score(np.array([True, False]), chance=0.5)
    assert set(got.as_dict()) == {"value", "low", "high", "chance"}
    assert Score(0.5, 0.4, 0.6, 0.1, 0.2).as_dict()["majority"] == 0.2


def test_scoring_nothing_is_an_error_and_not_a_number() -> None:
    with pytest.raises(UserError, match="no rows"):
        bootstrap_means(np.zeros(0))
