"""Fusion heads: what each can and cannot learn, what a missing modality changes, that all of it trains."""

from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.finetune.adapt import fit, logits_of
from diptych.finetune.config import AdaptConfig, HeadConfig, StoppingConfig
from diptych.finetune.fusion import Head, Late, Standard, build_head
from diptych.finetune.tasks import Task, metric_value

from .labelled import everywhere, xor_rows

D, TOKENS = 16, {"image": 12, "text": 10}
BINARY = Task("binary", ("0", "1"))
ALL: dict[str, dict[str, Any]] = {
    "image": {"op": "image"},
    "text with a hidden layer": {"op": "text", "width": 8},
    "similarity": {"op": "similarity"},
    "concat": {"op": "concat"},
    "concat linear": {"op": "concat", "width": 0},
    "concat with interactions": {"op": "concat", "interactions": True},
    "weighted_sum": {"op": "weighted_sum"},
    "weighted_sum equal": {"op": "weighted_sum", "weights": "equal"},
    "gated": {"op": "gated", "width": 8},
    "gated by modality": {"op": "gated", "width": 8, "gate": "modality"},
    "bilinear": {"op": "bilinear"},
    "bilinear of low rank": {"op": "bilinear", "rank": 4},
    "cross": {"op": "cross", "width": 8, "heads": 2},
    "cross with two layers": {"op": "cross", "width": 8, "heads": 2, "layers": 2},
    "late": {"op": "late"},
    "late learned": {"op": "late", "rule": "learned"},
}


def make(name: str, outputs: int = 1) -> Head:
    torch.manual_seed(0)
    head = build_head(HeadConfig(**ALL[name]), {"image": D, "text": D}, outputs, TOKENS)
    for parameter in head.parameters():  # nothing may hide behind zeros
        parameter.data += 0.1 * torch.randn_like(parameter)
    return head.eval()


def inputs(n: int = 6, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    made = {k: torch.nn.functional.normalize(torch.randn(n, D, generator=random), dim=1) for k in TOKENS}
    made["image_tokens"] = torch.randn(n, 5, TOKENS["image"], generator=random)
    made["text_tokens"] = torch.randn(n, 4, TOKENS["text"], generator=random)
    made["text_mask"] = torch.arange(4) < torch.randint(1, 5, (n, 1), generator=random)
    return made


def outputs_of(name: str) -> list[int]:
    return [1] if name == "similarity" else [1, 3]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("garbage", [1e4, float("nan"), float("inf")])
def test_what_stands_in_a_missing_slot_changes_nothing(name: str, garbage: float) -> None:
    for outputs in outputs_of(name):
        head, clean = make(name, outputs), inputs()
        for missing in ("image", "text"):
            present = everywhere(6)
            present[missing] = torch.tensor([True, False] * 3)
            dirty = {k: v.clone() for k, v in clean.items()}
            for key in (missing, f"{missing}_tokens"):
                dirty[key][1::2] = garbage
            expected, got = head(clean, present), head(dirty, present)
            assert expected.shape == (6, outputs)
            assert expected.isfinite().all()
            assert torch.equal(expected, got)


def test_padding_of_texts_changes_nothing() -> None:
    head, clean = make("cross with two layers"), inputs()
    dirty = {k: v.clone() for k, v in clean.items()}
    dirty["text_tokens"][~dirty["text_mask"]] = float("nan")
    assert torch.equal(head(clean, everywhere(6)), head(dirty, everywhere(6)))
    wide = dict(dirty)
    wide["text_tokens"] = torch.nn.functional.pad(dirty["text_tokens"], (0, 0, 0, 3), value=9.0)
    wide["text_mask"] = torch.nn.functional.pad(dirty["text_mask"], (0, 3))
    torch.testing.assert_close(head(wide, everywhere(6)), head(clean, everywhere(6)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_rows_do_not_see_each_other(name: str) -> None:
    head, features = make(name), inputs()
    whole = head(features, everywhere(6))
    alone = torch.cat([head({k: v[i : i + 1] for k, v in features.items()}, everywhere(1)) for i in range(6)])
    torch.testing.assert_close(whole, alone, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ALL)
def test_every_parameter_gets_a_gradient_and_moves(name: str) -> None:
    for outputs in outputs_of(name):
        head = make(name, outputs).train()
        features, present = inputs(16), everywhere(16)
        present["image"][:4], present["text"][4:8] = False, False
        losses = [logits[rows].square().sum() for logits, rows in head.parts(features, present)]
        torch.stack(losses).sum().backward()
        for parameter_name, parameter in head.named_parameters():
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name
        assert {n for n, _ in head.named_parameters()} <= set(head.state_dict())


@pytest.mark.parametrize("rule", ["late", "late learned"])
def test_late_is_the_other_modalitys_own_prediction_when_one_is_missing(rule: str) -> None:
    for outputs in (1, 3):
        head, features = make(rule, outputs), inputs()
        assert isinstance(head, Late)
        for k, missing in (("image", "text"), ("text", "image")):
            present = everywhere(6)
            own = head.classify[k](head.standard[k](features[k]))
            present[missing][:] = False
            got = head(features, present)
            task = BINARY if outputs == 1 else Task("multiclass", ("a", "b", "c"))
            expected, found = task.probabilities(own), task.probabilities(got)
            assert abs(expected - found).max() < 1e-6


def test_late_mean_is_the_mean_of_the_probabilities() -> None:
    for outputs in (1, 3):
        head, features = make("late", outputs), inputs()
        task = BINARY if outputs == 1 else Task("multiclass", ("a", "b", "c"))
        assert isinstance(head, Late)
        own = [head.classify[k](head.standard[k](features[k])) for k in head.modalities]
        mean = sum(task.probabilities(logits) for logits in own) / 2
        assert abs(task.probabilities(head(features, everywhere(6))) - mean).max() < 1e-6


def test_bilinear_starts_at_the_inner_product() -> None:
    features = inputs(8)
    for rank in (None, D):
        head = build_head(HeadConfig(op="bilinear", rank=rank), {"image": D, "text": D}, 1).eval()
        inner = (features["image"] * features["text"]).sum(1) / D**0.5
        torch.testing.assert_close(head(features, everywhere(8))[:, 0], inner)


def test_standardising_keeps_inner_products_of_centred_vectors_up_to_one_scale() -> None:
    x = torch.randn(500, D) * 3 + 5
    standard = Standard(D)
    standard.fit(x)
    y, centred = standard(x), x - x.mean(0)
    torch.testing.assert_close(y.mean(0), torch.zeros(D), atol=1e-5, rtol=0)
    assert float(y.square().mean()) == pytest.approx(1, abs=1e-4)
    ratio = (y @ y.T) / (centred @ centred.T)
    torch.testing.assert_close(ratio, torch.full_like(ratio, float(ratio[0, 0])), rtol=1e-2, atol=1e-2)
    standard.fit(x[:0])
    torch.testing.assert_close(standard(x), y)


CANNOT = ["image", "text with a hidden layer", "similarity", "concat linear", "weighted_sum"]
CANNOT.extend(["weighted_sum equal", "late", "late learned"])
CAN = ["concat", "concat with interactions", "gated", "bilinear", "bilinear of low rank", "cross"]


@pytest.mark.parametrize("name", [*CANNOT, *CAN])
def test_agreement_of_two_signs_is_learned_by_heads_that_compare_and_by_no_other(name: str) -> None:
    train, inner, test = xor_rows(1200, 1), xor_rows(400, 2), xor_rows(1000, 3)
    options = ALL[name] | ({"width": 32} if ALL[name].get("width") == 8 else {})
    adapt = AdaptConfig(lr=1e-2, epochs=12, batch_size=64, modality_dropout=0.05, weight_decay=0.01)
    fitted = fit(
        HeadConfig(**options),
        adapt,
        StoppingConfig(),
        BINARY,
        train,
        inner,
        widths={"image": D, "text": D},
        token_widths={"image": D, "text": D},
        seed=0,
    )
    p = BINARY.probabilities(logits_of(fitted.head, test.rows))
    accuracy = metric_value("accuracy", test.targets.numpy(), p)
    if name in CAN:
        assert accuracy > 0.95
    else:
        assert accuracy < 0.56
