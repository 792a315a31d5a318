"""Counted work against FlopCounterMode, open_clip's own profile, and peaks that everybody can look up."""

from types import SimpleNamespace
from typing import Any

import open_clip
import pytest
import timm
import torch
from open_clip.model import CustomTextCLIP
from timm.layers.mlp import SwiGLU
from torch.utils.flop_counter import FlopCounterMode

from diptych.pretrain.flops import Costs, forward_flops, kept_patches, step_flops
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.peaks import gemm_peak, peak_flops, tabulated

TEXT: dict[str, Any] = {"context_length": 12, "vocab_size": 60, "width": 32, "heads": 2, "layers": 2}
TINY = "vit_tiny_patch16_224"
VIT: dict[str, Any] = {"layers": 3, "width": 32, "head_width": 16, "patch_size": 8, "image_size": 32}


def named(arch: str) -> CustomTextCLIP:
    """A model of open_clip's, without weights."""
    config: Any = open_clip.get_model_config(arch)
    with torch.device("meta"):
        return CustomTextCLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])


def forward(clip: Any, side: int) -> tuple[float, float]:
    """Dense forward of one pair, both towers frozen in turn."""
    for parameter in clip.parameters():
        parameter.requires_grad_(False)
    _, both = step_flops(clip, image_size=side, seq_lens=torch.tensor([77]))
    text = forward_flops(clip.text, torch.zeros(1, 77, dtype=torch.long))
    return both - text, text


# open_clip's docs/model_profile.csv, GFLOP of one image and one caption
@pytest.mark.parametrize(
    ("arch", "image", "text"),
    [
        ("ViT-B-32", 8.82, 5.96),
        ("ViT-B-16", 35.13, 5.96),
        ("ViT-L-14", 162.03, 13.30),
        ("ViT-H-14", 334.59, 47.09),
    ],
)
def test_a_dense_forward_is_what_open_clips_profile_says(arch: str, image: float, text: float) -> None:
    found = forward(named(arch), 224)
    assert [round(value / 1e9, 2) for value in found] == [image, text]


@pytest.mark.parametrize(
    "vision",
    [
        VIT,
        VIT | {"mlp_ratio": 3.0, "pool_type": "avg"},
        {"timm_model_name": TINY, "timm_proj": "linear", "timm_pool": "token", "image_size": 224},
        {"timm_model_name": "resnet10t", "timm_proj": "linear", "image_size": 32},
        {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32},
    ],
    ids=["vit", "averaged", "timm", "conv", "resnet"],
)
def test_a_dense_step_is_what_the_flop_counter_counts(vision: dict[str, Any]) -> None:
    clip = build_model(ModelConfig(embed_dim=16, vision_cfg=vision, text_cfg=TEXT)).to("meta")
    side = vision["image_size"]
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        features = clip(torch.zeros(2, 3, side, side), torch.zeros(2, 12, dtype=torch.long))
        (features[0].sum() + features[1].sum()).backward()
    assert step_flops(clip, image_size=side, seq_lens=torch.tensor([12, 12]))[1] == counter.get_total_flops()


def test_a_packed_and_cut_step_is_what_the_flop_counter_counts_but_for_attention() -> None:
    """On a CPU the counter does not see attention."""
    clip = build_model(ModelConfig(embed_dim=16, vision_cfg=VIT, text_cfg=TEXT))
    root = ContrastiveModel(clip.double())  # fp32 may run on oneDNN, which the counter does not see
    lengths = torch.tensor([3, 12, 7])
    ids = torch.full((22,), 5, dtype=torch.int32)
    ids[[2, 14, 21]] = 59
    batch = {"image": torch.zeros(3, 3, 32, 32, dtype=torch.uint8), "token_ids": ids, "seq_lens": lengths}
    with FlopCounterMode(display=False) as counter:
        out = root(batch)
        (out["image_features"].sum() + out["text_features"].sum()).backward()
    n = 17  # tokens of an image
    # the last blocks' queries see tokens, not keys, by matrix products
    attention = 4 * 32 * (2 * 3 * n * n + int(lengths.square().sum()))
    work = Costs(root).step(batch)
    assert work.computed == work.needed == counter.get_total_flops() + 3 * attention
    assert (work.patches, work.tokens) == (48, 22)
    again = Costs(root).step(batch, recomputed=True)
    assert again.needed == work.needed
    assert again.computed > 1.3 * work.computed


def test_patches_that_are_dropped_are_not_counted_in_training() -> None:
    clip = named("ViT-B-32")
    for training, patches in ((True, 24), (False, 49)):
        root = SimpleNamespace(clip=clip, patch_dropout=0.5, training=training)
        batch = {"image": torch.empty(1, 3, 224, 224, device="meta"), "seq_lens": torch.tensor([9])}
        assert Costs(root).step(batch).patches == patches
    assert kept_patches(4, 0.99) == 1


def test_a_frozen_tower_costs_its_forward_alone() -> None:
    clip = named("ViT-B-32")
    lengths = torch.tensor([77])
    both = step_flops(clip, image_size=224, seq_lens=lengths)[1]
    image = forward_flops(clip.visual, torch.zeros(1, 3, 224, 224))
    embed = 2 * 49 * 3 * 32 * 32 * 768
    for parameter in clip.visual.parameters():
        parameter.requires_grad_(False)
    assert both - step_flops(clip, image_size=224, seq_lens=lengths)[1] == 2 * image - embed


def test_work_follows_the_size_of_the_images() -> None:
    clip = named("ViT-B-32")
    small, large = (step_flops(clip, image_size=side, seq_lens=torch.tensor([9]))[1] for side in (112, 224))
    assert 1.5 < large / small < 4


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989.4e12),
        ("NVIDIA H100 PCIe", torch.float16, 756e12),
        ("NVIDIA A100-SXM4-80GB", torch.float32, 19.5e12),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, None),  # emulated there
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("NVIDIA A10G", torch.float16, None),  # not an A10
        ("NVIDIA H100 80GB HBM3", torch.float64, None),
    ],
)
def test_peaks_are_looked_up_by_the_words_of_a_name(
    name: str, dtype: torch.dtype, peak: float | None
) -> None:
    assert tabulated(name, dtype) == peak


def test_a_cpu_is_measured_once_and_only_in_fp32() -> None:
    device = torch.device("cpu")
    assert peak_flops(device, torch.float32) == peak_flops(device, torch.float32)
    assert 1e9 < gemm_peak(seconds=0.05) < 1e14
    assert peak_flops(device, torch.bfloat16) is None


def test_towers_that_the_formula_does_not_fit_are_run() -> None:
    vision = {"timm_model_name": TINY, "timm_proj": "linear", "image_size": 224}
    clip = build_model(ModelConfig(embed_dim=16, vision_cfg=vision, text_cfg=TEXT))
    assert Costs(ContrastiveModel(clip)).vit is not None
    clip.visual.trunk = timm.create_model(  # type: ignore[assignment]  of this kind here
        TINY, mlp_layer=SwiGLU, num_classes=0
    )
    assert Costs(ContrastiveModel(clip)).vit is None
    computed, dense = step_flops(clip, image_size=224, seq_lens=torch.tensor([4]))
    assert 0.5 < computed / dense < 1
