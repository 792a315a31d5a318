"""Packed text against open_clip's own padded tower, in fp64."""

from typing import Any

import pytest
import torch
from open_clip.transformer import TextTransformer
from torch import Tensor, nn

from diptych.pretrain.blocks import lean, run_blocks
from diptych.pretrain.packing import encode_text, pack_text, pad_text, supports_packing

CONTEXT, VOCAB, START, END = 16, 99, 97, 98

TOWERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "one block": {"layers": 1},
    "layer scale": {"ls_init_value": 0.1},
    "quick gelu": {"act_layer": "quick"},
    "read at eos": {"pool_type": "eos", "eos_id": END},
    "read at the first token": {"pool_type": "first"},
    "no projection": {"proj_type": "none"},
    "projection with bias": {"proj_bias": True},
    "bidirectional": {"no_causal_mask": True, "use_pad_mask": True},
    "bidirectional, read first": {"no_causal_mask": True, "use_pad_mask": True, "pool_type": "first"},
    "class token as released": {"embed_cls": True},
    "class token as in the paper": {"embed_cls": True, "correct_cls_mask": True},
    "class token, bidirectional": {"embed_cls": True, "no_causal_mask": True},
    "class token as in the paper, bidirectional": {
        "embed_cls": True,
        "no_causal_mask": True,
        "correct_cls_mask": True,
    },
    "custom blocks": {
        "qk_norm": True,
        "scale_heads": True,
        "scale_attn_inner": True,
        "scale_attn": True,
        "scale_fc": True,
    },
}


def build_tower(**options: Any) -> TextTransformer:
    from open_clip.transformer import QuickGELU

    torch.manual_seed(0)
    if options.get("act_layer") == "quick":
        options["act_layer"] = QuickGELU
    defaults: dict[str, Any] = {
        "context_length": CONTEXT,
        "vocab_size": VOCAB,
        "width": 32,
        "heads": 4,
        "output_dim": 24,
    }
    every: dict[str, Any] = {"layers": 3, **defaults, **options}
    tower = TextTransformer(**every).double()
    for parameter in tower.parameters():  # biases and norms start at 0 and 1, which would hide mistakes
        nn.init.normal_(parameter, std=0.3)
    return lean(tower)


def captions(seed: int, count: int = 20) -> list[Tensor]:
    """Random captions with start and end tokens: shortest, longest, and padding's id 0 as a word."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [2, CONTEXT, CONTEXT - 1, 3]
    lengths += torch.randint(2, CONTEXT + 1, (count - len(lengths),), generator=generator).tolist()
    rows: list[Tensor] = []
    for length in lengths:
        row = torch.randint(0, 12, (length,), generator=generator)
        row[0], row[-1] = START, END
        rows.append(row)
    return rows


def padded(rows: list[Tensor], context: int = CONTEXT) -> Tensor:
    return torch.stack([torch.cat([row, row.new_zeros(context - len(row))]) for row in rows])


def packed(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    return torch.cat(rows).int(), torch.tensor([len(row) for row in rows], dtype=torch.int32)


def gradients(tower: nn.Module, features: Tensor, direction: Tensor) -> dict[str, Tensor | None]:
    tower.zero_grad()
    (features * direction).sum().backward()
    return {name: None if p.grad is None else p.grad.clone() for name, p in tower.named_parameters()}


@pytest.mark.parametrize("name", TOWERS)
def test_packed_text_equals_the_padded_tower_in_features_and_all_gradients(name: str) -> None:
    tower = build_tower(**TOWERS[name])
    assert supports_packing(tower) is None
    for seed in range(3):
        rows = captions(seed)
        truth = tower(padded(rows))
        features = encode_text(tower, *packed(rows))
        direction = torch.randn(truth.shape, dtype=truth.dtype, generator=torch.Generator().manual_seed(seed))
        expected, found = gradients(tower, truth, direction), gradients(tower, features, direction)
        torch.testing.assert_close(features, truth, atol=1e-12, rtol=1e-12)
        for parameter, value in expected.items():
            got = found[parameter]
            assert (got is None) == (value is None), parameter
            if value is not None:
                assert got is not None
                worst = (got - value).abs().max() / value.abs().max().clamp_min(1)
                assert worst <= 1e-11, (parameter, worst)


def test_the_first_of_equal_largest_tokens_is_read() -> None:
    tower = build_tower()
    rows = [torch.tensor([START, 5, END, 7, END, 3]), torch.tensor([START, END, END])]
    torch.testing.assert_close(encode_text(tower, *packed(rows)), tower(padded(rows)), atol=1e-12, rtol=0)
    assert len(pack_text(tower, *packed(rows)).ids) == 3 + 2  # what follows the token read is not computed


def test_a_caption_without_eos_is_read_at_its_start_as_open_clip_does() -> None:
    tower = build_tower(pool_type="eos", eos_id=END)
    rows = [torch.tensor([START, 5, 6]), torch.tensor([START, 4, END])]
    torch.testing.assert_close(encode_text(tower, *packed(rows)), tower(padded(rows)), atol=1e-12, rtol=0)


def test_features_do_not_depend_on_the_other_captions() -> None:
    tower = build_tower()
    rows = captions(4)
    together = encode_text(tower, *packed(rows))
    alone = torch.cat([encode_text(tower, *packed([row])) for row in rows])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_an_empty_batch_gives_no_features_and_zero_gradients() -> None:
    tower = build_tower()
    features = encode_text(tower, torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    assert features.shape == (0, 24)
    features.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in tower.parameters())


def test_no_padding_token_is_computed() -> None:
    tower = build_tower()
    rows = captions(5)
    text = pack_text(tower, *packed(rows))
    assert len(text.ids) == sum(len(row) for row in rows)
    assert sum(g.count * g.length for g in text.sequences.groups) == len(text.ids)
    x = torch.randn(len(text.ids), 32, dtype=torch.float64)
    assert run_blocks(tower.transformer, x, text.sequences).shape == (len(rows), 32)


def test_activation_checkpointing_changes_no_gradient() -> None:
    tower = build_tower()
    rows = captions(6)
    direction = torch.randn(len(rows), 24, dtype=torch.float64)
    plain = gradients(tower, encode_text(tower, *packed(rows)), direction)
    tower.set_grad_checkpointing(True)
    again = gradients(tower, encode_text(tower, *packed(rows)), direction)
    for name, value in plain.items():
        torch.testing.assert_close(again[name], value, atol=1e-12, rtol=0)


def test_bfloat16_autocast_stays_near_the_padded_tower() -> None:
    tower = build_tower().float()
    rows = captions(7)
    with torch.autocast("cpu", torch.bfloat16):
        features, truth = encode_text(tower, *packed(rows)), tower(padded(rows))
    assert torch.nn.functional.cosine_similarity(features.float(), truth.float()).min() > 0.99


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"pool_type": "last"}, "last"),
        ({"pool_type": "none"}, "none"),
        ({"no_causal_mask": True}, "padding"),
        ({"pad_id": 1}, "padding id 1"),
        ({"scaled_cosine_attn": True}, "cosine"),
    ],
)
def test_towers_that_need_padding_say_why(options: dict[str, Any], word: str) -> None:
    reason = supports_packing(build_tower(**options))
    assert reason is not None
    assert word in reason


@pytest.mark.parametrize("options", [{"pool_type": "last"}, {"no_causal_mask": True}])
def test_towers_that_attend_to_padding_run_padded(options: dict[str, Any]) -> None:
    tower = build_tower(**options)
    rows = captions(8)
    torch.testing.assert_close(encode_text(tower, *packed(rows)), tower(padded(rows)), atol=0, rtol=0)
    assert torch.equal(pad_text(tower, *packed(rows)), padded(rows))


def test_a_caption_past_the_context_length_is_refused() -> None:
    tower = build_tower()
    with pytest.raises(AssertionError, match="context_length"):
        encode_text(tower, torch.ones(CONTEXT + 1, dtype=torch.int32), torch.tensor([CONTEXT + 1]))
