"""The losses on 1 to 4 ranks with uneven batches against one process, in fp64; both exchanges."""

from itertools import cycle, product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from diptych.pretrain import distributed
from diptych.pretrain.contrastive import contrastive_loss

N, D = 23, 6
SPLITS = {
    1: [[23]],
    2: [[12, 11], [20, 3], [23, 0]],
    3: [[8, 8, 7], [1, 20, 2], [0, 0, 23]],
    4: [[6, 6, 6, 5], [0, 14, 0, 9], [1, 1, 20, 1]],
}
VALID = {
    "all": torch.ones(N, dtype=torch.bool),
    "some": torch.arange(N) % 4 != 1,
    "none on the first rank": torch.arange(N) >= 20,
    "none": torch.zeros(N, dtype=torch.bool),
}
WEIGHT = (torch.arange(N) % 5) / 4  # float32, some of them 0
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "positives": {"duplicates": "positives"},
    "ignore, smoothed": {"duplicates": "ignore", "label_smoothing": 0.2},
    "positives, weighted": {"duplicates": "positives", "weight": WEIGHT},
    "ignore, weighted": {"duplicates": "ignore", "weight": WEIGHT},
    "smoothed, weighted": {"label_smoothing": 0.2, "weight": WEIGHT},
    "steep": {"times": 5},  # a scale of 100
    "weights of 0": {"weight": torch.zeros(N)},
}


def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(N, D, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    return image, text, torch.tensor(20.0, dtype=torch.float64), torch.tensor(-2.0, dtype=torch.float64)


def cases(splits: int) -> list[tuple[int, str, str, str]]:
    """(split, kind, options, valid): every option with every split and kind, and validities in turn."""
    triples = product(range(splits), ("clip", "siglip"), OPTIONS)
    return [(*triple, valid) for triple, valid in zip(triples, cycle(VALID), strict=False)]


def loss_and_gradients(rows: slice, kind: Any, options: str, valid: str, exchange: Any) -> list[Tensor]:
    image, text, scale, bias = inputs()
    leaves = [t.clone().requires_grad_() for t in (image[rows], text[rows], scale, bias)]
    chosen = dict(OPTIONS[options])
    if kind == "siglip":
        chosen["label_smoothing"] = 0.0
    if "weight" in chosen:
        chosen["weight"] = chosen["weight"][rows]
    loss = contrastive_loss(
        *leaves[:2],
        leaves[2] * chosen.pop("times", 1),
        logit_bias=leaves[3],
        valid=VALID[valid][rows],
        caption_hash=(torch.arange(N) % 9)[rows],
        kind=kind,
        exchange=exchange,
        tile=5,
        **chosen,
    )
    return [loss.detach(), *torch.autograd.grad(2 * loss, leaves)]


def job(rank: int, world_size: int, exchange: str) -> list[list[Tensor]]:
    splits = SPLITS[world_size]
    return [
        loss_and_gradients(slice(sum(splits[s][:rank]), sum(splits[s][: rank + 1])), *case, exchange)
        for s, *case in cases(len(splits))
    ]


def check(by_rank: list[list[Tensor]], truth: list[Tensor]) -> None:
    loss, image, text, scale, bias = truth
    found = [torch.cat([r[i] for r in by_rank]) / len(by_rank) for i in (1, 2)]
    torch.testing.assert_close(found, [image, text], atol=1e-12, rtol=0)
    for i, expected in ((3, scale), (4, bias)):
        mean = torch.stack([r[i] for r in by_rank]).mean(0)
        torch.testing.assert_close(mean, expected, atol=1e-12, rtol=0)
    for result in by_rank:
        torch.testing.assert_close(result[0], loss, atol=1e-12, rtol=0)
        assert result[0].equal(by_rank[0][0])  # the same bits on every rank


@pytest.mark.parametrize(
    ("world_size", "exchange"),
    [(1, "ring"), *((world, exchange) for world in (2, 3, 4) for exchange in ("gather", "ring"))],
)
def test_loss_and_averaged_gradients_equal_one_process(ranks: Any, world_size: int, exchange: str) -> None:
    assert distributed.world_size() == 1
    results = zip(*ranks(world_size, job, exchange), strict=True)
    for (_, *case), by_rank in zip(cases(len(SPLITS[world_size])), results, strict=True):
        check(list(by_rank), loss_and_gradients(slice(0, N), *case, "gather"))


def held(rank: int, world_size: int, exchange: Any) -> int:
    """Elements of the largest tensor that a loss makes of 40 local pairs, D = 16 and tiles of 8."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, Tensor):
                    nbytes = value.untyped_storage().nbytes()
                    self.elements = max(self.elements, nbytes // value.element_size())
            return out

    image, text = (torch.randn(40, 16).requires_grad_() for _ in range(2))
    with Largest() as largest:
        contrastive_loss(image, text, torch.tensor(3.0), exchange=exchange, tile=8).backward()
    return largest.elements


def test_the_ring_holds_no_more_than_the_local_batch_has(ranks: Any) -> None:
    assert ranks(4, held, "ring") == [40 * 16] * 4
    assert min(ranks(4, held, "gather")) >= 4 * 40 * 16
