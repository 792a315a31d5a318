"""A training that is killed goes on from its last epoch, bit for bit, and from nobody else's."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.finetune.adapt.fit import Fitted, fit
from diptych.finetune.adapt.training import Keeper, Tensors
from diptych.finetune.config import AdaptConfig, HeadConfig, StoppingConfig
from diptych.finetune.runs.piece import Piece
from diptych.pretrain.checkpoint import newest_checkpoint
from diptych.pretrain.model import load_model

from .corners import PROMPTS, TASK, checkpoint, train
from .labelled import xor_rows

Log = list[dict[str, Any]]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"method": "full"},
    "lora": {"method": "lora", "lora_rank": 2, "wise_ft": 0.5, "encoder_lr": 1e-2},
    "contrastive": {"method": "contrastive", "class_prompts": PROMPTS},
    "tokens": {},
}


class Killed(Piece):
    """Dies once its second epoch is kept; the work of a third, begun or not, would be lost."""

    def save_epoch(self, tensors: Tensors, facts: dict[str, Any]) -> None:
        super().save_epoch(tensors, facts)
        if facts["done"] == 2:
            raise KeyboardInterrupt


def trained(name: str, folder: Path, keeper: Keeper | None) -> tuple[Fitted, Log]:
    if name != "tokens":
        model = load_model(checkpoint(folder / "checkpoint"))
        return train(model, op="concat", epochs=2, encoder_epochs=4, keeper=keeper, **METHODS[name])
    log: Log = []
    fitted = fit(
        HeadConfig(op="merged", width=16, dropout=0.3), AdaptConfig(epochs=4, batch_size=32),
        StoppingConfig(), TASK, xor_rows(200, 1), xor_rows(80, 2), widths={"image": 16, "text": 16},
        token_widths={"image": 16, "text": 16}, seed=3, log=log.append, keeper=keeper,
    )  # fmt: skip
    return fitted, log


def state(fitted: Fitted) -> dict[str, torch.Tensor]:
    clip = {} if fitted.model is None else fitted.model.clip.state_dict()
    return dict(fitted.head.state_dict()) | {f"clip.{k}": v for k, v in clip.items()}


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_goes_on_bit_for_bit(name: str, tmp_path: Path) -> None:
    truth, log = trained(name, tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        trained(name, tmp_path, Killed(tmp_path / "piece", "key"))
    epochs: list[int] = []

    class Counted(Piece):
        def save_epoch(self, tensors: Tensors, facts: dict[str, Any]) -> None:
            epochs.append(facts["done"])
            super().save_epoch(tensors, facts)

    torch.rand(11)  # the caller's random numbers are not the training's
    again, same_log = trained(name, tmp_path, Counted(tmp_path / "piece", "key"))
    assert epochs == [3, 4]
    assert same_log == log
    assert (again.best_epoch, again.facts, again.scale) == (truth.best_epoch, truth.facts, truth.scale)
    expected = state(truth)
    for what, value in state(again).items():
        assert value.equal(expected[what]), what


def test_another_trainings_epochs_and_damaged_ones_are_not_taken(tmp_path: Path) -> None:
    truth, _ = trained("tokens", tmp_path, None)
    with pytest.raises(KeyboardInterrupt):
        trained("tokens", tmp_path, Killed(tmp_path / "piece", "key"))
    assert Piece(tmp_path / "piece", "key").load_epoch() is not None
    other = Piece(tmp_path / "piece", "other settings")
    assert other.load_epoch() is None
    assert not other.finished
    newest = newest_checkpoint(tmp_path / "piece")
    assert newest is not None
    file = newest / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    again, _ = trained("tokens", tmp_path, Piece(tmp_path / "piece", "key"))
    assert all(value.equal(state(truth)[what]) for what, value in state(again).items())
    piece = Piece(tmp_path / "piece", "key")
    rows = [{"loss": 0.1, "epoch": 1}]
    piece.save_result(again, rows, 1.5)
    assert piece.finished
    assert piece.load_epoch() is None
    kept = piece.load_result()
    assert kept is not None
    assert (kept[1]["rows"], kept[1]["seconds"]) == (rows, 1.5)
    assert all(kept[0][f"head/{what}"].equal(value) for what, value in state(again).items())
    assert len(list((tmp_path / "piece" / "checkpoints").iterdir())) == 1
