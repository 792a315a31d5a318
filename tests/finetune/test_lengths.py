"""Rows in groups by length, and last blocks of what is read alone, give what the whole batch gives."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.finetune.adapt.lengths import parts_by_length
from diptych.finetune.config import HeadConfig
from diptych.finetune.fusion.attention import SelfBlock
from diptych.finetune.fusion.operators import Head

from .heads import ALL, THREE, TWO, all_there, inputs, make

ON_TOKENS = [name for name in ALL if HeadConfig(**ALL[name]).reads_tokens]
N = 200  # rows: enough for several groups


def batch(widths: dict[str, int]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows whose texts have 1 to 11 tokens and no last one; every third lacks its text."""
    features, present = inputs(N, widths=widths), all_there(N, widths)
    for key in ("text_tokens", "text_inputs"):
        features[key] = features[key].repeat(1, 3, 1)
    features["text_mask"] = torch.arange(12) < 1 + torch.arange(N)[:, None] * 7 % 11
    present["text"] = torch.arange(N) % 3 > 0
    return features, present


def learn(head: Head, parts: list[tuple[Tensor, Tensor]]) -> list[Tensor]:
    """Logits, rows that count, and gradients."""
    head.zero_grad()
    torch.stack([logits[rows].square().sum() for logits, rows in parts]).sum().backward()
    return [t.detach().double() for part in parts for t in part] + [
        p.grad for p in head.parameters() if p.grad is not None
    ]


@pytest.mark.parametrize("name", ON_TOKENS)
@pytest.mark.parametrize("widths", [TWO, THREE])
def test_groups_give_the_answers_and_gradients_of_the_whole_batch(name: str, widths: dict[str, int]) -> None:
    head = make(name, widths=widths).double()
    features, present = batch(widths)
    features = {k: v.double() if v.is_floating_point() else v for k, v in features.items()}
    head.fit_standard(features, present)
    want = learn(head, head.parts(features, present))
    got = learn(head, parts_by_length(head, features, present))
    assert len(got) == len(want) > 4
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


def test_groups_compute_less_padding() -> None:
    seen: list[tuple[int, int]] = []

    class Counts(Head):
        def forward(self, features: Any, present: Any) -> Tensor:
            seen.append(tuple(features["text_tokens"].shape[:2]))
            assert features["text_tokens"].shape[:2] == features["text_mask"].shape
            assert len(features["image_tokens"]) == len(present["image"]) == seen[-1][0]
            lengths = (features["text_mask"].sum(1) * present["text"]).clamp_min(1)
            assert int(lengths.max()) == seen[-1][1]
            return lengths[:, None]

    features, present = batch(TWO)
    ((lengths, counts),) = parts_by_length(Counts(TWO), features, present)
    assert counts.all()
    assert torch.equal(lengths[:, 0], (features["text_mask"].sum(1) * present["text"]).clamp_min(1))
    assert len(seen) > 1
    assert sum(rows for rows, _ in seen) == N
    assert sum(rows * length for rows, length in seen) < 0.7 * N * 11
    seen.clear()
    small = {k: v[:4] for k, v in features.items()}
    parts_by_length(Counts(TWO), small, {k: v[:4] for k, v in present.items()})
    assert len(seen) == 1  # the calls of a group cost more than the padding of a few rows


def test_a_block_computes_what_is_read_as_the_whole_block_does() -> None:
    torch.manual_seed(0)
    block = SelfBlock(8, 2, 0.0).double()
    x, mask = torch.randn(3, 6, 8, dtype=torch.float64, requires_grad=True), torch.rand(3, 6) < 0.7
    mask[:, 0] = True
    rows: list[int] = []
    feed: Any = block.feed
    feed.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[1]))
    results: list[list[Tensor]] = []
    for read in (None, 2):
        got = block(x, mask, read=read)[:, :2]
        results.append([got, *torch.autograd.grad(got.square().sum(), [x, *block.parameters()])])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert rows == [6, 2]


@pytest.mark.parametrize("name", [name for name in ON_TOKENS if not name.startswith("cross")])
def test_of_the_last_layer_only_the_class_token_is_computed(name: str) -> None:
    head, rows = make(name), dict[str, int]()

    def watch(key: str, feed: nn.Module) -> None:
        feed.register_forward_pre_hook(lambda _, args: rows.update([(key, args[0].shape[1])]))

    for key, block in head.named_modules():
        if isinstance(block, SelfBlock):
            watch(key, block.feed)
    head(inputs(), all_there(6))
    last = max(int(key.rpartition(".")[2]) for key in rows)
    assert rows
    assert all((length == 1) == (key.endswith(f".{last}")) for key, length in rows.items())
