"""One bit of one tensor on one process: found, named, and nothing of it saved."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.configs.errors import UserError
from diptych.configs.load import load_config
from diptych.pretrain import distributed
from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.replicas import compare, fingerprint, fingerprint_json
from diptych.pretrain.train import _Run, train


def flip(tensor: torch.Tensor, element: int = 0, bit: int = 3) -> None:
    raw = {4: torch.int32, 8: torch.int64}[tensor.element_size()]
    tensor.detach().flatten().view(raw)[element] ^= 1 << bit


def names(rank: int, world: int, odd: list[int], which: list[str]) -> list[str]:
    torch.manual_seed(0)
    tensors = {name: torch.randn(5, 3) for name in ("a", "b", "c")} | {"empty": torch.zeros(0)}
    if rank in odd:
        for name in which:
            flip(tensors[name], 7)
    prints = {name: fingerprint(value) for name, value in tensors.items()}
    prints["place"] = fingerprint_json({"step": 5 if rank in odd and "place" in which else 4})
    found = compare(dict(reversed(prints.items())) if rank == 1 else prints)  # as a loaded optimizer may be
    return [] if found is None else [str(found)]


UNKNOWN = "and which of them is wrong cannot be told"


@pytest.mark.parametrize(
    ("world", "odd", "which", "told"),
    [
        (2, [], ["b"], None),
        (2, [1], ["b"], f"ranks 0, 1 differ in b (1 of 5 entries differ), {UNKNOWN}"),
        (3, [1], ["b", "c"], "rank 1 differs from the rest in b (2 of 5 entries differ)"),
        (3, [0], ["c"], "rank 0 differs from the rest in c (1 of 5 entries differ)"),
    ],
)
def test_the_process_and_the_tensor_are_named(
    ranks: Any, world: int, odd: list[int], which: list[str], told: str | None
) -> None:
    for result in ranks(world, names, odd, which):
        assert result == ([] if told is None else [told])


def test_another_place_in_the_data_is_found(ranks: Any) -> None:
    monkey = ranks(2, places)
    assert all("ranks 0, 1 differ in place" in result for result in monkey)


def places(rank: int, world: int) -> str:
    return str(compare({"place": fingerprint_json({"step": 4 + rank})}))


def end_of_run(entering: Callable[[_Run], float], config: str, out: str, options: list[str]) -> str:
    """The message that a run ends with whose steps begin with ``entering``."""
    _Run._enter_step = entering
    distributed.teardown = lambda: None  # the group is the test's
    try:
        train(load_config(PretrainConfig, Path(config), [f"out={out}", *options]))
    except UserError as error:
        return str(error)
    return ""


def broken_run(rank: int, world: int, config: str, out: str, what: str, options: list[str]) -> str:
    """A run in which one bit flips before step 4 on rank 1; the message that it ends with."""
    enter = _Run._enter_step

    def entering(self: _Run) -> float:
        if rank == 1 and self.state.step == 3:
            state = self.state.kept_alike()
            flip(next(value for name, value in state.items() if name.startswith(what)))
        return enter(self)

    return end_of_run(entering, config, out, options)


@pytest.fixture(scope="module")
def squares(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ..pretrain.train_runs import make_data, write_config  # not known to the ranks

    folder = tmp_path_factory.mktemp("squares")
    return write_config(folder / "run.yaml", make_data(folder / "data"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "what", "options", "found_at"),
    [
        (2, "visual.conv1.weight", ["guard.replicas_every_steps=5"], 5),
        (3, "average of text", ["guard.replicas_every_steps=4"], 4),
        (2, "optimizer of", ["guard.replicas_every_steps=500"], 6),  # before a checkpoint
        (2, "logit_scale", ["guard.replicas_every_steps=5", "train.parallel=fsdp"], 5),
        (2, "visual.conv1.weight", ["guard.replicas_every_steps=0", "train.total_samples=96"], 0),
    ],
)
def test_a_flipped_bit_ends_the_run_and_is_not_saved(
    ranks: Any, squares: Path, tmp_path: Path, world: int, what: str, options: list[str], found_at: int
) -> None:
    out = tmp_path / "run"
    messages = ranks(world, broken_run, str(squares), str(out), what, options)
    assert len(set(messages)) == 1
    if found_at == 0:
        assert messages[0] == ""
        return
    assert f"guard.replicas_every_steps: at step {found_at} " in messages[0]
    who = "ranks 0, 1 differ" if world == 2 else "rank 1 differs from the rest"
    assert f"{who} in {what}" in messages[0]
    assert not list((out / "checkpoints").glob("step_*"))


def honest_run(rank: int, world: int, config: str, out: str, options: list[str]) -> int:
    distributed.teardown = lambda: None
    return train(load_config(PretrainConfig, Path(config), [f"out={out}", *options])).step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (3, ["model.vision_cfg={timm_model_name: test_resnet, timm_proj: linear, image_size: 32}"]),
        (3, ["optim.name=muon", "train.micro_batch_size=3", "loss.exchange=ring"]),
        (2, ["train.parallel=fsdp"]),
        (2, ["loss.kind=siglip", "model.init_logit_bias=-10"]),
    ],
)
def test_there_is_no_false_alarm(
    ranks: Any, squares: Path, tmp_path: Path, world: int, options: list[str]
) -> None:
    short = ["train.total_samples=80", "guard.replicas_every_steps=1"]
    assert set(ranks(world, honest_run, str(squares), str(tmp_path / "run"), [*short, *options])) == {5}
