"""Whole training steps under DDP with uneven batches against one process, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from diptych.pretrain import distributed
from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model, clamp_logit_scale
from diptych.pretrain.optim import OptimConfig, build_optimizer

from .pairs_of_ranks import SIZE, global_batch

BATCH, STEPS = 12, 3
TEXT = {"context_length": 10, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
VISION: dict[str, dict[str, Any]] = {
    "vit": {"layers": 2, "width": 32, "head_width": 16, "patch_size": 16, "image_size": SIZE},
    "resnet": {"timm_model_name": "test_resnet", "image_size": SIZE},
    "efficientnet": {
        "timm_model_name": "test_efficientnet",
        "image_size": SIZE,
    },  # norm and activation in one
}


def batch(step: int, rows: slice) -> dict[str, Tensor]:
    return global_batch(step, rows)


def train(vision: str, rows: slice) -> dict[str, Any]:
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=8, vision_cfg=VISION[vision], text_cfg=TEXT)
    model = ContrastiveModel(build_model(config).double())
    root: nn.Module = DistributedDataParallel(model) if distributed.world_size() > 1 else model
    optimizer = build_optimizer(root, OptimConfig(lr=1e-2, eps=1e-3))
    losses: list[Tensor] = []
    for step in range(STEPS):
        local = batch(step, rows)
        out = root(local)
        loss = contrastive_loss(
            **out, valid=local["valid"], caption_hash=local["caption_hash"], duplicates="positives", tile=5
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        clamp_logit_scale(model)
        losses.append(loss.detach())
    model.eval()
    state = {name: value.clone() for name, value in model.clip.state_dict().items()}
    with torch.no_grad():
        features = model(batch(99, slice(0, BATCH)))["image_features"]
    return {"losses": torch.stack(losses), "state": state, "features": features}


def job(rank: int, world_size: int, vision: str, split: list[int]) -> dict[str, Any]:
    start = sum(split[:rank])
    return train(vision, slice(start, start + split[rank]))


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("split", [[7, 5], [1, 8, 3], [12, 0]])
def test_training_on_several_ranks_equals_one_process(ranks: Any, vision: str, split: list[int]) -> None:
    by_rank = ranks(len(split), job, vision, split)
    truth = train(vision, slice(0, BATCH))
    for result in by_rank:
        torch.testing.assert_close(result["losses"], truth["losses"], atol=1e-11, rtol=0)
        torch.testing.assert_close(result["features"], truth["features"], atol=1e-10, rtol=0)
        assert result["state"].keys() == truth["state"].keys()
        for name, value in truth["state"].items():
            torch.testing.assert_close(result["state"][name], value, atol=1e-10, rtol=1e-10, msg=name)
            assert result["state"][name].equal(by_rank[0]["state"][name]), f"{name} differs between ranks"
