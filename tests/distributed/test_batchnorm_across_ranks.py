"""Synchronised batch norm against one layer that sees the whole batch, in fp64."""

from typing import Any

import pytest
import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, nn

from diptych.configs.errors import UserError
from diptych.pretrain.sync_batchnorm import synchronise_batchnorm

N, C = 13, 5
LAYERS = [
    "plain",
    "no affine",
    "running average",
    "no running",
    "one dimension",
    "activation",
    "channels last",
]


def layer(name: str) -> nn.Sequential:
    torch.manual_seed(0)
    norm = {
        "plain": lambda: nn.BatchNorm2d(C),
        "no affine": lambda: nn.BatchNorm2d(C, affine=False),
        "running average": lambda: nn.BatchNorm2d(C, momentum=None),
        "no running": lambda: nn.BatchNorm2d(C, track_running_stats=False),
        "one dimension": lambda: nn.BatchNorm1d(C),
        "activation": lambda: BatchNormAct2d(C, act_layer=nn.SiLU),
        "channels last": lambda: nn.BatchNorm2d(C, momentum=0.3, eps=1e-3),
    }[name]()
    for parameter in norm.parameters():
        nn.init.normal_(parameter)
    return nn.Sequential(norm).double()


def run(name: str, rows: slice) -> dict[str, Any]:
    net = synchronise_batchnorm(layer(name))
    out: list[Tensor] = []
    gradients: list[Tensor] = []
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        shape = (N, C) if name == "one dimension" else (N, C, 4, 3)
        x, direction = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
        x = (3 * x + 50)[rows]  # far from 0: a one-pass variance would lose digits
        if name == "channels last":
            x = x.contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        y = net(x)
        (y * direction[rows]).sum().backward()
        assert x.grad is not None
        out.append(y.detach())
        gradients.append(x.grad)
    parameters = [p.grad for p in net.parameters()]
    evaluated = net.eval()(torch.ones(2, *out[0].shape[1:], dtype=torch.float64)).detach()
    return {
        "out": out,
        "gradients": gradients,
        "parameters": parameters,
        "state": dict(net.state_dict()),
        "evaluated": evaluated,
    }


def job(rank: int, world_size: int, name: str, split: list[int]) -> dict[str, Any]:
    start = sum(split[:rank])
    return run(name, slice(start, start + split[rank]))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("split", [[7, 6], [1, 12], [2, 10, 1], [0, 13]])
def test_batch_norm_over_ranks_equals_one_layer(ranks: Any, name: str, split: list[int]) -> None:
    truth = run(name, slice(0, N))
    by_rank = ranks(len(split), job, name, split)
    for step in range(3):
        for key in ("out", "gradients"):
            found = torch.cat([r[key][step] for r in by_rank])
            torch.testing.assert_close(found, truth[key][step], atol=1e-12, rtol=0)
    for i, gradient in enumerate(truth["parameters"]):
        found = sum(r["parameters"][i] for r in by_rank)
        torch.testing.assert_close(found, gradient, atol=1e-11, rtol=0)
    for result in by_rank:
        torch.testing.assert_close(result["evaluated"], truth["evaluated"], atol=1e-12, rtol=0)
        assert list(result["state"]) == list(truth["state"])
        for key, value in truth["state"].items():
            torch.testing.assert_close(result["state"][key], value, atol=1e-12, rtol=1e-13)
            assert result["state"][key].equal(by_rank[0]["state"][key])


def refuse(rank: int, world_size: int) -> str:
    try:
        synchronise_batchnorm(nn.Sequential(nn.SyncBatchNorm(3)))
    except UserError as error:
        return str(error)
    return ""


def test_an_unknown_kind_of_batch_norm_is_refused(ranks: Any) -> None:
    assert all("SyncBatchNorm" in message for message in ranks(2, refuse))


def test_one_process_keeps_its_layers() -> None:
    net = layer("activation")
    before = net[0]
    synchronise_batchnorm(net)
    assert net[0] is before
