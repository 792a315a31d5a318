"""Checkpoints whose parts are written by the processes that hold them: complete, agreed upon, readable by
any number of processes."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from diptych.configs.errors import UserError
from diptych.pretrain import checkpoint, distributed
from diptych.pretrain.checkpoint import read_document, read_tensors, verify
from diptych.pretrain.ema import Ema
from diptych.pretrain.model import ContrastiveModel, ModelConfig, build_model
from diptych.pretrain.optim import OptimConfig, build_optimizer
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.saver import Saver, require_shared
from diptych.pretrain.state import TrainState
from diptych.pretrain.units import units

VISION: dict[str, Any] = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
TEXT: dict[str, Any] = {"context_length": 8, "vocab_size": 65, "width": 32, "heads": 2, "layers": 1}


class Position:
    def state_dict(self) -> dict[str, int]:
        return {"at": 3}

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert state == {"at": 3}


def make(seed: int, *, shard: bool) -> TrainState:
    torch.manual_seed(seed)
    clip = build_model(ModelConfig(embed_dim=16, vision_cfg=VISION, text_cfg=TEXT))
    root = ContrastiveModel(clip)
    if shard:
        distributed.shard(root, units(clip))
    optimizer = build_optimizer(root, OptimConfig(lr=1e-2))
    position = cast(Any, Position())
    return TrainState(root, optimizer, position, Ema(clip, 0.9), None, torch.device("cpu"))


def train(state: TrainState) -> None:
    """Two steps on gradients that all processes know whole."""
    generator = torch.Generator().manual_seed(7)
    for _ in range(2):
        for parameter in state.clip.parameters():
            whole = torch.randn(parameter.shape, generator=generator)
            parameter.grad = cast(Any, distributed.like(parameter, whole))
        state.optimizer.step()
        assert state.ema is not None
        state.ema.update(state.clip)
        state.step += 1


def whole(state: TrainState) -> dict[str, torch.Tensor]:
    """Everything in training, gathered."""
    assert state.ema is not None
    parts = {"weights": state.clip.state_dict(), "ema": state.ema.weights()}
    parts["optimizer"] = state._optimizer_tensors()
    return {
        f"{kind}/{name}": distributed.whole(value).clone()
        for kind, named in parts.items()
        for name, value in named.items()
    }


def save(rank: int, world: int, run: str, shard: bool) -> dict[str, Any]:
    state = make(0, shard=shard)
    saver = Saver(Path(run), state, CheckpointConfig())
    train(state)
    saver.save()
    saver.wait()
    assert saver.saved_step == 2
    return whole(state)


def load(rank: int, world: int, folder: str, shard: bool) -> dict[str, Any]:
    state = make(9, shard=shard)
    state.load(Path(folder))
    assert state.step == 2
    return whole(state)


@pytest.mark.parametrize(
    ("first", "others"),
    [(3, [(2, True), (2, False)]), pytest.param(2, [(5, True)], marks=pytest.mark.slow)],
)
def test_parts_are_read_by_any_number_of_processes(
    ranks: Any, tmp_path: Path, first: int, others: list[tuple[int, bool]]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    truth = ranks(first, save, str(run), True)[0]
    folder = run / "checkpoints" / "step_00000002"
    assert verify(folder) is None
    names = {p.name for p in folder.iterdir()}
    parts = {f"part_{rank:05d}.safetensors" for rank in range(first)}
    assert parts | {"layout.json", "open_clip_model.safetensors", "rng.safetensors", "trainer.json"} <= names
    assert "optimizer.safetensors" not in names
    # every element is in one part, no part has all of a sharded tensor, and the model has the averages whole
    held = [read_tensors(folder / name) for name in sorted(parts)]
    layout = read_document(folder / "layout.json")["tensors"]
    assert layout.keys() == truth.keys()
    for name, value in truth.items():
        assert sum(part[name].numel() for part in held if name in part) == value.numel(), name
        assert layout[name]["shape"] == list(value.shape)
    assert not any("optimizer/text.token_embedding.weight/exp_avg" not in part for part in held)
    model = read_tensors(folder / "open_clip_model.safetensors")
    assert {f"ema/{name}" for name in model} == {name for name in truth if name.startswith("ema/")}
    assert all(value.equal(truth[f"ema/{name}"]) for name, value in model.items())
    alone = make(9, shard=False)
    alone.load(folder)
    for got in [
        whole(alone),
        *(r for world, shard in others for r in ranks(world, load, str(folder), shard)),
    ]:
        assert got.keys() == truth.keys()
        assert [name for name, value in got.items() if not value.equal(truth[name])] == []


def test_whole_files_are_read_by_processes_that_hold_parts(ranks: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    truth = save(0, 1, str(run), False)
    for got in ranks(3, load, str(run / "checkpoints" / "step_00000002"), True):
        assert [name for name, value in truth.items() if not value.equal(got[name])] == []


def fail_on_one(rank: int, world: int, run: str) -> dict[str, Any]:
    """The last rank cannot write twice; the flags go through the sum of a step, as in the loop."""
    state = make(0, shard=True)
    saver = Saver(Path(run), state, CheckpointConfig(max_failed_saves=3))
    write, failures = checkpoint.write_files, [0]

    def broken(*arguments: Any) -> Any:
        if rank == world - 1 and failures[0] < 2:
            failures[0] += 1
            raise OSError(28, "No space left on device")
        return write(*arguments)

    checkpoint.write_files = broken
    rows: list[dict[str, Any]] = []
    saver.tell = rows.append
    train(state)
    for _ in range(3):
        saver.save()
        for _ in range(100000):  # steps
            saver.heed(*distributed.all_reduce_sum(torch.tensor(saver.flags())).tolist())
            if saver._now is None:
                break
    told = [row.get("failed_saves", -1) for row in rows]
    texts = [row["warning"] for row in rows if "warning" in row]
    return {"told": told, "saved": saver.saved_step, "texts": texts}


def test_a_part_that_cannot_be_written_fails_the_save_on_all(ranks: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    for result in ranks(2, fail_on_one, str(run)):
        assert result["told"] == [1, 2, -1]
        assert result["saved"] == 2
        assert all("No space left on device" in text for text in result["texts"])
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_00000002"]
    assert verify(run / "checkpoints" / "step_00000002") is None


def not_shared(rank: int, world: int, runs: list[str]) -> str:
    try:
        require_shared(Path(runs[rank]))
    except UserError as error:
        return str(error)
    return ""


def test_a_folder_that_is_not_shared_is_refused_on_all(ranks: Any, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    for told in ranks(2, not_shared, folders):
        assert told.startswith("out: rank 1 does not see what rank 0 writes into")
    assert ranks(2, not_shared, folders[:1] * 2) == ["", ""]
    assert not list((tmp_path / "a").iterdir())


@pytest.mark.parametrize("file", ["part_00001.safetensors", "layout.json"])
def test_a_damaged_part_is_named(file: str, ranks: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    ranks(2, save, str(run), True)
    folder = run / "checkpoints" / "step_00000002"
    data = bytearray((folder / file).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / file).write_bytes(data)
    assert f"{folder / file} is damaged" in str(verify(folder))
    (folder / file).unlink()
    assert f"{folder / file} is missing" in str(verify(folder))
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    with pytest.raises(UserError):
        make(1, shard=False).load(copy)
    assert json.loads((copy / "manifest.json").read_text())["world_size"] == 2
