"""Everything that changes while a run trains, saved into a checkpoint folder and taken back bit for bit.

A checkpoint folder holds ``open_clip_model.safetensors`` and ``open_clip_config.json`` (open_clip loads
them as ``local-dir:``; with EMA they are the averaged weights and ``train_model.safetensors`` holds the raw
ones), ``optimizer.safetensors``, ``rng.safetensors`` (every rank's) and ``trainer.json`` (counters, stream
position, versions).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor

from ..configs.errors import UserError
from ..configs.versions import versions
from ..data.stream import Stream
from . import checkpoint, distributed
from .ema import Ema
from .towers import bundle_text, open_clip_config
from .weights import CONFIG_NAME, MODEL_NAME

__all__ = ["TrainState"]

RAW_NAME, OPTIMIZER_NAME, RNG_NAME, TRAINER_NAME = (
    "train_model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "trainer.json",
)


@dataclass
class TrainState:
    """The parts of a run that a checkpoint holds; ``step`` counts finished optimizer steps."""

    clip: CustomTextCLIP
    optimizer: torch.optim.Optimizer
    stream: Stream
    ema: Ema | None
    scaler: Any | None
    device: torch.device
    step: int = 0
    samples_seen: int = 0

    def save(self, run: Path, *, keep: int) -> None:
        """Write the checkpoint of this step; all ranks call it, rank 0 writes, all wait until it is there.

        Raises UserError on every rank if it cannot be written.
        """
        rng = self._gather_rng()
        problem = ""
        if distributed.rank() == 0:
            try:
                self._write(run, rng, keep)
            except UserError as error:
                problem = str(error)
        if problem := distributed.broadcast_json(problem, device=self.device):
            raise UserError(problem)

    def _write(self, run: Path, rng: dict[str, Tensor], keep: int) -> None:
        raw = dict(self.clip.state_dict())
        tensors = {MODEL_NAME: raw, OPTIMIZER_NAME: self._optimizer_tensors(), RNG_NAME: rng}
        if self.ema is not None:
            tensors |= {MODEL_NAME: self.ema.weights(), RAW_NAME: raw}
        trainer = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "world_size": distributed.world_size(),
            "stream": self.stream.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "versions": versions(),
        }
        checkpoint.save(
            run,
            self.step,
            tensors=tensors,
            documents={CONFIG_NAME: open_clip_config(self.clip), TRAINER_NAME: trainer},
            write_more=lambda folder: bundle_text(self.clip, folder),
            keep=keep,
        )

    def load(self, folder: Path) -> None:
        """Take back what ``save`` wrote. Raises UserError if the checkpoint is of another model, optimizer or
        data set."""
        trainer = checkpoint.read_document(folder / TRAINER_NAME)
        if (self.ema is None) != (trainer["ema"] is None):
            raise UserError(
                f"optim.ema_decay: {folder} was trained {_with(trainer['ema'])} an average; set it alike"
            )
        weights = checkpoint.read_tensors(folder / MODEL_NAME)
        if self.ema is not None:
            self.ema.load_state_dict(trainer["ema"], weights)
            weights = checkpoint.read_tensors(folder / RAW_NAME)
        self.clip.load_state_dict(weights)
        self._load_optimizer(checkpoint.read_tensors(folder / OPTIMIZER_NAME), folder)
        if self.scaler is not None and trainer["scaler"] is not None:
            self.scaler.load_state_dict(trainer["scaler"])
        self.stream.load_state_dict(trainer["stream"])
        self.step, self.samples_seen = int(trainer["step"]), int(trainer["samples_seen"])
        self._load_rng(checkpoint.read_tensors(folder / RNG_NAME))

    def _names(self) -> list[str]:
        """Parameter names in the optimizer's order."""
        names = {id(p): name for name, p in self.clip.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        state: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        names = self._names()
        return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}

    def _load_optimizer(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Moments by parameter name; rates and decays come from the config."""
        state: dict[int, dict[str, Tensor]] = {}
        names = self._names()
        for i, name in enumerate(names):
            found = {k.rpartition("/")[2]: v for k, v in tensors.items() if k.rpartition("/")[0] == name}
            if found:
                state[i] = found
        if sum(map(len, state.values())) != len(tensors) or (tensors and len(state) != len(names)):
            raise UserError(
                f"{folder}: its optimizer belongs to another model; give this run another out folder"
            )
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )

    def _gather_rng(self) -> dict[str, Tensor]:
        """Random states of all ranks, uint8, on rank 0 and everywhere."""
        out: dict[str, Tensor] = {}
        own = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            own["cuda"] = torch.cuda.get_rng_state(self.device)
        for kind, state in own.items():
            for rank, value in enumerate(distributed.stack(state.to(self.device))):
                out[f"rank_{rank:05d}/{kind}"] = value.cpu()
        return out

    def _load_rng(self, states: dict[str, Tensor]) -> None:
        """This rank's own random state; on another number of ranks those that it has no state for keep the
        seed's."""
        rank = f"rank_{distributed.rank():05d}"
        if (cpu := states.get(f"{rank}/cpu")) is not None:
            torch.set_rng_state(cpu)
        if self.device.type == "cuda" and (cuda := states.get(f"{rank}/cuda")) is not None:
            torch.cuda.set_rng_state(cuda, self.device)


def _with(ema: Any) -> str:
    return "without" if ema is None else "with"
