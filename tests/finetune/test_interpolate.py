"""Means of weights: their ends bit for bit, what the inner rows choose, and soups."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diptych.finetune.adapt.fit import Fitted, LiveRows, Part, fit, logits_of, soup
from diptych.finetune.adapt.interpolate import between, greedy, mean_state
from diptych.finetune.config import AdaptConfig, HeadConfig, StoppingConfig
from diptych.finetune.tasks.task import calibrate, metric_value
from diptych.pretrain.model import LoadedModel, load_model

from .corners import TASK, checkpoint, corners, frozen, train
from .labelled import xor_rows


@pytest.fixture
def model(tmp_path: Path) -> LoadedModel:
    return load_model(checkpoint(tmp_path / "checkpoint"))


def equal(a: Any, b: Any) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def two_states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    random = torch.Generator().manual_seed(0)
    first = {"w": torch.randn(5, 3, generator=random), "n": torch.tensor(3)}
    return first, {"w": torch.randn(5, 3, generator=random), "n": torch.tensor(8)}


@given(st.floats(0, 1))
def test_between_is_the_line_and_its_ends_are_exact(alpha: float) -> None:
    pretrained, tuned = two_states()
    got = between(pretrained, tuned, alpha)
    line = (1 - alpha) * pretrained["w"].double() + alpha * tuned["w"].double()
    assert (got["w"].double() - line).abs().max() < 1e-6
    assert equal(between(pretrained, tuned, 0.0), pretrained)
    assert equal(between(pretrained, tuned, 1.0), tuned)
    assert got["n"].dtype == torch.int64


@pytest.mark.parametrize("method", ["lp_ft", "lora"])
def test_alpha_0_gives_the_pretrained_encoders_and_1_the_tuned_ones(method: str, model: LoadedModel) -> None:
    pretrained = copy.deepcopy(model.clip.state_dict())
    short = {"method": method, "epochs": 2, "encoder_epochs": 3}
    train(model, **short)
    tuned = copy.deepcopy(model.clip.state_dict())
    assert not equal(tuned, pretrained)
    for alpha, truth in ((0, pretrained), (1, tuned)):
        model.clip.load_state_dict(pretrained)
        fitted, _ = train(model, **short, wise_ft=alpha)
        assert fitted.facts["alpha"] == alpha
        assert equal(dict(model.clip.state_dict()), dict(truth))
    model.clip.load_state_dict(pretrained)
    train(model, **short, wise_ft=0.25)
    half = model.clip.state_dict()["visual.proj"]
    line = 0.75 * pretrained["visual.proj"] + 0.25 * tuned["visual.proj"]
    torch.testing.assert_close(half, line, atol=1e-6, rtol=0)


def test_auto_takes_what_the_inner_rows_score_best_with_a_head_of_its_own(model: LoadedModel) -> None:
    fitted, log = train(model, method="lp_ft", wise_ft="auto", epochs=3, encoder_epochs=4)
    scores = {float(alpha): score for alpha, score in fitted.facts["inner_by_alpha"].items()}
    assert list(scores) == [0.0, 0.25, 0.5, 0.75, 1.0]
    best = max(scores.values())
    assert fitted.facts["alpha"] == min(alpha for alpha, score in scores.items() if score == best)
    inner = corners(model, 80, 2)
    p = TASK.probabilities(logits_of(fitted.head, inner.rows))
    assert metric_value("auroc", inner.targets.numpy(), p) == pytest.approx(best, abs=1e-3)
    tried = [row["alpha"] for row in log if "alpha" in row]
    assert set(tried) == set(scores)
    assert [row["epoch"] for row in log] == list(range(len(log)))
    for alpha in scores:  # no head gets worse by what it is trained again
        assert scores[alpha] >= max(row["inner_auroc"] for row in log if row.get("alpha") == alpha) - 1e-12


def test_the_tuned_model_does_not_get_worse_on_the_inner_rows(model: LoadedModel) -> None:
    _, log = train(model, method="lp_ft", wise_ft="auto", epochs=3, encoder_epochs=4)
    tuned = max(row["inner_auroc"] for row in log if "alpha" not in row)
    assert max(row["inner_auroc"] for row in log if "alpha" in row) >= tuned - 1e-3


def test_the_mean_of_states_is_in_fp64_and_of_equals_exactly_themselves() -> None:
    first, second = two_states()
    for count in (2, 3, 7):
        assert equal(mean_state([first] * count), first)
    truth = (2 * first["w"].double() + second["w"].double()) / 3
    assert torch.equal(mean_state([first, second, first])["w"], truth.float())


@given(st.lists(st.integers(-20, 20), min_size=1, max_size=6))
def test_greedy_soups_are_those_of_the_recipe(values: list[int]) -> None:
    """Members are numbers, and a soup is the better the nearer its mean is to 0."""

    def score_of(chosen: Any) -> float:
        return -abs(sum(values[i] for i in chosen) / len(chosen))

    chosen = greedy([score_of([i]) for i in range(len(values))], score_of)
    expected: list[int] = []  # the paper's recipe 1, word by word
    for i in sorted(range(len(values)), key=lambda i: abs(values[i])):
        if not expected or score_of([*expected, i]) >= score_of(expected):
            expected.append(i)
    assert list(chosen) == expected
    assert score_of(chosen) >= max(score_of([i]) for i in range(len(values)))


def head_of(seed: int, init_seed: int | None, epochs: int = 3, lr: float = 1e-2) -> Fitted:
    adapt = AdaptConfig(lr=lr, epochs=epochs, batch_size=64)
    return fit(
        HeadConfig(op="concat", width=32), adapt, StoppingConfig(), TASK, xor_rows(300, 1), xor_rows(100, 2),
        widths={"image": 16, "text": 16}, seed=seed, init_seed=init_seed,
    )  # fmt: skip


def test_members_of_a_soup_begin_with_the_same_weights_and_part_by_their_order() -> None:
    first, second = (head_of(seed, 0, epochs=1, lr=1e-12).head.state_dict() for seed in (0, 1))
    other = head_of(1, None, epochs=1, lr=1e-12).head.state_dict()
    for name in ("classify.0.weight", "classify.3.weight"):
        torch.testing.assert_close(first[name], second[name], atol=1e-9, rtol=0)
        assert not torch.allclose(first[name], other[name])
    trained = [head_of(seed, 0).head.state_dict()["classify.0.weight"] for seed in (0, 1)]
    assert not torch.equal(*trained)


def no_encoders(model: LoadedModel) -> LiveRows:
    raise AssertionError("these members have no encoders of their own")


def soup_of(members: list[tuple[int, Fitted]], kind: Any, inner: Part, live: Any = no_encoders) -> Fitted:
    adapt = AdaptConfig(soup=kind)
    [(_, made)] = soup(members, adapt, StoppingConfig(), inner, live, "temperature")
    return made


@pytest.mark.parametrize("kind", ["uniform", "greedy"])
def test_a_soup_of_one_member_thrice_is_the_member(kind: str) -> None:
    member, inner = head_of(0, 0), xor_rows(100, 2)
    state = copy.deepcopy(member.head.state_dict())
    made = soup_of([(seed, copy.deepcopy(member)) for seed in (5, 6, 7)], kind, inner)
    assert equal(dict(made.head.state_dict()), dict(state))
    assert made.facts["soup"] == [5, 6, 7]
    scale = calibrate(TASK, logits_of(member.head, inner.rows), inner.targets, "temperature")[0]
    assert made.scale == pytest.approx(scale)


def test_a_greedy_soup_leaves_out_a_member_that_harms_and_a_uniform_one_does_not() -> None:
    good, inner = [head_of(seed, 0) for seed in (0, 1)], xor_rows(100, 2)
    bad = copy.deepcopy(good[0])
    for parameter in bad.head.parameters():
        parameter.data.mul_(-3)
    members = [(9, bad), (3, good[0]), (4, good[1])]
    states = [copy.deepcopy(one.head.state_dict()) for _, one in members]
    chosen = soup_of(copy.deepcopy(members), "greedy", inner)
    assert 9 not in chosen.facts["soup"]
    uniform = soup_of(copy.deepcopy(members), "uniform", inner)
    assert equal(dict(uniform.head.state_dict()), mean_state(states))

    def auroc(one: Fitted) -> float:
        return metric_value(
            "auroc", inner.targets.numpy(), TASK.probabilities(logits_of(one.head, inner.rows))
        )

    assert auroc(chosen) >= max(auroc(one) for one in good)
    assert auroc(chosen) > auroc(uniform)


def test_a_soup_of_encoders_is_their_mean_with_the_mean_head(tmp_path: Path) -> None:
    members: list[tuple[int, Fitted]] = []
    for seed in (0, 1):
        model = load_model(checkpoint(tmp_path / "checkpoint"))
        members.append(
            (seed, train(model, seed=seed, method="lora", epochs=2, encoder_epochs=2, wise_ft=0.5)[0])
        )
    clips = [dict(one.model.clip.state_dict()) for _, one in members if one.model is not None]
    truth = mean_state([copy.deepcopy(state) for state in clips])
    assert not equal(clips[0], clips[1])
    given = corners(load_model(checkpoint(tmp_path / "checkpoint")), 80, 2)
    before = members[0][1].facts["retention"]["before"]
    told = [(seed, one.facts["inner_by_alpha"]) for seed, one in members]

    def live(model: LoadedModel) -> LiveRows:
        rows = corners(model, 80, 2).rows
        assert isinstance(rows, LiveRows)
        return rows

    made = soup_of(members, "uniform", frozen(given), live)
    assert made.model is not None
    assert equal(dict(made.model.clip.state_dict()), truth)
    assert made.facts["retention"]["before"] == before
    assert made.facts["members"] == {str(seed): {"alpha": 0.5, "inner_by_alpha": by} for seed, by in told}
    assert 0 < made.facts["retention"]["after"] <= 1
