"""Losses and their weights against closed forms, and that every setting changes what is trained."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diptych.configs.errors import UserError
from diptych.finetune.adapt.fit import Part, fit
from diptych.finetune.adapt.training import Training
from diptych.finetune.config import AdaptConfig, HeadConfig, StoppingConfig
from diptych.finetune.fusion.operators import build_head
from diptych.finetune.fusion.ordinal import Ordinal
from diptych.finetune.tasks.task import Task, calibrate

from .labelled import everywhere, xor_rows

BINARY = Task("binary", ("no", "yes"))
THREE = Task("multiclass", ("a", "b", "c"))
LABELS = Task("multilabel", ("a", "b", "c"))
ORDERED = Task("ordinal", ("low", "mid", "high"))
NUMBER = Task("regression", ())
TASKS = (BINARY, THREE, LABELS, ORDERED, NUMBER)


def rows(task: Task, n: int = 30, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits float64 [n, C] and targets; ordinal logits fall along a row."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, task.outputs, generator=random, dtype=torch.float64)
    if task.type == "ordinal":
        logits = logits.sort(dim=1, descending=True).values
    if task.type == "regression":
        return logits, torch.randn(n, generator=random, dtype=torch.float64) * 3
    if task.type == "multilabel":
        return logits, torch.randint(2, (n, 3), generator=random)
    return logits, torch.randint(len(task.classes), (n,), generator=random)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_multilabel_and_ordinal_losses_are_sums_of_binary_cross_entropies(smoothing: float) -> None:
    for task in (LABELS, ORDERED):
        logits, targets = rows(task)
        truth = targets if task is LABELS else torch.stack([targets > 0, targets > 1], dim=1)
        wanted = truth.double() * (1 - smoothing) + smoothing / 2
        p = logits.sigmoid()
        each = -(wanted * p.log() + (1 - wanted) * (1 - p).log())
        expected = each.mean() if task is LABELS else each.sum(1).mean()
        torch.testing.assert_close(task.loss(logits, targets, smoothing), expected)


def test_the_regression_loss_is_hubers_on_targets_of_mean_0_and_scale_1() -> None:
    logits, targets = rows(NUMBER)
    task = NUMBER.fitted(targets)
    assert (task.center, task.scale) == pytest.approx((targets.numpy().mean(), targets.numpy().std()))
    error = (logits[:, 0] - (targets - task.center) / task.scale).abs()
    assert bool((error > 1).any())
    assert bool((error < 1).any())
    expected = torch.where(error < 1, error.square() / 2, error - 0.5).mean()
    torch.testing.assert_close(task.loss(logits, targets), expected)
    answers = task.probabilities(logits)
    assert np.allclose(answers, logits.numpy() * task.scale + task.center)
    scale, shift = calibrate(task, logits, targets, "none")  # what is kept with the head
    assert np.allclose(NUMBER.probabilities(scale * logits + shift), answers)


@pytest.mark.parametrize("gamma", [0.5, 2.0])
def test_the_focal_loss_weighs_each_cross_entropy_by_what_is_missing_to_certainty(gamma: float) -> None:
    for task in (BINARY, THREE, LABELS):
        logits, targets = rows(task)
        p = torch.from_numpy(task.probabilities(logits))
        truth = torch.where(targets == 1, p, 1 - p) if task is LABELS else p.gather(1, targets[:, None])
        truth = truth.squeeze(1)
        focal = Task(task.type, task.classes, focal_gamma=gamma)
        expected = (-((1 - truth) ** gamma) * truth.log()).mean()
        torch.testing.assert_close(focal.loss(logits, targets), expected)
        torch.testing.assert_close(focal.plain_loss(logits, targets), task.loss(logits, targets))


def test_the_focal_loss_has_finite_gradients_where_the_answer_is_certain() -> None:
    for task in (BINARY, THREE, LABELS):
        logits = torch.full((2, task.outputs), 80.0)
        logits[:, 1:] = -80
        logits.requires_grad_()
        targets = torch.tensor([[1, 0, 0], [0, 1, 1]]) if task is LABELS else torch.tensor([0, 1])
        Task(task.type, task.classes, focal_gamma=2.0).loss(logits, targets).backward()
        assert logits.grad is not None
        assert bool(logits.grad.isfinite().all())


def test_balanced_weights_give_all_classes_the_same_sum_and_mean_1() -> None:
    for task in (BINARY, THREE, ORDERED):
        targets = torch.tensor([0] * 7 + [1] * 2 + [len(task.classes) - 1])
        weights = Task(task.type, task.classes, "balanced").weights(targets)
        assert weights is not None
        sums = torch.bincount(targets, weights.double())
        torch.testing.assert_close(sums, torch.full_like(sums, float(sums[0])))
        assert float(weights.mean()) == pytest.approx(1)
        assert task.weights(targets) is None
    targets = torch.tensor([[1, 0, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0]])
    weights = Task("multilabel", LABELS.classes, "balanced").weights(targets)
    assert weights is not None
    torch.testing.assert_close((weights * targets).sum(0), (weights * (1 - targets)).sum(0))


def test_numbers_weigh_the_rows_of_a_class_times_the_rows_own_weights() -> None:
    targets = torch.tensor([0, 1, 2, 1])
    weights = Task("multiclass", THREE.classes, (1.0, 3.0, 0.0)).weights(targets, [1.0, 1.0, 1.0, 2.0])
    assert weights is not None
    raw = torch.tensor([1.0, 3.0, 0.0, 6.0])
    torch.testing.assert_close(weights, raw / raw.mean())
    logits, _ = rows(THREE, 4)
    each = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    torch.testing.assert_close(THREE.loss(logits, targets, weights=weights), (each * weights).mean())
    labels = torch.tensor([[1, 0, 1], [0, 1, 1]])
    weights = Task("multilabel", LABELS.classes, (2.0, 1.0, 1.0)).weights(labels, [1.0, 3.0])
    assert weights is not None
    raw = torch.tensor([[2.0, 1, 1], [3, 3, 3]])
    torch.testing.assert_close(weights, raw / raw.mean())
    with pytest.raises(UserError, match="weights of all training rows are 0"):
        THREE.weights(targets, [0.0] * 4)


@given(seed=st.integers(0, 10_000), spread=st.floats(0.01, 20))
@settings(max_examples=60, deadline=None)
def test_class_probabilities_of_any_ordinal_head_sum_to_1_and_thresholds_fall(
    seed: int, spread: float
) -> None:
    torch.manual_seed(seed)
    task = Task("ordinal", ("a", "b", "c", "d", "e"))
    head = build_head(HeadConfig(op="image"), {"image": 8}, task.outputs, None, task.link)
    assert isinstance(head, Ordinal)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(spread * torch.randn_like(parameter))
    logits = head({"image": torch.randn(16, 8)}, {"image": torch.ones(16, dtype=torch.bool)})
    assert bool((logits.diff(dim=1) <= 0).all())
    p = task.probabilities(logits)
    assert p.shape == (16, 5)
    assert (p >= 0).all()
    assert np.allclose(p.sum(1), 1)
    greater = 1 - p.cumsum(1)[:, :-1]
    assert np.allclose(greater, torch.sigmoid(logits.double()).detach().numpy(), atol=1e-12)


def test_thresholds_start_at_the_frequencies_of_the_classes() -> None:
    head = build_head(HeadConfig(op="text"), {"text": 4}, 3, None, "cumulative")
    assert isinstance(head, Ordinal)
    head.fit_thresholds([70, 5, 15, 10])
    p = Task("ordinal", ("a", "b", "c", "d")).probabilities(head.thresholds[None])[0]
    assert np.allclose(p, np.array([70.5, 5.5, 15.5, 10.5]) / 102, atol=1e-6)


def fitted(task: Task, targets: torch.Tensor, weights: torch.Tensor | None = None, **options: Any) -> Any:
    """A head trained for a few epochs on features that hold the answer, and its answers for all rows."""
    features = xor_rows(len(targets), 1).rows
    op: Any = options.pop("op", "concat")
    adapt = AdaptConfig(**{"lr": 1e-2, "epochs": 3, "batch_size": 64, "modality_dropout": 0.0} | options)
    part = Part(features, targets, weights)
    got = fit(
        HeadConfig(op=op), adapt, StoppingConfig(patience=9), task, part, Part(features, targets),
        widths={"image": 16, "text": 16}, seed=0,
    )  # fmt: skip
    batch, present = features.batch(torch.arange(len(targets)))
    with torch.no_grad():
        logits = got.scale * got.head.eval()(batch, present) + got.shift
    return got, task.probabilities(logits)


def targets_of(task: Task, n: int = 200) -> torch.Tensor:
    signs = xor_rows(n, 1).targets
    noise = torch.rand(n, generator=torch.Generator().manual_seed(3))
    if task.type == "regression":
        return 1000 + 50 * signs.double() + noise
    if task.type == "multilabel":
        return torch.stack([signs, 1 - signs, (noise < 0.1).long()], dim=1)
    return signs if task.type == "binary" else (signs + (noise < 0.2).long()).clamp_max(2)


def state(got: Any) -> torch.Tensor:
    return torch.cat([v.flatten() for v in got.head.state_dict().values()])


@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.type)
def test_every_loss_setting_of_a_task_changes_its_weights(task: Task) -> None:
    targets = targets_of(task)
    plain = state(fitted(task, targets)[0])
    assert torch.equal(state(fitted(task, targets)[0]), plain)
    own = torch.linspace(0, 2, len(targets))
    assert not torch.equal(state(fitted(task, targets, own)[0]), plain)
    if task.type == "regression":
        return
    assert not torch.equal(state(fitted(task, targets, label_smoothing=0.1)[0]), plain)
    numbers = tuple(float(i + 1) for i in range(len(task.classes)))
    for weight in ("balanced", numbers):
        # one of the literals
        assert not torch.equal(state(fitted(Task(task.type, task.classes, weight), targets)[0]), plain)  # type: ignore[arg-type]
    if task.type != "ordinal":
        focal = Task(task.type, task.classes, focal_gamma=2.0)
        assert not torch.equal(state(fitted(focal, targets)[0]), plain)


def test_a_row_of_weight_0_is_not_learned_from() -> None:
    targets = targets_of(BINARY)
    wrong = targets.clone()
    wrong[100:] = 1 - wrong[100:]
    weights = torch.ones(200)
    weights[100:] = 0
    inner = Part(xor_rows(200, 1).rows, targets)
    states: list[torch.Tensor] = []
    for labels in (targets, wrong):
        got = fit(
            HeadConfig(op="concat"), AdaptConfig(epochs=2, batch_size=64), StoppingConfig(), BINARY,
            Part(inner.rows, labels, weights), inner, widths={"image": 16, "text": 16}, seed=0,
        )  # fmt: skip
        states.append(state(got))
    assert torch.equal(*states)


def test_of_rows_that_say_nothing_plain_losses_learn_the_frequency_and_balanced_ones_a_half() -> None:
    targets = torch.tensor([0] * 9 + [1])
    for task, p in ((BINARY, 0.1), (Task("binary", BINARY.classes, "balanced"), 0.5)):
        logit = torch.logit(torch.tensor(p)).clone().requires_grad_()
        task.loss(logit.expand(10, 1), targets, weights=task.weights(targets)).backward()
        assert logit.grad is not None
        assert float(logit.grad) == pytest.approx(0, abs=1e-6)


def test_balanced_sampling_draws_each_class_as_often_and_changes_the_weights() -> None:
    targets = torch.tensor([0] * 180 + [1] * 15 + [2] * 5)
    plain, balanced = (fitted(THREE, targets, sampling=how)[0] for how in ("shuffled", "balanced"))
    assert not torch.equal(state(plain), state(balanced))
    adapt = AdaptConfig(sampling="balanced")
    run = Training(plain.head, THREE, adapt, StoppingConfig(), 0, lambda row: None)
    part = Part(xor_rows(200, 1).rows, targets)
    drawn = torch.cat([rows for _ in range(50) for rows in run._order(part, 64)])
    share = torch.bincount(targets[drawn]) / len(drawn)
    assert share.tolist() == pytest.approx([1 / 3] * 3, abs=0.02)
    assert len(drawn) == 50 * 200


@pytest.mark.parametrize("op", ["concat", "bilinear", "late", "similarity", "image"])
@pytest.mark.parametrize("task", TASKS, ids=lambda t: t.type)
def test_every_head_learns_every_task_that_it_may_answer(task: Task, op: str) -> None:
    if op == "similarity" and task.type in ("multiclass", "multilabel"):
        return
    targets = targets_of(task)
    got, p = fitted(task, targets, op=op, epochs=15)
    assert np.isfinite(p).all()
    assert p.shape == (200, max(1, len(task.classes)))
    if task.type == "regression":  # in the target's own unit
        assert p.mean() == pytest.approx(1025, abs=15)
        assert (got.scale, got.shift) == pytest.approx(
            (float(targets.std(correction=0)), float(targets.mean()))
        )
    if op in ("concat", "bilinear"):
        first = task.value(task.metrics[0], targets.numpy(), p)
        assert first < 15 if task.type == "regression" else first > 0.6


def test_late_heads_mix_answers_in_the_way_of_the_task() -> None:
    for task in TASKS:
        got, _ = fitted(task, targets_of(task), op="late")
        head = got.head.inner if isinstance(got.head, Ordinal) else got.head
        features, _ = xor_rows(20, 4).rows.batch(torch.arange(20))
        with torch.no_grad():
            both = got.head(features, everywhere(20))
            alone = [head.single(features, everywhere(20), k) for k in ("image", "text")]
        if task.type in ("regression", "ordinal"):
            expected = (alone[0] + alone[1]) / 2
            if task.type == "ordinal":
                expected = expected + got.head.thresholds
            torch.testing.assert_close(both, expected)
        else:
            parts = [task.probabilities(logits) for logits in alone]
            assert np.allclose(task.probabilities(both), sum(parts) / 2, atol=1e-6)


@pytest.mark.parametrize("task", [LABELS, ORDERED], ids=lambda t: t.type)
def test_one_temperature_undoes_logits_that_were_stretched(task: Task) -> None:
    random = torch.Generator().manual_seed(0)
    logits, _ = rows(task, 4000)
    p = torch.from_numpy(task.probabilities(logits))
    drawn = torch.rand(4000, 1, generator=random, dtype=torch.float64)
    if task is LABELS:
        targets = (torch.rand(p.shape, generator=random, dtype=torch.float64) < p).long()
    else:
        targets = (drawn > p.cumsum(1)[:, :-1]).sum(1)
    scale, shift = calibrate(task, 5 * logits, targets, "temperature")
    assert scale == pytest.approx(0.2, abs=0.02)
    assert shift == 0
    before, after = (
        task.value("ece", targets.numpy(), task.probabilities(a * 5 * logits)) for a in (1, scale)
    )
    assert after < before / 2
