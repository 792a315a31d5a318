"""Micro-batches under DDP with uneven local batches against one process and the whole batch, in fp64."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

# public, but for its stub
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from diptych.pretrain import distributed
from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.gradcache import forward_backward
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model

from .pairs_of_ranks import SIZE, global_batch

BATCH = 14
TEXT = {"context_length": 10, "vocab_size": 50, "width": 16, "heads": 2, "layers": 2}
VIT = {"layers": 2, "width": 32, "head_width": 16, "patch_size": 8, "image_size": SIZE, "patch_dropout": 0.5}
RESNET = {"timm_model_name": "test_resnet", "image_size": SIZE}


def batch(rows: slice) -> dict[str, Any]:
    return global_batch(0, rows, size=BATCH, captions=11, sample_ids=1000)


def step(vision: dict[str, Any], rows: slice, micro_batches: int, exchange: Any) -> dict[str, Any]:
    """Loss, gradients, buffers and the number of all-reduced gradient buckets of two steps."""
    torch.manual_seed(0)
    config = ModelConfig(embed_dim=8, vision_cfg=vision, text_cfg=TEXT, init_logit_bias=-2.0)
    model = ContrastiveModel(build_model(config).double())
    root: nn.Module = model
    buckets: list[int] = []
    if distributed.world_size() > 1:
        root = DistributedDataParallel(model)

        def count(group: Any, bucket: GradBucket) -> torch.futures.Future[Tensor]:
            buckets.append(bucket.index())
            return allreduce_hook(group, bucket)

        root.register_comm_hook(None, count)
    local = batch(rows)

    def loss_of(out: dict[str, Tensor]) -> Tensor:
        sides = {key: local[key] for key in ("valid", "caption_hash")}
        return contrastive_loss(**out, **sides, kind="siglip", duplicates="ignore", exchange=exchange, tile=4)

    losses: list[Tensor] = []
    for _ in range(2):
        root.zero_grad()
        out = forward_backward(
            root, local, loss_of, micro_batches=micro_batches, no_sync=partial(distributed.no_sync, root)
        )
        losses.append(out["loss"])
    return {
        "losses": torch.stack(losses),
        "gradients": {name: p.grad for name, p in model.named_parameters()},
        "buffers": dict(model.clip.named_buffers()),
        "buckets": buckets,
    }


def job(
    rank: int, world_size: int, vision: dict[str, Any], split: list[int], micro: int, exchange: str
) -> Any:
    start = sum(split[:rank])
    return step(vision, slice(start, start + split[rank]), micro, exchange)


@pytest.mark.parametrize(
    ("split", "micro_batches", "exchange"),
    [([7, 7], 3, "gather"), ([11, 3], 2, "ring"), ([4, 8, 2], 2, "gather"), ([5, 5, 4], 4, "ring")],
)
def test_micro_batches_on_ranks_have_the_gradient_of_the_global_batch(
    ranks: Any, split: list[int], micro_batches: int, exchange: str
) -> None:
    by_rank = ranks(len(split), job, VIT, split, micro_batches, exchange)
    truth = step(VIT, slice(0, BATCH), 1, "gather")
    for result in by_rank:
        torch.testing.assert_close(result["losses"], truth["losses"], atol=1e-12, rtol=0)
        for name, gradient in truth["gradients"].items():
            torch.testing.assert_close(result["gradients"][name], gradient, atol=1e-12, rtol=0, msg=name)


def test_gradients_go_between_processes_once_a_step(ranks: Any) -> None:
    (plain, _), (cut, _) = (ranks(2, job, VIT, [7, 7], micro, "gather") for micro in (1, 3))
    assert len(plain["buckets"]) > 0
    assert cut["buckets"] == plain["buckets"]


def test_synchronised_batch_norms_meet_in_every_micro_batch(ranks: Any) -> None:
    one, other = ranks(2, job, RESNET, [9, 5], 3, "gather")
    tracked = [name for name in one["buffers"] if name.endswith("num_batches_tracked")]
    assert tracked
    for name, value in one["buffers"].items():
        assert value.equal(other["buffers"][name]), name
        if name in tracked:
            assert value == 2 * 3  # two steps of three micro-batches, each counted once
    for name, gradient in one["gradients"].items():
        torch.testing.assert_close(gradient, other["gradients"][name], atol=1e-14, rtol=0, msg=name)
