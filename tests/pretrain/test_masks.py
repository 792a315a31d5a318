"""Patch dropout: keyed by the sample alone, fair, and settable while a run goes on."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diptych.configs.errors import UserError
from diptych.pretrain.masks import kept_patches
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model

TEXT: dict[str, Any] = {"context_length": 8, "width": 16, "heads": 2, "layers": 1, "vocab_size": 64}
VISION: dict[str, Any] = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}


def model(seed: int = 0, **vision: Any) -> ContrastiveModel:
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=8, vision_cfg={**VISION, **vision}, text_cfg=TEXT)
    return ContrastiveModel(build_model(config).double(), seed=seed).train()


def batch(ids: list[int], epoch: int = 0) -> dict[str, Any]:
    image = torch.stack(
        [
            torch.randint(0, 256, (3, 32, 32), generator=torch.Generator().manual_seed(i), dtype=torch.uint8)
            for i in ids
        ]
    )
    return {
        "image": image,
        "token_ids": torch.tensor([1, 63] * len(ids), dtype=torch.int32),
        "seq_lens": torch.full((len(ids),), 2, dtype=torch.int32),
        "sample_id": torch.tensor(ids),
        "source": torch.tensor([i % 2 for i in ids], dtype=torch.int16),
        "epoch": epoch,
    }


def splitmix(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def by_hand(sample: int, patches: int, kept: int, seed: int, epoch: int, source: int) -> list[int]:
    """The same hash in Python's integers."""
    golden, wrap = 0x9E3779B97F4A7C15, 2**64
    key = splitmix((sample + seed * golden) % wrap)
    key = splitmix((key + epoch * golden) % wrap)
    key = splitmix((key + source) % wrap)
    score = [splitmix((key + (i + 1) * golden) % wrap) for i in range(patches)]
    signed = [s - wrap if s >= 2**63 else s for s in score]
    return sorted(sorted(range(patches), key=lambda i: -signed[i])[:kept])


@settings(max_examples=20, deadline=None)
@given(
    ids=st.lists(st.integers(0, 2**62), min_size=1, max_size=6),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 1000),
    source=st.integers(0, 300),
    share=st.sampled_from([0.1, 0.25, 0.5, 0.9]),
)
def test_masks_are_the_hash_of_the_sample(
    ids: list[int], seed: int, epoch: int, source: int, share: float
) -> None:
    sources = torch.full((len(ids),), source, dtype=torch.int16)
    found = kept_patches(torch.tensor(ids), 49, share, seed=seed, epoch=epoch, source=sources)
    kept = int(49 * (1 - share))
    assert found.tolist() == [by_hand(i, 49, kept, seed, epoch, source) for i in ids]


@settings(max_examples=10, deadline=None)
@given(
    ids=st.lists(st.integers(0, 10**6), min_size=2, max_size=7, unique=True),
    cut=st.integers(1, 6),
    epoch=st.integers(0, 3),
)
def test_features_do_not_depend_on_how_the_batch_is_cut(ids: list[int], cut: int, epoch: int) -> None:
    root = model(seed=5)
    root.patch_dropout = 0.5
    whole = root(batch(ids, epoch))["image_features"]
    cut = min(cut, len(ids) - 1)
    parts = [root(batch(part, epoch))["image_features"] for part in (ids[:cut], ids[cut:])]
    torch.testing.assert_close(torch.cat(parts), whole, atol=1e-13, rtol=0)


def test_every_patch_and_every_pair_of_patches_is_kept_as_often_as_any_other() -> None:
    patches, samples = 8, 20_000
    kept = kept_patches(torch.arange(samples), patches, 0.5, seed=1)
    hit = torch.zeros(samples, patches).scatter_(1, kept, 1.0)
    pairs = (hit.T @ hit) / samples
    expected = torch.full_like(pairs, 4 / 8 * 3 / 7).fill_diagonal_(0.5)
    assert (pairs - expected).abs().max() < 5 * math.sqrt(0.25 / samples)


def test_seed_epoch_and_source_each_give_another_mask() -> None:
    ids = torch.arange(4)
    zero = torch.zeros(4, dtype=torch.int16)
    masks = [
        kept_patches(ids, 64, 0.5, seed=seed, epoch=epoch, source=zero + source)
        for seed, epoch, source in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))
    ]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 4


def test_patches_drop_in_training_only_and_as_set_now() -> None:
    root, data = model(), batch([3, 4])
    seen: list[int] = []

    def count(_module: Any, args: tuple[Tensor, ...]) -> None:
        seen.append(args[0].shape[0] // 2)

    # of this kind here
    root.clip.visual.transformer.resblocks[0].register_forward_pre_hook(count)  # type: ignore[union-attr]
    for share in (0.0, 0.5, 0.9):
        root.patch_dropout = share
        root(data)
    root.eval()(data)
    assert seen == [17, 9, 2, 17]
    assert model(patch_dropout=0.25).patch_dropout == 0.25


def test_without_sample_ids_the_row_decides() -> None:
    root, data = model(), batch([0, 1, 2])
    root.patch_dropout = 0.5
    data["source"] = torch.zeros(3, dtype=torch.int16)
    truth = root(data)["image_features"]
    bare = {k: v for k, v in data.items() if k not in ("sample_id", "epoch")}
    assert root(bare)["image_features"].equal(truth)


def test_a_tower_without_patches_refuses_to_drop_them() -> None:
    vision = {"timm_model_name": "test_efficientnet", "image_size": 32}
    root = ContrastiveModel(build_model(ModelConfig(embed_dim=8, vision_cfg=vision, text_cfg=TEXT)))
    root.patch_dropout = 0.0
    with pytest.raises(UserError, match="ViT"):
        root.patch_dropout = 0.5
