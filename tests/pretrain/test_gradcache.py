"""Micro-batches: the gradient of the whole batch in fp64, dropout and the logit scale included."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.fit import notes
from diptych.pretrain.gradcache import Features, cut, forward_backward, inexact
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model

B, CONTEXT = 9, 12
TEXT: dict[str, Any] = {"context_length": CONTEXT, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
VIT: dict[str, Any] = {
    "layers": 2,
    "width": 32,
    "head_width": 16,
    "patch_size": 8,
    "image_size": 32,
    "patch_dropout": 0.5,
}
CONV: dict[str, Any] = {"timm_model_name": "test_efficientnet", "image_size": 32}
LAYER_NORM: dict[str, Any] = {"timm_model_name": "test_convnext", "image_size": 32}


def make_batch(b: int = B, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, CONTEXT + 1, (b,), generator=generator)
    captions = [torch.randint(1, 58, (int(n),), generator=generator) for n in lengths]
    for caption in captions:
        caption[-1] = 59
    return {
        "image": torch.randint(0, 256, (b, 3, 32, 32), generator=generator, dtype=torch.uint8),
        "token_ids": torch.cat(captions).int(),
        "seq_lens": lengths.int(),
        "sample_id": torch.arange(100, 100 + b),
        "valid": torch.arange(b) != 3,
        "epoch": 2,
        "bad": [],
    }


def build(vision: dict[str, Any], **config: Any) -> ContrastiveModel:
    torch.manual_seed(0)
    return ContrastiveModel(
        build_model(ModelConfig(embed_dim=16, vision_cfg=vision, text_cfg=TEXT, **config)).double(), seed=5
    ).train()


class Dropped(nn.Module):
    """A model whose features pass an ordinary dropout, which draws from torch's generator."""

    def __init__(self, root: ContrastiveModel) -> None:
        super().__init__()
        self.root = root

    def forward(self, batch: Any) -> Features:
        out = self.root(batch)
        return out | {"text_features": nn.functional.dropout(out["text_features"], 0.4)}


def gradients(
    model: nn.Module, batch: Any, micro_batches: int, kind: str = "clip", **more: Any
) -> tuple[dict[str, Tensor | None], Features]:
    model.zero_grad()

    def loss_of(out: Features) -> Tensor:
        # one of the literals
        return contrastive_loss(**out, valid=batch["valid"], kind=kind)  # type: ignore[arg-type]

    out = forward_backward(model, batch, loss_of, micro_batches=micro_batches, **more)
    return {name: None if p.grad is None else p.grad.clone() for name, p in model.named_parameters()}, out


def assert_same_gradients(got: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, value in expected.items():
        other = got[name]
        if value is None or other is None:
            assert value is other, name
        else:
            torch.testing.assert_close(other, value, atol=1e-13, rtol=1e-12, msg=name)


@pytest.mark.parametrize("micro_batches", [2, 4, 9])
@pytest.mark.parametrize("vision", [VIT, LAYER_NORM], ids=["vit", "convnext"])
def test_micro_batches_have_the_gradient_of_the_batch(vision: dict[str, Any], micro_batches: int) -> None:
    model, batch = build(vision), make_batch()
    expected, whole = gradients(model, batch, 1)
    got, out = gradients(model, batch, micro_batches)
    assert_same_gradients(got, expected)
    assert expected["clip.logit_scale"] is not None
    assert whole.keys() == out.keys()
    for key, value in whole.items():
        torch.testing.assert_close(out[key], value, atol=1e-14, rtol=1e-12)
        assert not out[key].requires_grad


def test_a_bias_gets_its_gradient_once() -> None:
    model, batch = build(VIT, init_logit_bias=-10.0), make_batch()
    expected, _ = gradients(model, batch, 1, "siglip")
    assert_same_gradients(gradients(model, batch, 3, "siglip")[0], expected)


def test_gradients_are_added_to_those_that_are_there() -> None:
    model, batch = build(VIT), make_batch()
    once, _ = gradients(model, batch, 3)
    forward_backward(model, batch, lambda out: contrastive_loss(**out, valid=batch["valid"]), micro_batches=2)
    twice = {name: p.grad for name, p in model.named_parameters()}
    assert_same_gradients(twice, {name: None if g is None else 2 * g for name, g in once.items()})


def test_dropout_is_the_same_in_both_passes_and_leaves_the_generator_where_one_pass_does() -> None:
    model, batch = Dropped(build(VIT)), make_batch()

    def seeded(parts: int) -> tuple[dict[str, Tensor | None], Tensor]:
        torch.manual_seed(1)
        return gradients(model, batch, parts)[0], torch.get_rng_state()

    truth, _ = _by_hand(model, batch, 3)
    got, state = seeded(3)
    assert_same_gradients(got, truth)
    torch.manual_seed(1)
    for piece in cut(batch, 3):
        model(piece)
    assert torch.equal(state, torch.get_rng_state())


def _by_hand(model: nn.Module, batch: Any, parts: int) -> tuple[dict[str, Tensor | None], Tensor]:
    """All micro-batches in one graph."""
    model.zero_grad()
    torch.manual_seed(1)
    outs = [model(piece) for piece in cut(batch, parts)]
    whole = {key: torch.cat([out[key] for out in outs]) for key in ("image_features", "text_features")}
    loss = contrastive_loss(**(outs[0] | whole), valid=batch["valid"])
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters()}, loss


def test_batch_norms_count_each_micro_batch_once() -> None:
    batch = make_batch()
    ours, plain = build(CONV), build(CONV)
    gradients(ours, batch, 3)
    for piece in cut(batch, 3):
        plain(piece)
    for (name, value), other in zip(ours.named_buffers(), plain.buffers(), strict=True):
        torch.testing.assert_close(value, other, atol=1e-12, rtol=1e-12, msg=name)
    assert "batch norms take the statistics" in str(inexact(ours))
    assert inexact(build(VIT)) is None


def test_what_batch_norms_make_inexact_is_told_line_by_line() -> None:
    sections: dict[str, Any] = {"train": {"global_batch_size": 12, "micro_batch_size": 4, "epochs": 1}}
    sections |= {"data": {"train": "shards", "max_bad_fraction": 0.1}, "model": {"arch": "ViT-S-32"}}
    config = PretrainConfig.model_validate(sections)
    norms, none = build(CONV), build(VIT)
    lines = [line.split(": ") for line in notes(config, norms.clip, 1)]
    assert [line[:2] for line in lines] == [
        ["not exact", "train.micro_batch_size"],
        ["not exact", "data.max_bad_fraction"],
    ]
    told = list(notes(config, none.clip, 1))
    assert told == [
        "50% of the patches are dropped in training, as the weights' config says; "
        "model.vision_cfg.patch_dropout=0 takes all"
    ]
    norms.clip.visual.requires_grad_(False)
    assert not list(notes(config, norms.clip, 1))


def test_dropout_of_the_processs_own_numbers_is_named() -> None:
    sections: dict[str, Any] = {"train": {"global_batch_size": B, "epochs": 1}}
    sections |= {"data": {"train": "shards"}, "model": {"arch": "ViT-S-32"}}
    config = PretrainConfig.model_validate(sections)
    model = build(LAYER_NORM | {"timm_drop_path": 0.2})
    assert list(notes(config, model.clip, 1)) == [
        "not exact: dropout draws other numbers on another number of processes"
    ]
    model.clip.visual.requires_grad_(False)
    assert not list(notes(config, model.clip, 1))


def test_a_frozen_tower_is_left_without_gradient() -> None:
    model, batch = build(VIT), make_batch()
    model.clip.visual.requires_grad_(False)
    expected, _ = gradients(model, batch, 1)
    assert_same_gradients(gradients(model, batch, 4)[0], expected)


def test_only_the_last_micro_batch_communicates_and_the_loss_is_scaled_once() -> None:
    model, batch = build(VIT), make_batch()
    inside: list[bool] = []

    class Inside:
        def __enter__(self) -> None:
            inside.append(True)

        def __exit__(self, *_: object) -> None:
            inside.append(False)

    backwards: list[int] = []

    def scaled(loss: Tensor) -> None:
        backwards.append(1)
        (8 * loss).backward()

    expected, _ = gradients(model, batch, 1)
    got, out = gradients(model, batch, 4, no_sync=Inside, backward=scaled)
    assert inside == [True, False] * 3
    assert len(backwards) == 1
    assert_same_gradients(got, {name: None if g is None else 8 * g for name, g in expected.items()})
    assert out["loss"].item() == pytest.approx(_by_hand(model, batch, 4)[1].item())


@given(b=st.integers(1, 12), parts=st.integers(1, 12), seed=st.integers(0, 99))
def test_pieces_are_the_rows_in_order(b: int, parts: int, seed: int) -> None:
    batch = make_batch(b, seed)
    if parts > b:
        with pytest.raises(AssertionError, match="cannot be cut"):
            cut(batch, parts)
        return
    pieces = cut(batch, parts)
    assert len(pieces) == parts
    sizes = [len(piece["seq_lens"]) for piece in pieces]
    assert max(sizes) - min(sizes) <= 1
    for key, value in batch.items():
        if isinstance(value, Tensor):
            assert torch.equal(torch.cat([piece[key] for piece in pieces]), value)
        else:
            assert all(piece[key] is value for piece in pieces)
    for piece in pieces:
        assert int(piece["seq_lens"].sum()) == len(piece["token_ids"])
