"""Recall at k against brute force, small worked examples, and counting of all orders."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from diptych.pretrain import retrieval
from diptych.pretrain.retrieval import best_ranks, hit_chance, retrieval_scores, top_k, unique_captions


def features(n: int, d: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=-1)


def test_captions_are_one_if_they_differ_in_case_and_white_space_only() -> None:
    ids, unique = unique_captions(["Red  apple", "pear", "red apple ", "e\u0301 key", "\u00c9 KEY"])
    assert ids.tolist() == [0, 1, 0, 2, 2]
    assert unique == ["Red  apple", "pear", "e\u0301 key"]


def test_a_worked_example_by_hand() -> None:
    # images 0 and 2 are "cat"; image 1 is "dog"; captions: cat, dog, fox(of image 3)
    text = torch.eye(3)
    images = torch.tensor([[0.9, 0.1, 0.0], [0.8, 0.5, 0.3], [0.1, 0.2, 0.9], [0.0, 0.1, 0.9]])
    scores = retrieval_scores(F.normalize(images, dim=-1), text, np.array([0, 1, 0, 2]))
    assert scores["image_to_text"]["R@1"].value == 0.5  # images 0 and 3
    # cat -> image 0 first; dog -> image 1 first; fox -> image 3 before image 2
    assert scores["text_to_image"]["R@1"].value == 1.0
    assert scores["image_to_text"]["R@1"].chance == pytest.approx(1 / 3)
    # of four images two are cats, one a dog, one a fox
    assert scores["text_to_image"]["R@1"].chance == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    assert (scores["n_images"], scores["n_captions"]) == (4, 3)
    assert scores["image_to_text"]["R@5"].value == 1.0
    assert scores["image_to_text"]["R@5"].chance == 1.0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000), n=st.integers(1, 40), captions=st.integers(1, 12), chunk=st.integers(1, 90)
)
def test_ranks_equal_brute_force_for_any_chunk_size(seed: int, n: int, captions: int, chunk: int) -> None:
    rng = np.random.default_rng(seed)
    labels = np.unique(rng.integers(0, captions, n), return_inverse=True)[1]
    image, text = features(n, 3, seed).double().round(decimals=1), features(labels.max() + 1, 3, seed + 1)
    similar = (image @ text.double().T).round(decimals=6).numpy()
    every = np.arange(len(text))
    expected_i2t = [
        [*np.argsort(-row, kind="stable")].index(label) for row, label in zip(similar, labels, strict=True)
    ]
    expected_t2i = []
    for j in every:
        order = np.argsort(-similar[:, j], kind="stable")
        expected_t2i.append(int(np.flatnonzero(labels[order] == j)[0]))
    before = retrieval._ELEMENTS
    try:
        retrieval._ELEMENTS = chunk
        assert best_ranks(image, text, labels, every).tolist() == expected_i2t
        assert best_ranks(text, image, every, labels).tolist() == expected_t2i
        values, found = top_k(image, text, 4)
        assert found.tolist() == np.argsort(-similar, axis=1, kind="stable")[:, :4].tolist()
        np.testing.assert_allclose(values, np.take_along_axis(similar, found, 1))
    finally:
        retrieval._ELEMENTS = before


def test_recall_equals_scikit_learns_top_k_accuracy() -> None:
    from sklearn.metrics import top_k_accuracy_score

    image, text = features(60, 8, 0), features(60, 8, 1)
    scores = retrieval_scores(image, text, np.arange(60))
    for k in (1, 5, 10):
        expected = top_k_accuracy_score(np.arange(60), (image @ text.T).numpy(), k=k, labels=np.arange(60))
        assert scores["image_to_text"][f"R@{k}"].value == pytest.approx(expected)


def test_a_collapsed_model_scores_as_chance_and_a_broken_one_is_an_error() -> None:
    same = F.normalize(torch.ones(200, 4), dim=-1)
    scores = retrieval_scores(same, same, np.arange(200))
    for k in (1, 5, 10):
        got = scores["image_to_text"][f"R@{k}"]
        assert got.value == pytest.approx(got.chance)
    broken = same.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(ValueError, match="diverged"):
        retrieval_scores(broken, same, np.arange(200))


@pytest.mark.parametrize(
    ("n", "m", "k"), [(5, 1, 1), (5, 2, 2), (6, 3, 1), (6, 2, 4), (4, 4, 1), (3, 1, 7), (7, 6, 3)]
)
def test_chance_equals_counting_all_orders(n: int, m: int, k: int) -> None:
    hits = [min(order[:m]) < k for order in itertools.permutations(range(n))]
    assert float(hit_chance(n, m, k)) == pytest.approx(np.mean(hits), abs=1e-12)


def test_random_features_score_within_their_interval_of_chance() -> None:
    labels = np.unique(np.random.default_rng(0).integers(0, 300, 900), return_inverse=True)[1]
    scores = retrieval_scores(features(900, 64, 0), features(labels.max() + 1, 64, 1), labels, samples=500)
    for direction in ("image_to_text", "text_to_image"):
        got = scores[direction]["R@10"]
        assert got.low <= got.chance <= got.high


def test_intervals_widen_when_queries_belong_to_few_concepts() -> None:
    image, text = features(200, 16, 0), features(200, 16, 1)
    image[:100] = text[:100]  # the first half is known perfectly
    apart = retrieval_scores(image, text, np.arange(200))["image_to_text"]["R@1"]
    together = retrieval_scores(image, text, np.arange(200), concepts=np.arange(200) // 50)["image_to_text"][
        "R@1"
    ]
    assert apart.value == together.value
    assert together.high - together.low > 2 * (apart.high - apart.low)
