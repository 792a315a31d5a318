"""Zero-shot classes and the linear probe against independent computations."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor
from torch.nn import functional as F

from diptych.configs.errors import UserError
from diptych.pretrain.galleries import concept_ids
from diptych.pretrain.probe import ProbeConfig, grouped_holdout, linear_probe
from diptych.pretrain.zero_shot import (
    class_features,
    class_name_prompts,
    member_prompts,
    most_probable,
    read_classes,
    zero_shot_scores,
)


def encode(captions: Sequence[str]) -> Tensor:
    """A deterministic stand-in for a text tower."""
    rows = [
        torch.randn(16, generator=torch.Generator().manual_seed(sum(map(ord, c)) + 31 * len(c)))
        for c in captions
    ]
    return F.normalize(torch.stack(rows), dim=-1)


def test_prompts_of_a_class_are_its_members_distinct_names() -> None:
    prompts = member_prompts(
        ["red fox", "Red  Fox", "owl", "car", "thing"], ["animal", "animal", "animal", "road", ""]
    )
    assert prompts == {"animal": ["owl", "red fox"], "road": ["car"]}
    assert class_name_prompts(["food-vegetable", "sky_weather", ""]) == {
        "food-vegetable": ["food vegetable"],
        "sky_weather": ["sky weather"],
    }


def test_class_features_are_normalised_means_of_normalised_prompt_features() -> None:
    prompts = {"animal": ["owl", "red fox", "bee"], "road": ["car"]}
    names, got = class_features(prompts, encode)
    assert names == ["animal", "road"]
    mean = (encode(["owl"])[0] + encode(["red fox"])[0] + encode(["bee"])[0]) / 3
    torch.testing.assert_close(got[0], mean / mean.norm())
    torch.testing.assert_close(got[1], encode(["car"])[0])


def test_accuracy_chance_and_majority_are_those_of_a_hand_count() -> None:
    prompts = {"a": ["first"], "b": ["second"], "c": ["third"]}
    _, classes = class_features(prompts, encode)
    images = classes[[0, 0, 1, 2, 2]]  # what the images look like
    got = zero_shot_scores(images, ["a", "a", "b", "c", "b"], prompts, encode)
    assert got["accuracy"].value == pytest.approx(4 / 5)
    assert got["accuracy"].chance == pytest.approx(1 / 3)
    assert got["accuracy"].majority == pytest.approx(2 / 5)
    assert (got["classes"], got["n"], got["prompts"]) == (3, 5, 3)


def test_the_most_probable_class_has_the_largest_sum_of_its_captions_probabilities() -> None:
    prompts = {"a": ["one", "two", "five"], "b": ["three"], "c": ["four", "six"]}
    images = F.normalize(torch.randn(30, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    got = most_probable(images, prompts, encode, 20.0)
    features = np.array([encode([t])[0].double().numpy() for texts in prompts.values() for t in texts])
    odds = np.exp(20 * images.double().numpy() @ features.T)
    sums = np.stack([odds[:, :3].sum(1), odds[:, 3], odds[:, 4:].sum(1)], 1)
    assert got.tolist() == sums.argmax(1).tolist()
    assert len(set(got.tolist())) == 3
    accuracy = zero_shot_scores(images, ["abc"[i] for i in got], prompts, encode, logit_scale=20.0)
    assert accuracy["accuracy"].value == 1


def test_the_order_of_classes_and_shared_prompts_change_nothing() -> None:
    images = F.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    labels = ["abc"[i % 3] for i in range(40)]
    prompts = {"a": ["one", "two"], "b": ["two", "three"], "c": ["four"]}
    backwards = dict(reversed(prompts.items()))
    assert zero_shot_scores(images, labels, prompts, encode) == zero_shot_scores(
        images, labels, backwards, encode
    )


@pytest.mark.parametrize("text", ["{a: x, b: [y, z]}", '{"a": "x", "b": ["y", "z"]}', "a: x\nb:\n- y\n- z\n"])
def test_own_classes_come_from_yaml_or_json(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes.yaml").write_text(text)
    assert read_classes(tmp_path / "classes.yaml") == {"a": ["x"], "b": ["y", "z"]}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("- a\n- b\n", "at least two"),
        ("{a: x}", "at least two"),
        ("{a: x, b: 3}", "'b'"),
        ("{a: x, b: []}", "'b'"),
        ("{a: [", "cannot be read"),
    ],
)
def test_a_bad_class_file_is_named_with_the_class(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "classes.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint) as error:
        read_classes(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_classes(tmp_path / "none.yaml")


def test_the_inner_split_keeps_groups_whole_and_both_sides_filled() -> None:
    groups = [f"vendor{i % 5}" for i in range(103)]
    for seed in range(20):
        held = grouped_holdout(groups, seed=seed)
        inside = {g for g, h in zip(groups, held, strict=True) if h}
        outside = {g for g, h in zip(groups, held, strict=True) if not h}
        assert not inside & outside
        assert inside
        assert outside
        assert 0.15 < float(held.mean()) < 0.25
    assert grouped_holdout(["a"] * 90 + ["b"] * 10, seed=0).sum() in (10, 90)


def test_the_probe_equals_scikit_learn_on_standardised_features_and_ignores_test_labels() -> None:
    rng = np.random.default_rng(0)
    labels = np.array([f"c{i % 4}" for i in range(400)])
    x = rng.normal(size=(400, 12)) + 0.8 * np.eye(12)[np.arange(400) % 4]
    groups = [f"v{i}" for i in rng.integers(0, 6, 400)]
    test_x = rng.normal(size=(80, 12)) + 0.8 * np.eye(12)[np.arange(80) % 4]
    test_y = [f"c{i % 4}" for i in range(80)]
    config = ProbeConfig(inverse_penalties=(0.0001, 0.1))
    first, wrong = linear_probe(
        x, list(labels), groups, [(test_x, test_y, None), (test_x, ["new"] * 80, None)], config, samples=100
    )
    model = LogisticRegression(C=first["C"], max_iter=100)
    model.fit((x - x.mean(0)) / x.std(0), labels)
    predicted = model.predict((test_x - x.mean(0)) / x.std(0))
    expected = np.mean([a == b for a, b in zip(predicted, test_y, strict=True)])
    assert first["accuracy"].value == pytest.approx(expected)
    assert first["accuracy"].chance == 0.25
    assert first["accuracy"].majority == 0.25
    assert first["C"] == 0.1  # the other is far too strong
    assert (first["classes"], first["n"], first["n_train"]) == (4, 80, 400)
    assert wrong["accuracy"].value == 0
    assert wrong["C"] == first["C"]


def test_concepts_join_what_shares_a_caption_or_an_emoji_also_at_one_remove() -> None:
    captions = ["fox", "Fox face", "fox  FACE", "owl", "night bird", "car"]
    metas = [
        {"emoji": "1F98A"},
        {"emoji": "1F98A"},
        {"emoji": ""},
        {"emoji": "1F989"},
        {"emoji": "1F989"},
        {},
    ]
    ids = concept_ids(captions, metas).tolist()
    assert ids[0] == ids[1] == ids[2]
    assert ids[3] == ids[4]
    assert len({ids[0], ids[3], ids[5]}) == 3
