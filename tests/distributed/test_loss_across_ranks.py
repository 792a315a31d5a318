"""The losses on 2 and 3 ranks with uneven batches against one process, in fp64."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.pretrain import distributed
from diptych.pretrain.contrastive import contrastive_loss

N, D = 23, 6
SPLITS = {2: [[12, 11], [20, 3], [23, 0]], 3: [[8, 8, 7], [1, 20, 2], [0, 14, 9], [0, 0, 23]]}
VALID = {
    "all": torch.ones(N, dtype=torch.bool),
    "some": torch.arange(N) % 4 != 1,
    "none on the first rank": torch.arange(N) >= 20,
    "none": torch.zeros(N, dtype=torch.bool),
}


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(N, D, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    return image, text, torch.tensor(30.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)


def loss_and_gradients(rows: slice, valid: str, kind: Any, duplicates: Any) -> list[Tensor]:
    image, text, scale, bias = inputs()
    leaves = [t.clone().requires_grad_() for t in (image[rows], text[rows], scale, bias)]
    loss = contrastive_loss(
        *leaves[:3],
        logit_bias=leaves[3],
        valid=VALID[valid][rows],
        caption_hash=(torch.arange(N) % 9)[rows],
        kind=kind,
        duplicates=duplicates,
        tile=5,
    )
    return [loss.detach(), *torch.autograd.grad(2 * loss, leaves)]


def job(rank: int, world_size: int, kind: str, duplicates: str) -> list[list[Tensor]]:
    results: list[list[Tensor]] = []
    for split in SPLITS[world_size]:
        start = sum(split[:rank])
        for valid in VALID:
            results.append(loss_and_gradients(slice(start, start + split[rank]), valid, kind, duplicates))
    return results


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", ["clip", "siglip"])
@pytest.mark.parametrize("duplicates", ["negatives", "positives", "ignore"])
def test_loss_and_averaged_gradients_equal_one_process(
    ranks: Any, world_size: int, kind: str, duplicates: str
) -> None:
    assert distributed.world_size() == 1
    by_rank = ranks(world_size, job, kind, duplicates)
    truths = [loss_and_gradients(slice(0, N), valid, kind, duplicates) for valid in VALID]
    for case, results in enumerate(zip(*by_rank, strict=True)):
        loss, image, text, scale, bias = truths[case % len(VALID)]
        found = [torch.cat([r[i] for r in results]) / world_size for i in (1, 2)]
        torch.testing.assert_close(found, [image, text], atol=1e-12, rtol=0)
        for i, truth in ((3, scale), (4, bias)):
            mean = torch.stack([r[i] for r in results]).mean(0)
            torch.testing.assert_close(mean, truth, atol=1e-12, rtol=0)
        for result in results:
            torch.testing.assert_close(result[0], loss, atol=1e-12, rtol=0)
            assert result[0].equal(results[0][0])  # the same bits on every rank
