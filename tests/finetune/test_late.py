"""Late fusion: each rule against its definition, and stacking against leaks of what it was trained on."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from torch import Tensor

from diptych.finetune.adapt.fit import Part
from diptych.finetune.config import HeadConfig
from diptych.finetune.encoders.features import FeatureRows
from diptych.finetune.fusion.late import FOLDS, Stacking, fold_of
from diptych.finetune.fusion.operators import Late, build_head
from diptych.finetune.tasks.task import Task

from .heads import BINARY, LATE, TASKS, THREE, accuracy, all_there, inputs, learned, make

RULES = [name for name in LATE if name != "late stacking"]


def own(head: Late, features: dict[str, Tensor], outputs: int) -> dict[str, NDArray[Any]]:
    """Each modality's own probabilities [n, classes]."""
    task = TASKS[outputs]
    return {
        k: task.probabilities(head.classify[k](head.standard[k](features[k].double())))
        for k in head.modalities
    }


def doubled(name: str, outputs: int) -> Late:
    head = make(name, outputs, THREE).double()
    assert isinstance(head, Late)
    for classifier in head.classify.values():
        for parameter in classifier.parameters():
            parameter.data *= 10  # they must disagree
    return head


@pytest.mark.parametrize("name", LATE)
@pytest.mark.parametrize("outputs", [1, 3])
def test_with_one_modality_the_result_is_its_own_prediction(name: str, outputs: int) -> None:
    head, features = doubled(name, outputs), inputs(50, widths=THREE)
    features = {k: v.double() if v.is_floating_point() else v for k, v in features.items()}
    expected = own(head, features, outputs)
    for k in THREE:
        present = {other: torch.full((50,), other == k) for other in THREE}
        got = TASKS[outputs].probabilities(head(features, present))
        np.testing.assert_allclose(got, expected[k], atol=1e-12)
        assert (got.argmax(1) == expected[k].argmax(1)).all()


def by_hand(rule: str, p: list[NDArray[Any]], weights: list[float]) -> NDArray[Any]:
    """A rule on the probabilities [classes] of one row."""
    mean = np.mean(p, axis=0)
    if rule == "late product":
        product = np.prod(p, axis=0) ** (1 / len(p))
        return product / product.sum()
    if rule == "late vote":
        votes = Counter(int(one.argmax()) for one in p)
        most = [c for c, count in votes.items() if count == max(votes.values())]
        winner = max(most, key=lambda c: mean[c])
        agreed = [one for one in p if one.argmax() == winner]
        return np.mean(agreed, axis=0)
    shares = weights if rule == "late learned" else [1.0] * len(p)
    return np.average(p, axis=0, weights=shares)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("outputs", [1, 3])
def test_every_rule_is_its_definition(name: str, outputs: int) -> None:
    head, features = doubled(name, outputs), inputs(200, widths=THREE)
    features = {k: v.double() if v.is_floating_point() else v for k, v in features.items()}
    present = all_there(200, THREE)
    for i, k in enumerate(THREE):  # ties: two voices
        present[k][50 * i : 50 * i + 50] = False
    p = own(head, features, outputs)
    got = TASKS[outputs].probabilities(head(features, present))
    scores = head.scores.tolist() if head.learned else [0.0] * 3
    for row in range(200):
        there = [k for k in THREE if present[k][row]]
        weights = [float(np.exp(scores[list(THREE).index(k)])) for k in there]
        np.testing.assert_allclose(got[row], by_hand(name, [p[k][row] for k in there], weights), atol=1e-12)


def test_a_majority_outvotes_a_loud_voice_and_the_mean_decides_between_equals() -> None:
    head = doubled("late vote", 3)
    loud, soft = torch.tensor([[8.0, 0.0, 0.0]]), torch.tensor([[0.0, 0.2, 0.0]])
    p = head.mixture([loud, soft, soft], all_there(1, THREE)).exp()
    assert int(p.argmax()) == 1
    torch.testing.assert_close(p, soft.softmax(1))
    two = all_there(1, THREE) | {"audio": torch.tensor([False])}
    torch.testing.assert_close(head.mixture([loud, soft, soft], two).exp(), loud.softmax(1))


@pytest.mark.parametrize("rule", ["mean", "learned", "product"])
def test_yes_and_no_per_label_and_numbers_meet_by_the_same_rules(rule: Any) -> None:
    features, present = inputs(9, widths=THREE), all_there(9, THREE)
    torch.manual_seed(0)
    config = HeadConfig(op="late", rule=rule)
    labels = build_head(config, THREE, 4, None, "sigmoid").eval()
    assert isinstance(labels, Late)
    logits = torch.stack([labels.single(features, present, k) for k in THREE])
    mixed = logits.mean(0).sigmoid() if rule == "product" else logits.sigmoid().mean(0)
    torch.testing.assert_close(labels(features, present).sigmoid(), mixed)
    if rule != "product":
        numbers = build_head(config, THREE, 1, None, "identity").eval()
        assert isinstance(numbers, Late)
        mean = torch.stack([numbers.single(features, present, k) for k in THREE]).mean(0)
        torch.testing.assert_close(numbers(features, present), mean)


def gradients(head: Stacking, features: dict[str, Tensor], targets: Tensor) -> dict[str, Tensor]:
    head.zero_grad()
    parts = head.parts(features, all_there(len(targets), THREE))
    torch.stack([BINARY.loss(logits[rows], targets[rows]) for logits, rows in parts]).sum().backward()
    return {n: p.grad.clone() for n, p in head.named_parameters() if p.grad is not None}


def test_no_copy_ever_sees_the_labels_of_its_own_fold() -> None:
    head, features = make("late stacking", 1, THREE), inputs(400, widths=THREE)
    assert isinstance(head, Stacking)
    features["group"] = torch.arange(400) // 4
    fold = fold_of(features["group"])
    assert fold.unique().tolist() == list(range(FOLDS))
    assert all(len(fold[features["group"] == g].unique()) == 1 for g in range(100))
    targets = torch.arange(400) % 3 % 2
    before = gradients(head, features, targets)
    after = gradients(head, features, torch.where(fold == 2, 1 - targets, targets))
    for k in THREE:
        for f in range(FOLDS):
            same = torch.equal(before[f"copies.{k}.weight"][f], after[f"copies.{k}.weight"][f])
            assert same == (f == 2)
    assert not torch.equal(before["combine.weight"], after["combine.weight"])


def test_the_combination_learns_from_answers_to_rows_that_were_not_trained_on() -> None:
    head, features = make("late stacking", 1, THREE), inputs(60, widths=THREE)
    assert isinstance(head, Stacking)
    fold = fold_of(features["group"])
    *_, (got, rows) = head.parts(features, all_there(60, THREE))
    assert rows.all()
    said = [
        head.copies[k](head.standard[k](features[k])).unflatten(1, (FOLDS, 1))[torch.arange(60), fold]
        for k in THREE
    ]
    torch.testing.assert_close(got, head.combine(torch.cat(said, dim=1)))
    got.sum().backward()
    assert all(p.grad is None for k in THREE for p in head.copies[k].parameters())


def memory_rows(n: int, seed: int) -> Part:
    """A picture of so many dimensions of noise that a classifier remembers every training row, and a text
    that tells the truth most of the time."""
    random = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, 2, (n,), generator=random)
    image = torch.randn(n, 400, generator=random)
    text = (2.0 * targets[:, None] - 1) * torch.tensor([1.0, 0, 0, 0]) + torch.randn(n, 4, generator=random)
    index = {k: torch.arange(n) for k in ("image", "text")}
    return Part(FeatureRows({"image": image, "text": text}, index, torch.arange(n)), targets)


def test_stacking_is_not_taken_in_by_a_modality_that_was_learned_by_heart() -> None:
    train, inner, test = memory_rows(300, 1), memory_rows(300, 2), memory_rows(2000, 3)
    options = {"epochs": 40, "weight_decay": 0.0, "modality_dropout": 0.0}
    text = accuracy(learned("text with a hidden layer", train, inner), test)
    stacking = learned("late stacking", train, inner, **options)
    assert accuracy(stacking, test) > text - 0.03
    assert accuracy(learned("late", train, inner, **options), test) < text - 0.05
    trust = stacking.state_dict()["combine.weight"][0].abs()
    assert trust[1] > 3 * trust[0]


def test_stacking_agrees_with_scikit_learns_on_the_same_folds() -> None:
    parts = [memory_rows(n, seed) for n, seed in ((600, 4), (300, 5), (2000, 6))]
    tables = [part.rows.tables for part in parts if isinstance(part.rows, FeatureRows)]
    for table in tables:
        table["image"] = table["image"][:, :8] + 0.5 * table["text"][:, :1]  # it also knows a little
    head = learned("late stacking", *parts[:2], epochs=40, weight_decay=0.0, modality_dropout=0.0)
    x, y = [{k: t.numpy() for k, t in table.items()} for table in tables], parts[0].targets.numpy()
    cut: dict[str, Any] = {"cv": GroupKFold(FOLDS), "groups": fold_of(torch.arange(600)).numpy()}
    model = LogisticRegression(C=10)
    unseen = [
        cross_val_predict(model, x[0][k], y, method="decision_function", **cut) for k in ("image", "text")
    ]
    meta = LogisticRegression(C=10).fit(np.stack(unseen, axis=1), y)
    single = [LogisticRegression(C=10).fit(x[0][k], y).decision_function(x[2][k]) for k in ("image", "text")]
    expected = meta.predict_proba(np.stack(single, axis=1))[:, 1]
    features, present = parts[2].rows.batch(torch.arange(2000))
    got = Task("binary", ("0", "1")).probabilities(head(features, present))[:, 1]
    assert np.abs(got - expected).mean() < 0.03
