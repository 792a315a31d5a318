"""Steps that go wrong on one rank alone: every rank leaves them out, and nothing has moved anywhere."""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diptych.configs.load import load_config
from diptych.data.trace import trace_lines
from diptych.pretrain import distributed, parts
from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.guard import Guard
from diptych.pretrain.model import ContrastiveModel
from diptych.pretrain.parts import RunParts
from diptych.pretrain.train import _Run, train

BAD = 3  # the step, from 1


class NanBackward(torch.autograd.Function):
    """Features that are well, with a gradient that is not."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] * torch.nan


def job(rank: int, world: int, config: str, overrides: list[str], where: str, waits: bool) -> dict[str, Any]:
    """A whole run in which rank 1 meets a NaN in one step. Returns everything that a checkpoint holds before
    each step."""
    snapshots: list[dict[str, Tensor]] = []
    runs: list[RunParts] = []
    enter, image, text = _Run._enter_step, ContrastiveModel.encode_image, ContrastiveModel.encode_text

    def hit() -> bool:
        return rank == 1 and bool(runs) and runs[0].state.step == BAD - 1

    def entering(self: _Run) -> float:
        runs[:] = [self]
        state = self.state
        tensors = {
            **self.clip.state_dict(),
            **{f"optimizer {k}": v for k, v in state._optimizer_tensors().items()},
        }
        assert state.ema is not None
        tensors |= {f"average {k}": v for k, v in state.ema.weights().items()}
        snapshots.append({k: distributed.whole(v).clone() for k, v in tensors.items()})
        return enter(self)

    def encode_image(self: ContrastiveModel, *args: Any) -> Tensor:
        out = image(self, *args)
        return out * torch.nan if where == "features" and hit() else out

    def encode_text(self: ContrastiveModel, *args: Any) -> Tensor:
        out = text(self, *args)
        return NanBackward.apply(out) if where == "gradient" and hit() else out  # pyright: ignore[reportReturnType]

    _Run._enter_step = entering
    ContrastiveModel.encode_image, ContrastiveModel.encode_text = encode_image, encode_text
    distributed.teardown = lambda: None  # the group is the test's
    parts.Guard = partial(Guard, waits=waits)  # pyright: ignore[reportAttributeAccessIssue]
    train(load_config(PretrainConfig, Path(config), overrides))
    return {"snapshots": snapshots}


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ..pretrain.train_runs import make_data, write_config  # not known to the ranks

    folder = tmp_path_factory.mktemp("squares")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


RESNET = "model.vision_cfg={timm_model_name: test_resnet, timm_proj: linear, image_size: 32}"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("where", "waits", "overrides"),
    [
        ("features", False, ["train.parallel=ddp"]),
        ("gradient", True, ["train.micro_batch_size=3", "optim.name=muon"]),
        ("features", True, [RESNET]),
        ("gradient", False, ["train.parallel=fsdp", "train.micro_batch_size=4"]),
        ("features", True, ["train.parallel=fsdp", "optim.name=muon"]),
        ("gradient", True, ["train.parallel=fsdp"]),
    ],
)
def test_a_nan_on_one_rank_is_left_out_on_all(
    ranks: Any, squares: Path, tmp_path: Path, where: str, waits: bool, overrides: list[str]
) -> None:
    out = tmp_path / "run"
    options = [f"out={out}", "train.total_samples=80", "guard.replicas_every_steps=1", *overrides]
    by_rank = [result["snapshots"] for result in ranks(2, job, str(squares), options, where, waits)]
    for step, (one, other) in enumerate(zip(*by_rank, strict=True)):
        assert one.keys() == other.keys()
        for name, value in one.items():
            assert value.equal(other[name]), (step, name)
    before, after, later = by_rank[0][BAD - 1 : BAD + 2]
    for name, value in after.items():
        assert value.equal(before[name]), name
    assert [name for name in before if "weight" in name and not later[name].equal(after[name])]
    rows = [json.loads(line) for line in (out / "bad_steps.jsonl").read_text().splitlines()]
    assert [(row["step"], row["reason"]) for row in rows] == [(BAD, "not finite")]
    assert rows[0]["loss"] == ("nan" if where == "features" else pytest.approx(2, abs=2))
    assert rows[0]["grad_norm"] == "nan"
    config = load_config(PretrainConfig, squares, options)
    lines = trace_lines(
        config.data, seed=0, global_batch_size=16, world_size=1, workers=0, epoch=0, start=BAD - 1, steps=1
    )
    assert rows[0]["sample_ids"] == json.loads(next(iter(lines)))["sample_ids"]
