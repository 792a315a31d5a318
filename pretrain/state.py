"""Everything that changes while a run trains, saved into a checkpoint folder and taken back bit for bit.

A checkpoint folder holds ``open_clip_model.safetensors`` and ``open_clip_config.json`` (open_clip loads
them as ``local-dir:``; with EMA they are the averaged weights and ``train_model.safetensors`` holds the raw
ones), ``optimizer.safetensors``, ``rng.safetensors`` (every rank's) and ``trainer.json`` (counters, stream
position, versions). Tensors are whole in it, however many processes hold them, so that a run with DDP goes
on with FSDP or in one process and the other way round.
"""

from collections.abc import Generator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor

from ..configs.errors import UserError
from ..configs.versions import versions
from ..data.stream import Stream
from . import checkpoint, distributed
from .ema import Ema
from .model import ContrastiveModel
from .towers import bundle_text, open_clip_config
from .weights import CONFIG_NAME, MODEL_NAME

__all__ = ["TrainState"]

RAW_NAME, OPTIMIZER_NAME, RNG_NAME, TRAINER_NAME = (
    "train_model.safetensors",
    "optimizer.safetensors",
    "rng.safetensors",
    "trainer.json",
)


class Saved(Protocol):
    """What brings its own part of a checkpoint, as JSON."""

    def state_dict(self) -> dict[str, Any]:
        """Its part."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        ...


@dataclass
class TrainState:
    """The parts of a run that a checkpoint holds; ``step`` counts finished optimizer steps."""

    root: ContrastiveModel
    optimizer: torch.optim.Optimizer
    stream: Stream
    ema: Ema | None
    scaler: Any | None
    device: torch.device
    step: int = 0
    samples_seen: int = 0
    guard: Saved | None = None

    @property
    def clip(self) -> CustomTextCLIP:
        """The open_clip model in training."""
        return self.root.clip

    @contextmanager
    def exported(self) -> Generator[ContrastiveModel | None]:
        """On rank 0 a model with the weights that are exported, to evaluate there alone, None elsewhere; all
        ranks enter it.

        The model in training itself, with the averaged weights in place if there are any; a full copy of it
        where the parameters are sharded.
        """
        own = self.clip.state_dict()
        if any(distributed.is_sharded(value) for value in own.values()):
            weights = _whole(own if self.ema is None else self.ema.weights())
            twin = None
            if distributed.rank() == 0:
                twin = cast(ContrastiveModel, distributed.unsharded(self.root))
                twin.clip.load_state_dict(weights, assign=True)
                twin.to(self.device)
            yield twin
        elif distributed.rank() == 0:
            with nullcontext() if self.ema is None else self.ema.applied(self.clip):
                yield self.root
        else:
            yield None

    def save(self, run: Path, *, keep: int) -> None:
        """Write the checkpoint of this step; all ranks call it, rank 0 writes, all wait until it is there.

        Raises UserError on every rank if it cannot be written.
        """
        tensors = self._tensors()
        problem = ""
        if distributed.rank() == 0:
            try:
                self._write(run, tensors, keep)
            except UserError as error:
                problem = str(error)
        if problem := distributed.broadcast_json(problem):
            raise UserError(problem)

    def _tensors(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of every file, whole, on rank 0."""
        raw = _whole(self.clip.state_dict())
        tensors = {
            MODEL_NAME: raw,
            OPTIMIZER_NAME: _whole(self._optimizer_tensors()),
            RNG_NAME: self._gather_rng(),
        }
        if self.ema is not None:
            tensors |= {MODEL_NAME: _whole(self.ema.weights()), RAW_NAME: raw}
        return tensors

    def _write(self, run: Path, tensors: dict[str, dict[str, Tensor]], keep: int) -> None:
        trainer = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "world_size": distributed.world_size(),
            "stream": self.stream.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "guard": None if self.guard is None else self.guard.state_dict(),
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
        trainer = self.go_back(folder)
        self.stream.load_state_dict(trainer["stream"])
        self.step, self.samples_seen = int(trainer["step"]), int(trainer["samples_seen"])
        if self.guard is not None and trainer.get("guard") is not None:
            self.guard.load_state_dict(trainer["guard"])
        self._load_rng(checkpoint.read_tensors(folder / RNG_NAME))

    def go_back(self, folder: Path) -> dict[str, Any]:
        """Take weights, averages, optimizer and scaler of a checkpoint, and leave all else where it is:
        steps, samples seen, the place in the data, random numbers.

        Returns its trainer.json. Raises UserError as ``load`` does.
        """
        trainer = checkpoint.read_document(folder / TRAINER_NAME)
        if (self.ema is None) != (trainer["ema"] is None):
            raise UserError(
                f"optim.ema_decay: {folder} was trained {_with(trainer['ema'])} an average; set it alike"
            )
        weights = self._own_share(checkpoint.read_tensors(folder / MODEL_NAME))
        if self.ema is not None:
            self.ema.load_state_dict(trainer["ema"], weights)
            weights = self._own_share(checkpoint.read_tensors(folder / RAW_NAME))
        self.clip.load_state_dict(weights)
        self._load_optimizer(checkpoint.read_tensors(folder / OPTIMIZER_NAME), folder)
        if self.scaler is not None and trainer["scaler"] is not None:
            self.scaler.load_state_dict(trainer["scaler"])
        return trainer

    def _own_share(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Whole weights, sharded as the model's are."""
        own = self.clip.state_dict()
        return {name: distributed.like(own[name], w) if name in own else w for name, w in weights.items()}

    def _names(self) -> list[str]:
        """Parameter names in the optimizer's order."""
        names = {id(p): name for name, p in self.clip.named_parameters()}
        return [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]

    def kept_alike(self) -> dict[str, Tensor]:
        """What all processes hold whole and bit for bit alike, by name: weights, buffers, the optimizer's
        state, averages. Not what is sharded."""
        averages = {} if self.ema is None else self.ema.weights()
        tensors = {
            **self.clip.state_dict(),
            **{f"optimizer of {name}": value for name, value in self._optimizer_tensors().items()},
            **{f"average of {name}": value for name, value in averages.items()},
        }
        return {name: value for name, value in tensors.items() if not distributed.is_sharded(value)}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        state: dict[int, dict[str, Tensor]] = self.optimizer.state_dict()["state"]
        names = self._names()
        return {f"{names[i]}/{key}": value for i, entry in state.items() for key, value in entry.items()}

    def _load_optimizer(self, tensors: dict[str, Tensor], folder: Path) -> None:
        """Moments by parameter name; rates and decays come from the config."""
        state: dict[int, dict[str, Tensor]] = {}
        names = self._names()
        found: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, kind = key.rpartition("/")
            found.setdefault(name, {})[kind] = value
        own = dict(self.clip.named_parameters())
        for i, name in enumerate(names):
            if name in found:
                state[i] = {kind: _like(own[name], value) for kind, value in found[name].items()}
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
            for rank, value in enumerate(distributed.stack(state)):
                out[f"rank_{rank:05d}/{kind}"] = value
        return out

    def _load_rng(self, states: dict[str, Tensor]) -> None:
        """This rank's own random state; on another number of ranks those that it has no state for keep the
        seed's."""
        rank = f"rank_{distributed.rank():05d}"
        if (cpu := states.get(f"{rank}/cpu")) is not None:
            torch.set_rng_state(cpu)
        if self.device.type == "cuda" and (cuda := states.get(f"{rank}/cuda")) is not None:
            torch.cuda.set_rng_state(cuda, self.device)


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of every tensor on rank 0; a sharded one comes to the CPU there, and is not kept elsewhere."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = distributed.whole(tensor)
        if distributed.rank() == 0:
            out[name] = value.cpu() if distributed.is_sharded(tensor) else value
    return out


def _like(parameter: Tensor, value: Tensor) -> Tensor:
    """An entry of the optimizer's state, sharded as its parameter is if it has its shape."""
    return distributed.like(parameter, value) if value.shape == parameter.shape else value


def _with(ema: Any) -> str:
    return "without" if ema is None else "with"
