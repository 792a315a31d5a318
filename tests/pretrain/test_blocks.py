"""Lean blocks as modules: what hangs on a block or on a layer in it takes part, names and own calls stay."""

from typing import Any

import pytest
import torch
from open_clip.transformer import TextTransformer, Transformer, VisionTransformer
from torch import Tensor, nn

from diptych.pretrain.blocks import Group, Sequences, lean, run_blocks, supports_blocks
from diptych.pretrain.lean_vision import encode_image
from diptych.pretrain.packing import encode_text

WIDTH, HEADS, LAYERS = 32, 4, 3
IDS = torch.tensor([7, 3, 9, 7, 9, 7, 4, 4, 9], dtype=torch.int32)
LENGTHS = torch.tensor([3, 2, 4], dtype=torch.int32)


def text_tower() -> TextTransformer:
    torch.manual_seed(0)
    return TextTransformer(
        context_length=8, vocab_size=10, width=WIDTH, heads=HEADS, layers=LAYERS, output_dim=16
    ).double()


def image_tower() -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(16, 8, WIDTH, LAYERS, HEADS, 4.0, output_dim=16).double()


def run(tower: nn.Module) -> Tensor:
    if isinstance(tower, TextTransformer):
        return encode_text(tower, IDS, LENGTHS)
    return encode_image(tower, torch.linspace(-1, 1, 1536, dtype=torch.float64).view(2, 3, 16, 16))


@pytest.mark.parametrize("build", [text_tower, image_tower])
def test_every_block_is_called_once_as_a_module_in_forward_and_backward(build: Any) -> None:
    tower = lean(build())
    fired: list[str] = []
    for i, block in enumerate(tower.transformer.resblocks):
        block.register_forward_pre_hook(lambda *_, i=i: fired.append(f"before {i}"))
        block.register_forward_hook(lambda *_, i=i: fired.append(f"after {i}"))
        block.register_full_backward_hook(lambda *_, i=i: fired.append(f"back {i}"))
    run(tower).sum().backward()
    forward = [f"{when} {i}" for i in range(LAYERS) for when in ("before", "after")]
    assert fired == forward + [f"back {i}" for i in reversed(range(LAYERS))]


@pytest.mark.parametrize("build", [text_tower, image_tower])
def test_names_and_open_clips_own_calls_stay(build: Any) -> None:
    plain, ours = build(), lean(build())
    assert list(plain.state_dict()) == list(ours.state_dict())
    x = torch.randn(2, 5, WIDTH, dtype=torch.float64)
    mask = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu_(1)
    assert ours.transformer(x, attn_mask=mask).equal(plain.transformer(x, attn_mask=mask))
    for transformer in (plain.transformer, ours.transformer):
        transformer.grad_checkpointing = True
    assert ours.transformer(x, attn_mask=mask).equal(plain.transformer(x, attn_mask=mask))


class LowRank(nn.Module):
    """LoRA on a linear layer (arXiv 2106.09685)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 2, bias=False, dtype=base.weight.dtype)
        self.up = nn.Linear(2, base.out_features, bias=False, dtype=base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("build", [text_tower, image_tower])
def test_low_rank_layers_in_a_block_equal_the_weights_they_stand_for(build: Any) -> None:
    merged, ours = lean(build()), lean(build())
    for theirs, block in zip(merged.transformer.resblocks, ours.transformer.resblocks, strict=True):
        block.mlp.c_fc = LowRank(block.mlp.c_fc)
        block.attn.out_proj = LowRank(block.attn.out_proj)
        with torch.no_grad():
            theirs.mlp.c_fc.weight += block.mlp.c_fc.up.weight @ block.mlp.c_fc.down.weight
            theirs.attn.out_proj.weight += block.attn.out_proj.up.weight @ block.attn.out_proj.down.weight
    torch.testing.assert_close(run(ours), run(merged), atol=1e-12, rtol=0)


def test_a_last_block_reads_any_position_of_uneven_groups() -> None:
    torch.manual_seed(1)
    transformer = lean(Transformer(WIDTH, LAYERS, HEADS).double())
    groups = (Group(2, 3), Group(1, 5))
    x = torch.randn(11, WIDTH, dtype=torch.float64)
    found = run_blocks(transformer, x, Sequences(groups, False, torch.tensor([1, 5, 6])))
    parts = [transformer(part[None])[0] for part in x.split([3, 3, 5])]
    truth = torch.stack([parts[0][1], parts[1][2], parts[2][0]])
    torch.testing.assert_close(found, truth, atol=1e-12, rtol=0)


def test_blocks_that_are_not_understood_keep_their_class_and_say_why() -> None:
    transformer = Transformer(WIDTH, 1, HEADS, scaled_cosine_attn=True)
    lean(transformer)
    assert "cosine" in str(supports_blocks(transformer))
    transformer = nn.Module()
    transformer.resblocks = nn.ModuleList([nn.Identity()])
    assert "Identity" in str(supports_blocks(lean(transformer)))
