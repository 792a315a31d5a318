"""Metrics of retrieval beside brute force over every query, CLIP_benchmark's recall, and random orders."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.finetune.scores.intervals import paired_intervals
from diptych.finetune.scores.results import headline
from diptych.finetune.tasks.retrieval_metrics import KS, RETRIEVAL, WAYS, chances, galleries
from diptych.finetune.tasks.task import Task

TASK = Task("retrieval", ())


def make_pairs(seed: int, n: int = 40, *, width: int = 4, ties: bool = False) -> tuple[Any, Any]:
    """Rows that share pictures, texts and keys, some without a picture or a text, in two galleries."""
    random = np.random.default_rng(seed)
    targets = np.stack(
        [
            random.integers(1, n // 2, n),
            random.integers(1000, 1000 + n, n),
            random.integers(5000, 5000 + n, n),
            random.integers(0, 2, n),
        ],
        axis=1,
    ).astype(np.int64)
    lacks = random.random(n)
    targets[lacks < 0.1, 0] = 0
    targets[lacks > 0.9, 1] = 0
    known = random.normal(size=(6000, width))
    if ties:
        known = np.round(known)  # many equal directions
        known[:, 0] += 10
    known /= np.linalg.norm(known, axis=1, keepdims=True)
    known[0] = 0
    return targets, np.concatenate([known[targets[:, 0]], known[targets[:, 1]]], axis=1)


def brute_force(targets: Any, p: Any, weights: Any) -> dict[str, float]:
    """Every query by itself: sorted by falling cosine, ties by the hash of the content."""
    half = p.shape[1] // 2
    vectors = (p[:, :half], p[:, half:])
    values: dict[str, list[tuple[float, float]]] = {name: [] for name in RETRIEVAL}
    for way, (source, aim) in WAYS.items():
        for gallery in set(targets[:, 3].tolist()):
            rows = [i for i in range(len(targets)) if targets[i, 3] == gallery]
            items = sorted({int(targets[i, aim]) for i in rows} - {0})
            first = {item: next(i for i in rows if targets[i, aim] == item) for item in items}
            keys = {item: {int(targets[i, 2]) for i in rows if targets[i, aim] == item} for item in items}
            for query in sorted({int(targets[i, source]) for i in rows} - {0}):
                own = [i for i in rows if targets[i, source] == query]
                wanted = {int(targets[i, 2]) for i in own}
                cosine = {x: round(float(vectors[source][own[0]] @ vectors[aim][first[x]]), 6) for x in items}
                order = sorted(items, key=lambda x: (-cosine[x], x))
                hits = [bool(keys[x] & wanted) for x in order]
                if not any(hits):
                    continue
                weight = float(weights[own[0]])
                for k in KS:
                    values[f"{way}_R@{k}"].append((any(hits[:k]), weight))
                values[f"{way}_median_rank"].append((hits.index(True) + 1, weight))
                r = sum(hits)
                precision = sum(hits[i] * sum(hits[: i + 1]) / (i + 1) for i in range(r)) / r
                values[f"{way}_mAP@R"].append((precision, weight))
    made: dict[str, float] = {}
    for name, found in values.items():
        if not name.endswith("median_rank") and found:
            made[name] = sum(v * w for v, w in found) / sum(w for _, w in found)
        elif found:
            made[name] = float(np.median(np.repeat([v for v, _ in found], [int(w) for _, w in found])))
    made["mean_recall"] = float(np.mean([made[f"{way}_R@{k}"] for way in WAYS for k in KS]))
    return made


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), ties=st.booleans())
def test_metrics_are_those_of_brute_force(seed: int, ties: bool) -> None:
    targets, p = make_pairs(seed, ties=ties)
    weights = np.random.default_rng(seed).integers(1, 4, len(targets)).astype(np.float64)
    for some in (np.ones(len(targets)), weights):
        expected = brute_force(targets, p, some)
        for name, prepare in RETRIEVAL.items():
            assert prepare(targets, p)(some) == pytest.approx(expected[name], abs=1e-12), name


def test_recall_is_clip_benchmarks() -> None:
    """Five texts per picture, as in COCO; the function below is CLIP_benchmark's own, on dense scores."""

    def recall_at_k(scores: torch.Tensor, positive_pairs: torch.Tensor, k: int) -> torch.Tensor:
        topk = torch.topk(scores, k, dim=1)[1]
        positives = positive_pairs.float().sum(dim=1)
        onehot = torch.nn.functional.one_hot(topk, num_classes=scores.shape[1])
        found = (onehot * positive_pairs.reshape(len(scores), 1, -1)).sum(dim=(1, 2))
        return ((found / positives) > 0).float().mean()

    n, per, width = 60, 5, 8
    random = np.random.default_rng(0)
    images = random.normal(size=(n, width))
    texts = np.repeat(images, per, axis=0) + 2 * random.normal(size=(n * per, width))
    images, texts = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (images, texts))
    of = np.repeat(np.arange(n), per)
    targets = np.stack([of + 1, np.arange(n * per) + 1, np.arange(n * per), 0 * of], axis=1)
    p = np.concatenate([images[of], texts], axis=1)
    scores = torch.from_numpy(texts @ images.T)
    pairs = torch.from_numpy(of[:, None] == np.arange(n))
    for k in KS:
        got = {way: TASK.value(f"{way}_R@{k}", targets, p) for way in WAYS}
        assert got["text_to_image"] == pytest.approx(float(recall_at_k(scores, pairs, k)))
        assert got["image_to_text"] == pytest.approx(float(recall_at_k(scores.T, pairs.T, k)))
    assert galleries(targets)["image_to_text"] == {"queries": n, "size": n * per, "matches": per}


def test_chance_is_the_mean_over_random_orders_and_what_a_collapsed_model_gets() -> None:
    targets, p = make_pairs(3, 60)
    expected = chances(targets)
    drawn: dict[str, list[float]] = {name: [] for name in RETRIEVAL}
    random = np.random.default_rng(0)
    for _ in range(60):
        table = random.normal(size=(1100, 16))
        vectors = np.concatenate([table[targets[:, 0]], table[targets[:, 1]]], axis=1)
        for name in RETRIEVAL:
            drawn[name].append(TASK.value(name, targets, vectors))
    for name, values in drawn.items():
        error = np.std(values) / len(values) ** 0.5
        if name.endswith("median_rank"):  # the median of all draws together, not of each
            assert abs(np.mean(values) - expected[name]) < 1
        else:
            assert abs(np.mean(values) - expected[name]) < 4 * error, name
    same = np.ones_like(p) / p.shape[1] ** 0.5
    n = 400
    alone = np.stack(
        [random.permutation(n) + 1, random.permutation(n) + 1, np.arange(n), 0 * np.arange(n)], 1
    )
    assert TASK.value("image_to_text_R@1", alone, np.resize(same, (n, 8))) <= 3 / n  # and not 1


def test_gains_are_positive_where_a_head_is_better_and_all_hits_are_no_certainty() -> None:
    targets, p = make_pairs(1, 60, width=16)
    groups = targets[:, 2]
    metrics = ("mean_recall", "text_to_image_R@10", "text_to_image_median_rank")
    some = [i for i in range(len(targets)) if targets[i, 3] == 0][:9]
    few = targets[some]
    scores, gains = paired_intervals(
        few, {"own": p[some], "zero_shot": np.resize(p[0], p[some].shape)}, metrics, groups[some],
        task=TASK, against="zero_shot", samples=100,
    )  # fmt: skip
    assert set(gains) == {"own"}
    sure = scores["own"]["text_to_image_R@10"]
    assert sure.value == 1
    assert sure.low < 1


def test_a_headline_tells_what_is_undefined() -> None:
    """With few resamples none may hold a query: then there are values and no intervals."""
    nothing = {"value": 0.5, "low": None, "high": None}
    names = ("mean_recall", *(f"{way}_R@1" for way in WAYS))
    head = {"metrics": dict.fromkeys(names, nothing)}
    result: dict[str, Any] = {"type": "retrieval", "best": "own", "heads": {"own": head}, "chance": None}
    result["chances"] = dict.fromkeys(names)
    result["galleries"] = {"n": 1} | {way: {"size": 9} for way in WAYS}
    said = headline(result)
    assert "mean recall is 50.0 % (undefined to undefined; chance undefined)" in said
    assert "(R@1; chance undefined and undefined)" in said


def test_the_mean_of_seeds_is_the_mean_of_their_cosines() -> None:
    _, p = make_pairs(5)
    _, q = make_pairs(6)
    half = p.shape[1] // 2

    def cosines(x: Any) -> Any:
        return x[:, : x.shape[1] // 2] @ x[:, x.shape[1] // 2 :].T

    expected = (cosines(p) + cosines(q)) / 2
    assert np.abs(cosines(TASK.averaged([p, q])) - expected).max() < 1e-12
    rows = TASK.predicted(TASK.averaged([p, q]))
    whole = p[:, :half].any(1) & p[:, half:].any(1) & q[:, :half].any(1) & q[:, half:].any(1)
    assert np.allclose(rows[whole], np.diag(expected)[whole])
