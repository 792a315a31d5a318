"""What holds for every fusion head: missing slots have no influence, all of it trains, all of it is saved."""

from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diptych.configs.errors import UserError
from diptych.finetune.config import OPTIONS, HeadConfig
from diptych.finetune.fusion.operators import Head, Standard, build_head, check_heads

from .heads import ALL, CASES, IDS, TASKS, THREE, TOKENS, TWO, D, all_there, inputs, make, new

every_head = pytest.mark.parametrize(("name", "outputs", "widths"), CASES, ids=IDS)


def answers(head: Head, features: dict[str, Tensor], present: dict[str, Tensor]) -> dict[str, Tensor]:
    """Logits, and the gradients of a loss of all parts."""
    head.zero_grad()
    out = {"logits": head(features, present)}
    losses = [logits[rows].square().sum() for logits, rows in head.parts(features, present)]
    torch.stack(losses).sum().backward()
    return out | {n: p.grad for n, p in head.named_parameters() if p.grad is not None}


@every_head
def test_what_stands_in_a_missing_slot_changes_nothing(
    name: str, outputs: int, widths: dict[str, int]
) -> None:
    head, clean = make(name, outputs, widths), inputs(widths=widths)
    head.fit_standard(clean, all_there(6, widths))
    for count in range(1, len(widths)):
        for missing in combinations(widths, count):
            present = all_there(6, widths)
            for k in missing:
                present[k] = torch.tensor([True, False] * 3)
            expected = answers(head, clean, present)
            assert expected["logits"].shape == (6, outputs)
            assert all(value.isfinite().all() for value in expected.values())
            for what in (1e4, float("nan"), float("inf"), "permuted"):
                dirty = {k: v.clone() for k, v in clean.items()}
                for key in [
                    key for k in missing for key in (k, f"{k}_tokens", f"{k}_inputs") if key in dirty
                ]:
                    dirty[key][1::2] = clean[key][[3, 5, 1]] if what == "permuted" else what
                got = answers(head, dirty, present)
                assert got.keys() == expected.keys()
                assert all(torch.equal(got[key], expected[key]) for key in expected), (missing, what)


@every_head
def test_a_row_without_anything_has_an_answer(name: str, outputs: int, widths: dict[str, int]) -> None:
    nothing = {k: ~there for k, there in all_there(6, widths).items()}
    got = make(name, outputs, widths)(inputs(widths=widths), nothing)
    assert got.isfinite().all()
    torch.testing.assert_close(got, got[:1].expand(6, -1), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", [n for n in ALL if HeadConfig(**ALL[n]).reads_tokens])
def test_padding_of_texts_changes_nothing(name: str) -> None:
    head, clean = make(name), inputs()
    dirty = {k: v.clone() for k, v in clean.items()}
    wide = dict(dirty)
    for key in ("text_tokens", "text_inputs"):
        dirty[key][~dirty["text_mask"]] = float("nan")
        wide[key] = nn.functional.pad(dirty[key], (0, 0, 0, 3), value=9.0)
    assert torch.equal(head(clean, all_there(6)), head(dirty, all_there(6)))
    wide["text_mask"] = nn.functional.pad(dirty["text_mask"], (0, 3))
    torch.testing.assert_close(head(wide, all_there(6)), head(clean, all_there(6)), atol=1e-6, rtol=0)


@every_head
def test_rows_do_not_see_each_other(name: str, outputs: int, widths: dict[str, int]) -> None:
    head, features = make(name, outputs, widths), inputs(widths=widths)
    whole = head(features, all_there(6, widths))
    rows = [{k: v[i : i + 1] for k, v in features.items()} for i in range(6)]
    alone = torch.cat([head(row, all_there(1, widths)) for row in rows])
    torch.testing.assert_close(whole, alone, atol=1e-6, rtol=0)


@every_head
def test_every_parameter_gets_a_gradient_within_three_steps(
    name: str, outputs: int, widths: dict[str, int]
) -> None:
    head = new(name, outputs, widths).train()
    features, task = inputs(32, widths=widths), TASKS[outputs]
    head.fit_standard(features, all_there(32, widths))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    targets = torch.arange(32) % 5 % (outputs + (outputs == 1))
    moved: set[str] = set()
    for step in range(3):
        present = all_there(32, widths)
        for i, k in enumerate(widths):  # one row in four misses a modality, another one in every step
            present[k][(torch.arange(32) + step) % (4 * len(widths)) == i] = False
        parts = head.parts(features, present)
        losses = [task.loss(logits[rows], targets[rows]) for logits, rows in parts if rows.any()]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        for parameter_name, parameter in head.named_parameters():
            assert parameter.grad is not None, parameter_name
            if parameter.grad.abs().sum() > 0:
                moved.add(parameter_name)
        optimizer.step()
    assert moved == {n for n, _ in head.named_parameters()}


@every_head
def test_a_saved_head_is_the_same_to_the_last_bit(
    tmp_path: Path, name: str, outputs: int, widths: dict[str, int]
) -> None:
    head, features = make(name, outputs, widths), inputs(widths=widths)
    head.fit_standard(features, all_there(6, widths))
    save_file({k: v.contiguous() for k, v in head.state_dict().items()}, tmp_path / "head.safetensors")
    again = new(name, outputs, widths, seed=1).eval()
    again.load_state_dict(load_file(tmp_path / "head.safetensors"))
    present = all_there(6, widths)
    present["image"][::2] = False
    assert torch.equal(head(features, present), again(features, present))
    assert {n for n, _ in head.named_parameters()} <= set(head.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(head.parameters(), again.parameters(), strict=True))


@every_head
def test_gradients_are_those_of_finite_differences(name: str, outputs: int, widths: dict[str, int]) -> None:
    head, features = make(name, outputs, widths).double(), inputs(4, widths=widths)
    present = all_there(4, widths)
    present["image"][0], present["text"][1] = False, False
    weights = {n: p.detach().requires_grad_() for n, p in head.named_parameters()}
    read = {k: v.double().requires_grad_() for k, v in features.items() if v.is_floating_point()}

    def logits(*tensors: Tensor) -> Tensor:
        own = dict(zip(weights, tensors, strict=False))
        given = dict(zip(read, tensors[len(own) :], strict=True))
        return torch.func.functional_call(head, own, (features | given, present))

    assert torch.autograd.gradcheck(logits, (*weights.values(), *read.values()), fast_mode=True)


@pytest.mark.parametrize("name", ALL)
def test_the_config_knows_which_heads_read_tokens(name: str) -> None:
    head, config = new(name), HeadConfig(**ALL[name])
    assert (head.reads_tokens, head.reads_inputs) == (config.reads_tokens, config.reads_inputs)


def test_bilinear_starts_at_the_inner_product() -> None:
    features = inputs(8)
    for rank in (None, D, "full"):
        head = build_head(HeadConfig(op="bilinear", rank=rank), TWO, 1).eval()
        inner = (features["image"] * features["text"]).sum(1) / D**0.5
        torch.testing.assert_close(head(features, all_there(8))[:, 0], inner)


@pytest.mark.parametrize("widths", [TWO, THREE])
def test_full_bilinear_is_linear_in_the_whole_outer_product(widths: dict[str, int]) -> None:
    head, features = make("bilinear full", 3, widths), inputs(widths=widths)
    present = all_there(6, widths)
    present["text"][:2] = False
    ones = torch.ones(6, 1)
    first, *others = (torch.cat([z, ones], dim=1) for z in head.filled(features, present))
    product = first
    for z in others:
        product = (product[:, :, None] * z[:, None, :]).flatten(1)
    weight = head.state_dict()["weight"]
    assert weight.shape[0] == 3
    torch.testing.assert_close(head(features, present), product @ weight.flatten(1).T, atol=1e-5, rtol=1e-5)


def test_given_weights_are_alpha_and_beta_and_are_shared_among_what_is_there() -> None:
    present = all_there(3, THREE)
    present["text"][1], present["image"][2], present["audio"][2] = False, False, False
    wanted = torch.tensor([[7, 3, 5], [7, 0, 5], [0, 3, 0]], dtype=torch.float32)
    wanted /= wanted.sum(1, keepdim=True)
    for weights in ((0.7, 0.3, 0.5), {"audio": 0.5, "image": 0.7, "text": 0.3}):
        head = build_head(HeadConfig(op="weighted_sum", weights=weights), THREE, 1)
        torch.testing.assert_close(head.weights(present), wanted)
    head = build_head(HeadConfig(op="weighted_sum", weights=(0.7, 0.3)), TWO, 1).eval()
    z = inputs(3)
    by_hand = head.classify(0.7 * z["image"] + 0.3 * z["text"])
    torch.testing.assert_close(head(z, all_there(3)), by_hand)
    assert [n for n, _ in head.named_parameters()] == ["classify.1.weight", "classify.1.bias"]


def test_a_bottleneck_hears_of_others_only_through_its_tokens_and_only_if_they_are_there() -> None:
    head, features = make("bottleneck"), inputs()
    other = dict(features) | {"text_tokens": features["text_tokens"].flip(0)}
    assert not torch.allclose(head(features, all_there(6)), head(other, all_there(6)))
    image = all_there(6) | {"text": torch.zeros(6, dtype=torch.bool)}
    alone = build_head(HeadConfig(**ALL["bottleneck"]), {"image": D}, 1, TOKENS).eval()
    alone.load_state_dict({k: v for k, v in head.state_dict().items() if "text" not in k})
    torch.testing.assert_close(head(features, image), alone(features, all_there(6, {"image": D})))


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


@pytest.mark.parametrize(
    ("head", "widths", "link", "words"),
    [
        ({"op": "bilinear", "rank": "full"}, {"image": 1280, "text": 768}, None,
         "heads.x.rank: full has 1281 x 769 x 200 = 197,017,800 weights, more than 67,108,864; give a"),
        ({"op": "similarity"}, {"image": 512, "text": 384}, None,
         "heads.x: similarity compares embeddings of one width, and these have 512 and 384; remove it"),
        ({"op": "late", "rule": "vote"}, TWO, "identity", "heads.x.rule: vote is for tasks of classes"),
        ({"op": "late", "rule": "product"}, TWO, "identity", "product is for tasks of classes"),
        ({"op": "late", "rule": "vote"}, TWO, "cumulative", "give mean or learned"),
    ],
)  # fmt: skip
def test_heads_that_embeddings_or_the_task_do_not_allow_are_refused(
    head: dict[str, Any], widths: dict[str, int], link: Any, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_heads({"x": HeadConfig(**head)}, widths, 200, link)
    check_heads({"x": HeadConfig(op="concat"), "y": HeadConfig(op="late")}, widths, 200, link)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"op": "bottleneck", "layers": 1}, "bottleneck needs 2 or more layers"),
        ({"op": "merged", "width": 0}, "merged needs a width of at least 1"),
        ({"op": "merged", "width": 9}, "width 9 is no multiple of heads 4"),
        ({"op": "merged", "bottlenecks": 2}, "bottlenecks is no option of merged"),
        ({"op": "weighted_sum", "weights": (0.5, 0.0)}, "weights must be learned, equal or numbers above 0"),
        (
            {"op": "weighted_sum", "weights": {"image": -1.0}},
            "weights must be learned, equal or numbers above 0",
        ),
        ({"op": "bilinear", "rank": 0}, "rank must be 1 or more, full or null, not 0"),
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        HeadConfig(**options)


def test_null_for_an_option_is_its_default() -> None:
    for op, options in OPTIONS.items():
        nulls = HeadConfig.model_validate({"op": op, **dict.fromkeys(options)})
        assert nulls == HeadConfig(op=op)
        assert HeadConfig.model_validate(nulls.model_dump()) == nulls
    assert HeadConfig(op="concat", width=0).width == 0
    assert (HeadConfig(op="bilinear").rank, HeadConfig(op="joint", layers=None).layers) == (None, None)
    with pytest.raises(ValueError, match="widthh"):
        HeadConfig.model_validate({"op": "concat", "widthh": None})
