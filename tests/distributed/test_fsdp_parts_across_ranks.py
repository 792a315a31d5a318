"""Parts of sharded training by themselves: the norm, the scaler, tensors taken apart and together, blocks."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from diptych.pretrain import distributed
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.optim import OptimConfig, build_optimizer, clip_gradients
from diptych.pretrain.units import units

TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}


class Net(nn.Module):
    """Two layers and a scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        """x [b, 5] -> [b, 3]."""
        return self.layers(x) * self.scale


def net() -> Net:
    torch.manual_seed(0)
    return Net().double()


def rows(rank: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)


def job(rank: int, world_size: int) -> dict[str, Any]:
    model = net()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    distributed.shard(model, [model.layers[0]])
    parts = dict(model.named_parameters())
    out: dict[str, Any] = {
        "sharded": {name: distributed.is_sharded(p) for name, p in parts.items()},
        "whole": all(distributed.whole(p).equal(plain[name]) for name, p in parts.items()),
        "like": all(
            distributed.local(distributed.like(p, plain[name])).equal(distributed.local(p))
            for name, p in parts.items()
        ),
        "elements": sum(distributed.local(p).numel() for p in parts.values() if distributed.is_sharded(p)),
        "unsharded": [p.device.type for p in distributed.unsharded(model).parameters()],
    }
    for _ in range(2):  # two backward passes without communication count as one with both
        with distributed.no_sync(model):
            model(rows(rank)).square().sum().backward()
    model(rows(rank)).square().sum().backward()
    out["norm"] = clip_gradients(model.parameters(), 0.5)
    out["gradients"] = {n: distributed.whole(p.grad).clone() for n, p in parts.items() if p.grad is not None}

    model.zero_grad()
    optimizer = build_optimizer(model, OptimConfig(lr=0.1))
    scaler = distributed.ShardedScaler("cpu", init_scale=8.0)
    scaler.scale(model(rows(rank)).square().sum()).backward()
    if rank == world_size - 1:
        grad = parts["layers.0.bias"].grad
        assert grad is not None
        distributed.local(grad).fill_(torch.inf)
    before = distributed.whole(parts["layers.1.weight"]).clone()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    out["skipped"] = distributed.whole(parts["layers.1.weight"]).equal(before)
    out["scale"] = scaler.get_scale()
    model.zero_grad()
    scaler.scale(model(rows(rank)).square().sum()).backward()
    scaler.unscale_(optimizer)
    out["unscaled"] = clip_gradients(model.parameters(), None)
    scaler.step(optimizer)
    out["moved"] = not distributed.whole(parts["layers.1.weight"]).equal(before)
    return out


@pytest.mark.parametrize("world_size", [2, 3])
def test_shards_norms_and_overflows_are_those_of_the_whole(ranks: Any, world_size: int) -> None:
    results = ranks(world_size, job)
    truth = net()
    loss = torch.stack([truth(rows(r)).square().sum() for r in range(world_size)]).mean()
    (3 * loss).backward()
    once = torch.nn.utils.get_total_norm([p.grad for p in truth.parameters() if p.grad is not None]) / 3
    norm = clip_gradients(truth.parameters(), 0.5)
    sharded = {name: name != "scale" for name, _ in truth.named_parameters()}
    assert sum(r["elements"] for r in results) == sum(p.numel() for p in truth.layers.parameters())
    for result in results:
        assert result["sharded"] == sharded
        assert result["whole"]
        assert result["like"]
        assert set(result["unsharded"]) == {"meta"}
        torch.testing.assert_close(result["norm"], norm.detach(), atol=1e-12, rtol=1e-12)
        for name, p in truth.named_parameters():
            torch.testing.assert_close(result["gradients"][name], p.grad, atol=1e-12, rtol=1e-12, msg=name)
        assert result["skipped"]
        assert result["scale"] == 4
        torch.testing.assert_close(result["unscaled"], once, atol=1e-12, rtol=1e-12)
        assert result["moved"]


BLOCKS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "vit": (
        {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32},
        ["transformer.resblocks.0", "transformer.resblocks.1"],
    ),
    "timm_vit": ({"timm_model_name": "test_vit", "image_size": 160}, [f"trunk.blocks.{i}" for i in range(6)]),
    "stages_of_one_block": (
        {"timm_model_name": "test_efficientnet", "image_size": 32},
        [f"trunk.blocks.{i}.0" for i in range(5)],
    ),
    "stages": (
        {"timm_model_name": "test_convnext", "image_size": 160},
        [
            "trunk.stages.0",
            *[f"trunk.stages.{s}.blocks.{b}" for s, n in ((1, 2), (2, 4), (3, 2)) for b in range(n)],
        ],
    ),
}


@pytest.mark.parametrize("kind", BLOCKS)
def test_blocks_of_a_tower_are_found(kind: str) -> None:
    vision, expected = BLOCKS[kind]
    clip = ContrastiveModel(build_model(ModelConfig(embed_dim=8, vision_cfg=vision, text_cfg=TEXT))).clip
    names = {id(module): name for name, module in clip.named_modules()}
    text = [f"text.transformer.resblocks.{i}" for i in range(2)]
    assert [names[id(block)] for block in units(clip)] == [f"visual.{name}" for name in expected] + text
