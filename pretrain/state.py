"""Everything that changes while a run trains, saved into a checkpoint folder and taken back bit for bit.

A checkpoint folder holds ``open_clip_model.safetensors`` and ``open_clip_config.json`` (open_clip loads
them as ``local-dir:``; with EMA they are the averaged weights and ``train_model.safetensors`` holds the raw
ones), ``optimizer.safetensors``, ``rng.safetensors`` (every rank's) and ``trainer.json`` (counters, stream
position, versions). Where parameters are sharded, ``part_NNNNN.safetensors`` of each process stand for the
raw weights and the optimizer (``sharded.py``). A run with DDP goes on with FSDP, on another number of
processes or in one, and the other way round.
"""

import logging
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor

from ..configs.documents import as_written
from ..configs.errors import UserError
from ..configs.versions import versions
from ..data.stream import Stream
from . import checkpoint, distributed
from .checkpoint import OPTIMIZER_NAME, RNG_NAME
from .ema import Ema
from .model import ContrastiveModel
from .sharded import (
    LAYOUT_NAME,
    SavedTensors,
    file_names,
    layout,
    model_specs,
    own_part,
    part_name,
    write_model,
)
from .snapshot import Snapshot, Stager
from .tensor_file import MEND
from .towers import bundle_text, open_clip_config
from .weights import CONFIG_NAME

__all__ = ["Saved", "TrainState"]

log = logging.getLogger(__name__)
TRAINER_NAME = "trainer.json"
ADAMW, MUON = {"step", "exp_avg", "exp_avg_sq"}, {"momentum_buffer"}
"""What an optimizer keeps for a parameter."""


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

    @property
    def sharded(self) -> bool:
        """Whether each process holds its part of the parameters alone."""
        return any(distributed.is_sharded(value) for value in self.clip.parameters())

    @contextmanager
    def exported(self) -> Generator[ContrastiveModel | None]:
        """On rank 0 a model with the weights that are exported, to evaluate there alone, None elsewhere; all
        ranks enter it.

        The model in training itself, with the averaged weights in place if there are any; a full copy of it
        where the parameters are sharded.
        """
        if self.sharded:
            own = self.clip.state_dict()
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

    def snapshot(self, stager: Stager, texts: Mapping[str, str] | None = None) -> Snapshot:
        """This moment, to be written; all ranks call it. Sharded tensors are not gathered: every rank has its
        part to write. Else rank 0 has everything. ``texts``: further documents, by file's name."""
        states = self._gather_rng()
        kinds: dict[str, Mapping[str, Tensor]] = {"weights": self.clip.state_dict()}
        kinds["optimizer"] = self._optimizer_tensors()
        if self.ema is not None:
            kinds["ema"] = self.ema.weights()
        first, averaged = distributed.rank() == 0, self.ema is not None
        tensors: dict[str, Mapping[str, Tensor]] = {}
        combine = None
        if self.sharded:
            tensors[part_name(distributed.rank())] = own_part(kinds)
            combine = partial(write_model, what=model_specs(kinds), averaged=averaged) if first else None
        elif first:
            tensors |= {name: kinds[kind] for kind, name in file_names(averaged).items()}
        staged = {
            file: {name: stager.take(f"{file}/{name}", value) for name, value in named.items()}
            for file, named in tensors.items()
        }
        return Snapshot(
            step=self.step,
            samples_seen=self.samples_seen,
            tensors=staged | ({RNG_NAME: states} if first else {}),
            texts=self._texts(layout(kinds) if self.sharded else None) | dict(texts or {}) if first else {},
            write_more=partial(bundle_text, self.clip),
            combine=combine,
            settled=stager.settled(),
        )

    def _texts(self, layout: dict[str, Any] | None) -> dict[str, str]:
        """The documents of a checkpoint."""
        trainer = {
            "step": self.step,
            "samples_seen": self.samples_seen,
            "world_size": distributed.world_size(),
            "stream": self.stream.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "versions": versions(),
            "guard": None if self.guard is None else self.guard.state_dict(),
        }
        documents = {CONFIG_NAME: open_clip_config(self.clip), TRAINER_NAME: trainer}
        documents |= {} if layout is None else {LAYOUT_NAME: layout}
        return {name: checkpoint.as_text(document) for name, document in documents.items()}

    def load(
        self, folder: Path, *, allow_partial: bool = False, force: bool = False
    ) -> dict[str, tuple[Any, Any]]:
        """Take back what a checkpoint holds, in any number of processes; nothing is communicated. Returns
        what of the data was forced upon it: a key, the old and the new fingerprint.

        Raises UserError if it is of another model, optimizer or data set, or if a part is missing, which is
        named; with ``allow_partial`` that part stays as it is, with a warning. With ``force`` another data
        set or order goes on with the next epoch, with a warning.
        """
        trainer = self.go_back(folder, allow_partial=allow_partial)
        forced: dict[str, tuple[Any, Any]] = {}
        with as_written(folder / TRAINER_NAME, MEND):
            if "stream" in trainer:
                forced = self._load_stream(trainer["stream"], force=force)
            if self.guard is not None and trainer.get("guard") is not None:
                self.guard.load_state_dict(trainer["guard"])
            self.step, self.samples_seen = int(trainer["step"]), int(trainer["samples_seen"])
        if (folder / RNG_NAME).is_file():
            self._load_rng(folder / RNG_NAME)
        return forced

    def _load_stream(self, state: dict[str, Any], *, force: bool) -> dict[str, tuple[Any, Any]]:
        try:
            self.stream.load_state_dict(state)
            return {}
        except UserError as error:
            if not force:
                raise
            was, now = state.get("fingerprint"), self.stream.state_dict()["fingerprint"]
            self.stream.skip_to_next_epoch(state)
            if distributed.rank() == 0:
                log.warning("%s; resume.force: the data goes on with epoch %d", error, self.stream.place[0])
            return {"data.train": (was, now)} if was != now else {}

    def go_back(self, folder: Path, *, allow_partial: bool = False) -> dict[str, Any]:
        """Take weights, averages, optimizer and scaler of a checkpoint, and leave all else where it is:
        steps, samples seen, the place in the data, random numbers.

        Returns its trainer.json. Raises UserError as ``load`` does.
        """
        trainer = checkpoint.read_document(folder / TRAINER_NAME)
        averaged = trainer.get("ema") is not None
        if (self.ema is not None) != averaged:
            raise UserError(
                f"optim.ema_decay: {folder} was trained {_with(averaged)} an average; set it alike"
            )
        saved = SavedTensors(folder, averaged=averaged)
        self._refuse_partial(folder, self._missing(trainer, saved, folder), allow_partial)
        own = self.clip.state_dict()
        if self.ema is not None:
            averages = saved.all_like("ema", own)
            with as_written(folder / TRAINER_NAME, MEND):
                self.ema.load_state_dict(trainer["ema"], averages)
        self.clip.load_state_dict(saved.all_like("weights", own))
        if "optimizer" in saved.names:
            self._load_optimizer(saved)
        else:  # it begins anew
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": {}, "param_groups": groups})
        if self.scaler is not None and trainer.get("scaler") is not None:
            with as_written(folder / TRAINER_NAME, MEND):
                self.scaler.load_state_dict(trainer["scaler"])
        return trainer

    def _missing(self, trainer: Mapping[str, Any], saved: SavedTensors, folder: Path) -> Iterator[str]:
        """Names of the parts that this run has and the checkpoint has not."""
        if "optimizer" not in saved.names:
            yield f"optimizer ({OPTIMIZER_NAME})"
        if not (folder / RNG_NAME).is_file():
            yield f"random states ({RNG_NAME})"
        own = {"stream": self.stream, "scaler": self.scaler, "guard": self.guard}
        for name, part in own.items():
            if part is not None and trainer.get(name) is None:
                yield f"{name} ({TRAINER_NAME})"

    def _refuse_partial(self, folder: Path, parts: Iterable[str], allowed: bool) -> None:
        if not (missing := ", ".join(parts)):
            return
        if not allowed:
            raise UserError(
                f"resume.allow_partial: {folder} lacks {missing}; set it to true to go on without, or remove "
                "the folder to use an older one"
            )
        if distributed.rank() == 0:
            log.warning("%s lacks %s, which begins anew", folder, missing)

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

    def _load_optimizer(self, saved: SavedTensors) -> None:
        """Moments by parameter name; rates and decays come from the config."""
        state: dict[int, dict[str, Tensor]] = {}
        names = self._names()
        found: dict[str, list[str]] = {}
        for key in saved.names["optimizer"]:
            name, _, entry = key.rpartition("/")
            found.setdefault(name, []).append(entry)
        if odd := sorted(found.keys() ^ set(names)) if found else []:
            raise self._odd_optimizer(saved, odd[0])
        own = dict(self.clip.named_parameters())
        kept = [MUON if "stacked" in g else ADAMW for g in self.optimizer.param_groups for _ in g["params"]]
        for i, name in enumerate(names):
            if name in found:
                if set(found[name]) != kept[i]:
                    raise self._odd_optimizer(saved, name)
                for entry in found[name]:  # the fused kernel trusts shapes
                    shape = () if entry == "step" else tuple(own[name].shape)
                    if saved.shape("optimizer", f"{name}/{entry}") != shape:
                        raise self._odd_optimizer(saved, f"{name}/{entry}")
                state[i] = {e: saved.like("optimizer", f"{name}/{e}", own[name]) for e in found[name]}
                if not all(value.is_floating_point() for value in state[i].values()):
                    raise self._odd_optimizer(saved, name)
        self.optimizer.load_state_dict(
            {"state": state, "param_groups": self.optimizer.state_dict()["param_groups"]}
        )

    def _odd_optimizer(self, saved: SavedTensors, what: str) -> UserError:
        return UserError(
            f"{saved.folder}: its optimizer belongs to another model or method ({what}); give this run "
            "another out folder"
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

    def _load_rng(self, file: Path) -> None:
        """This rank's own random state; on another number of ranks those that it has no state for keep the
        seed's."""
        states, rank = checkpoint.read_tensors(file), f"rank_{distributed.rank():05d}"
        try:
            if (cpu := states.get(f"{rank}/cpu")) is not None:
                torch.set_rng_state(cpu)
            if self.device.type == "cuda" and (cuda := states.get(f"{rank}/cuda")) is not None:
                torch.cuda.set_rng_state(cuda, self.device)
        except (RuntimeError, TypeError) as error:
            raise UserError(f"{file} holds no random state ({error}); {MEND}") from error


def _whole(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of every tensor on rank 0; a sharded one comes to the CPU there, and is not kept elsewhere."""
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        value = distributed.whole(tensor)
        if distributed.rank() == 0:
            out[name] = value.cpu() if distributed.is_sharded(tensor) else value
    return out


def _with(averaged: bool) -> str:
    return "with" if averaged else "without"
