"""The collectives on uneven rows."""

from typing import Any

import pytest
import torch

from diptych.configs.errors import UserError
from diptych.pretrain import distributed


def rows_of(rank: int, world_size: int) -> torch.Tensor:
    """3 * rank rows, so that rank 0 has none."""
    return torch.arange(3 * rank * 2).view(3 * rank, 2) + 100 * rank


def job(rank: int, world_size: int) -> dict[str, Any]:
    mine = rows_of(rank, world_size)
    counts = distributed.row_counts(len(mine))
    gathered = distributed.all_gather_rows(mine)
    full = torch.arange(sum(counts) * 2.0).view(-1, 2) * (rank + 1)
    distributed.barrier()
    return {
        "counts": counts,
        "gathered": gathered,
        "same": distributed.all_gather_rows(mine, counts).equal(gathered),
        "scattered": distributed.reduce_scatter_rows(full, counts),
        "sum": distributed.all_reduce_sum(torch.tensor(rank + 1.0)),
        "max": distributed.all_reduce_max(torch.tensor(rank + 1.0)),
        "broadcast": distributed.broadcast_json({"from": rank, "text": "a" * rank}, source=world_size - 1),
        "json": distributed.gather_json(["x" * rank, rank]),
        "rank": [distributed.rank(), distributed.world_size()],
    }


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_collectives_on_uneven_and_empty_ranks(ranks: Any, world_size: int) -> None:
    results = ranks(world_size, job)
    everyone = torch.cat([rows_of(r, world_size) for r in range(world_size)])
    total = world_size * (world_size + 1) / 2
    start = 0
    for rank, result in enumerate(results):
        assert result["rank"] == [rank, world_size]
        assert result["counts"] == [3 * r for r in range(world_size)]
        assert result["same"]
        assert result["gathered"].equal(everyone)
        whole = torch.arange(len(everyone) * 2.0).view(-1, 2) * total
        assert result["scattered"].equal(whole[start : start + 3 * rank])
        start += 3 * rank
        assert result["sum"] == total
        assert result["max"] == world_size
        assert result["broadcast"] == {"from": world_size - 1, "text": "a" * (world_size - 1)}
        assert result["json"] == [["x" * r, r] for r in range(world_size)]


def test_without_a_group_everything_is_local() -> None:
    x = torch.arange(6.0).view(3, 2)
    assert (distributed.rank(), distributed.world_size(), distributed.row_counts(3)) == (0, 1, [3])
    for function in (distributed.all_gather_rows, distributed.all_reduce_sum, distributed.all_reduce_max):
        assert function(x).equal(x)
    assert distributed.reduce_scatter_rows(x, [3]).equal(x)
    assert distributed.broadcast_json({"a": 1}) == {"a": 1}
    assert distributed.gather_json(1) == [1]
    distributed.barrier()
    distributed.teardown()
    assert distributed.setup("cpu") == torch.device("cpu")


def test_cuda_without_a_gpu_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: cuda"):
        distributed.setup("cuda")
    assert distributed.setup("auto") == torch.device("cpu")
