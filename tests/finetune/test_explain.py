"""Shapley values against brute force over orders, heads with nothing to see, and explained predictions."""

import csv
import json
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.cli.main import main
from diptych.configs.errors import UserError
from diptych.finetune.adapt.presence import has_weights, logits_under, weights_of
from diptych.finetune.encoders.features import FeatureRows
from diptych.finetune.explain.shapley import coalitions, explained_class, shapley, values_of
from diptych.finetune.fusion.operators import Gated
from diptych.finetune.fusion.ordinal import Ordinal
from diptych.finetune.predictor import Predictor
from diptych.finetune.tasks.task import Task

from .heads import ALL, CASES, IDS, all_there, inputs, make
from .labelled import squares, write_config, write_task

HEADS = (
    "{concat: {op: concat}, cross: {op: cross, width: 8, heads: 2}, gated: {op: gated, width: 8}, "
    "learned: {op: late, rule: learned}, tuned: {op: concat, adapt: {method: lp_ft, encoder_epochs: 1}}}"
)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_contributions_are_the_mean_gain_over_all_orders(data: st.DataObject) -> None:
    names = ("a", "b", "c", "d")[: data.draw(st.integers(1, 4))]
    sets = coalitions(names)
    assert (sets[0], sets[-1], len(set(sets))) == (frozenset(), frozenset(names), 2 ** len(names))
    numbers = st.lists(st.floats(-50, 50), min_size=3, max_size=3)
    values = {some: np.array(data.draw(numbers)) for some in sets}
    phi = shapley(values, names)
    orders = list(permutations(names))
    for j, k in enumerate(names):
        gains = [
            values[frozenset(order[: order.index(k) + 1])] - values[frozenset(order[: order.index(k)])]
            for order in orders
        ]
        assert np.allclose(phi[:, j], np.mean(gains, axis=0), atol=1e-9)
    assert np.allclose(phi.sum(1), values[sets[-1]] - values[sets[0]], atol=1e-9)


def test_more_than_four_modalities_are_refused() -> None:
    with pytest.raises(UserError, match="5 modalities have 32 combinations"):
        coalitions(tuple("abcde"))


class Inputs:
    """Features as a source of rows."""

    def __init__(self, n: int, widths: dict[str, int]) -> None:
        self.features, self.present = inputs(n, widths=widths), all_there(n, widths)

    def __len__(self) -> int:
        return len(self.features["group"])

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        return {k: v[rows] for k, v in self.features.items()}, {k: v[rows] for k, v in self.present.items()}


@pytest.mark.parametrize(("name", "outputs", "widths"), CASES, ids=IDS)
def test_hidden_modalities_are_missing_ones_and_nothing_has_a_finite_answer(
    name: str, outputs: int, widths: dict[str, int]
) -> None:
    head, rows = make(name, outputs, widths), Inputs(6, widths)
    sets = [frozenset(some) for size in range(len(widths) + 1) for some in combinations(widths, size)]
    shown = [{k: np.full(6, k in some) for k in widths} for some in sets]
    got = logits_under(head, rows, shown, batch_size=4)
    for some, logits in zip(sets, got, strict=True):
        present = {k: torch.full((6,), k in some) for k in widths}
        with torch.no_grad():
            expected = torch.cat(
                [
                    head(
                        {k: v[part] for k, v in rows.features.items()},
                        {k: v[part] for k, v in present.items()},
                    )
                    for part in torch.arange(6).split(4)
                ]
            )
        assert torch.equal(logits, expected)
        assert logits.isfinite().all()
    assert torch.allclose(got[0], got[0][:1].expand_as(got[0]), atol=1e-5)  # the same for all rows


@pytest.mark.parametrize("name", ALL)
def test_weights_are_those_that_the_head_uses(name: str) -> None:
    head, rows = make(name), Inputs(6, {"image": 16, "text": 16})
    rows.present["text"][2] = False
    assert has_weights(head) == (name.startswith(("gated", "weighted_sum")) or name == "late learned")
    if not has_weights(head):
        return
    weights = weights_of(head, rows, batch_size=4)
    assert np.allclose(weights.sum(1), 1)
    assert weights[2].tolist() == [1, 0]
    if isinstance(head, Gated):
        with torch.no_grad():
            z = head.filled(rows.features, rows.present)
            scores = head.gate(torch.cat(z, dim=1)).unflatten(1, (2, head.gate_width)).double()
        gates = scores.softmax(1).mean(2)
        assert np.allclose(weights[[0, 1, 3]], gates[[0, 1, 3]].numpy(), atol=1e-6)
    wrapped = Ordinal(head, 2)
    assert has_weights(wrapped)
    assert np.array_equal(weights_of(wrapped, rows, batch_size=4), weights)


def test_what_is_explained() -> None:
    p = np.array([[0.1, 0.9], [0.8, 0.2]])
    binary, labels = Task("binary", ("no", "yes")), Task("multilabel", ("a", "b"))
    assert explained_class(binary, p, None).tolist() == [1, 0]  # type: ignore[union-attr]  of this kind here
    assert explained_class(labels, p, None).tolist() == [1, 0]  # type: ignore[union-attr]  of this kind here
    assert explained_class(binary, p, "no").tolist() == [0, 0]  # type: ignore[union-attr]  of this kind here
    assert np.allclose(values_of(p, np.array([1, 0])), [np.log(9), np.log(4)])
    assert np.isfinite(values_of(np.array([[0.0, 1.0]]), np.array([1]))).all()
    numbers = Task("regression", ())
    assert explained_class(numbers, p[:, :1], None) is None
    assert values_of(p[:, :1], None).tolist() == [0.1, 0.8]
    with pytest.raises(UserError, match="'maybe' is no class of the run; it has no, yes"):
        explained_class(binary, p, "maybe")
    with pytest.raises(UserError, match="regression has no classes"):
        explained_class(numbers, p, "yes")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tuned run, shared by the tests of this file."""
    folder = tmp_path_factory.mktemp("explained")
    write_task(folder)
    assert main(["finetune", str(write_config(folder, HEADS)), "model.cache=false"]) == 0
    return folder


@pytest.mark.parametrize("head", ["image", "concat", "cross", "gated", "learned", "tuned"])
def test_contributions_of_a_run_are_those_of_its_own_answers(made: Path, head: str) -> None:
    predictor = Predictor.load(made / "run", head=head)
    data = squares.square("red", 20)
    rows: list[dict[str, Any]] = [
        {"image": data, "text": "red square"},
        {"image": squares.square("blue", 60), "text": "gold square"},
        {"image": data, "text": None},
        {"image": None, "text": "red square"},
    ]
    phi = predictor.explain(rows)
    p, explanation = predictor.explain_rows(predictor._rows(rows, None))
    assert np.array_equal(p, predictor.predict_proba(rows))
    said = predictor.predict(rows)
    assert explanation.classes == said
    column = [predictor.classes.index(name) for name in said]

    def value(shown: list[dict[str, Any]], i: int) -> float:
        chosen = predictor.predict_proba(shown)[0, column[i]]
        return float(np.log(chosen / (1 - chosen)))

    nothing = explanation.nothing
    for i, row in enumerate(rows):
        full = value([row], i)
        assert sum(phi[i].values()) == pytest.approx(full - nothing[i], abs=1e-4)
        assert sum(phi[i].values()) == pytest.approx(explanation.everything[i] - nothing[i], abs=1e-12)
        for k, other in (("image", "text"), ("text", "image")):
            if row[k] is None:
                assert phi[i][k] == 0
            elif row[other] is not None:  # four answers, two of them from rows with an empty cell
                alone, without = value([row | {other: None}], i), value([row | {k: None}], i)
                expected = 0.5 * (alone - nothing[i] + full - without)
                assert phi[i][k] == pytest.approx(expected, abs=1e-4)
    if head == "image":
        assert all(one["text"] == 0 for one in phi)
    if head == "learned":  # late without anything says one half
        assert nothing == pytest.approx(0, abs=0.2)
    other = predictor.explain(rows, of=predictor.classes[0])
    for i, row in enumerate(phi):
        sign = 1 if said[i] == predictor.classes[0] else -1
        assert other[i] == {k: pytest.approx(sign * v, abs=1e-9) for k, v in row.items()}


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".parquet"])
def test_explained_answers_as_a_file(made: Path, suffix: str, tmp_path: Path) -> None:
    out, table = tmp_path / f"out{suffix}", made / "match.csv"
    command = ["predict", str(made / "run"), str(table), "-o", str(out), "--head", "gated", "--explain"]
    assert main(command) == 0
    if suffix == ".parquet":
        rows = pq.read_table(out).to_pylist()
    elif suffix == ".jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        with out.open(newline="") as file:
            rows = list(csv.DictReader(file))
    assert list(rows[0])[-7:] == [
        "prediction", "p_0", "p_1", "phi_image", "phi_text", "weight_image", "weight_text",
    ]  # fmt: skip
    phi = Predictor.load(made / "run", head="gated").explain(table)
    for k in ("image", "text"):
        assert [float(row[f"phi_{k}"]) for row in rows] == pytest.approx([one[k] for one in phi], abs=1e-4)
    assert [float(row["weight_image"]) + float(row["weight_text"]) for row in rows] == pytest.approx(
        [1.0] * len(rows)
    )


def test_source_of_rows_is_what_heads_are_given() -> None:
    rows = FeatureRows({"image": torch.eye(3)}, {"image": torch.tensor([2, -1, 0])})
    seen: list[Tensor] = []

    class Spy(torch.nn.Module):
        reads_tokens = False

        def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
            seen.append(present["image"])
            return features["image"][:, :1]

    shown = [{}, {"image": np.array([False, True, True])}]
    logits_under(Spy(), rows, shown, batch_size=8)  # type: ignore[arg-type]  as good as one here
    assert [mask.tolist() for mask in seen] == [[True, False, True], [False, False, True]]
