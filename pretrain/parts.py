"""The parts of a pretraining run, built in the order in which they need one another; train.py has the loop.

Every process builds the same model, opens its share of the stream and the run folder, and stands where the
run stopped.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch

from ..configs.errors import UserError
from ..configs.files import atomic_write_bytes
from ..configs.load import to_yaml
from ..data.shards import open_shards
from ..data.stream import open_stream
from ..data.text import tokenizer_for
from . import distributed
from .checkpoint import remove_leftovers
from .compiled import compile_blocks
from .config import PretrainConfig
from .ema import Ema
from .ending import goes_on
from .engine import build_accelerator, keep_freed_memory, on_rank_0, prepare, set_threads, together
from .fit import check_fit, check_length
from .flops import Costs
from .guard import Guard
from .leftovers import note_workers, remove_shared_memory
from .locking import lock
from .model import ContrastiveModel, build_model, image_size, open_clip_config
from .optim import build_optimizer
from .prefetch import PixelCopier
from .quarantine import Quarantine
from .resume import start_from
from .run import NONE, compare, config_hash, run_path, write_config
from .saver import Saver, require_shared
from .state import TrainState
from .tracking import GROUP_BYTES, GROUP_NAME, Tracker, cut_metrics, read_metrics
from .watch import Watch

__all__ = ["RunParts", "Show"]


class Show(Protocol):
    """Who tells the user how a run goes; called on rank 0 alone."""

    def start(self, facts: dict[str, Any]) -> None:
        """Once, before the first step: what the run is."""
        ...

    def row(self, row: dict[str, Any]) -> None:
        """Every row that is logged."""
        ...


class RunParts:
    """One process's share of a run: model, data, engine and folder. Raises UserError for what the user can
    mend, on every rank alike."""

    show: Show | None = None

    def __init__(self, config: PretrainConfig, device: torch.device, watch: Watch) -> None:
        self.config, self.device, self.watch = config, device, watch
        self.rank, self.world_size = distributed.rank(), distributed.world_size()
        self.batch_size = config.train.global_batch_size
        set_threads(config.train.threads)
        keep_freed_memory()
        with together():
            self._build_model()
            self._open_data()
        self._check_data()
        self._build_engine()
        self._open_folder()
        self.watch.follow(lambda: self.state.step, self.stream)

    def _build_model(self) -> None:
        """The same weights on every rank, then random numbers of each rank's own."""
        config = self.config
        torch.manual_seed(config.seed)
        self.clip = build_model(config.model)
        torch.manual_seed(config.seed + 1 + self.rank)
        text_cfg = open_clip_config(self.clip)["model_cfg"]["text_cfg"]
        self.tokenizer = tokenizer_for(text_cfg, getattr(self.clip, "text_folder", None))
        check_fit(config, self.clip)
        lock(self.clip, config.lock)
        self.clip.set_grad_checkpointing(config.train.grad_checkpointing)
        self.root = ContrastiveModel(self.clip, pad_id=self.tokenizer.pad_id, seed=config.seed)
        self.root.to(self.device)
        self.patch_dropout = self.root.patch_dropout
        self.image_size = image_size(self.clip)

    def _open_data(self) -> None:
        config = self.config
        self.stream = open_stream(
            config.data,
            seed=config.seed,
            global_batch_size=self.batch_size,
            image_size=self.image_size,
            tokenizer=self.tokenizer,
            stages=config.stages,
            rank=self.rank,
            world_size=self.world_size,
            pin_memory=self.device.type == "cuda",
        )
        self.total_steps = self._total_steps()
        self.total_samples = self.total_steps * self.batch_size
        check_length(config, self.total_samples)
        self.micro_batches = config.train.micro_batches(self.world_size)

    def _check_data(self) -> None:
        """All ranks must have opened the same: on another node a path or a list of keys may be another."""
        states = distributed.gather_json(self.stream.state_dict())
        if odd := [rank for rank, state in enumerate(states) if state != states[0]]:
            raise UserError(
                f"data.train: rank {odd[0]} has other data than rank 0 ({len(odd)} of {len(states)} ranks "
                "differ from it); give all nodes the same shards and lists of keys"
            )

    def _build_engine(self) -> None:
        config = self.config
        self.accelerator = build_accelerator(config.train.precision, self.device)
        self.costs = Costs(self.root)
        if config.train.compile:
            compile_blocks(self.root)
        self.to_device = PixelCopier(self.device)
        self.model = prepare(self.root, self.accelerator, config.train.parallel, self.tokenizer)
        optimizer = build_optimizer(self.root, config.optim)
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        ema = Ema(self.clip, config.optim.ema_decay) if config.optim.ema_decay else None
        scaler = self.accelerator.scaler
        self.state = TrainState(self.root, optimizer, self.stream, ema, scaler, self.device)
        guard = Guard(
            config.guard,
            self.state,
            run_path(config),
            peak_lr=config.optim.lr,
            tell=lambda row: self.log("guard", row),
        )
        self.guard = self.state.guard = guard

    def _open_folder(self) -> None:
        """The held-out shards, and the run folder where the run stopped or at its start."""
        config = self.config
        held_out = config.evaluate.data
        self.held_out = on_rank_0(lambda: open_shards(held_out, **config.data.storage)) if held_out else None
        self.folder = run_path(config)
        self.quarantine = Quarantine(
            self.folder / "quarantine.jsonl",
            lambda seen: config.data.bad_allowed(seen, self.stream.num_samples),
        )
        newest = on_rank_0(lambda: str(start_from(config.resume, self.folder) or ""))
        name = distributed.broadcast_json(newest)
        if self.world_size > 1:
            require_shared(self.folder)
        changes = on_rank_0(lambda: compare(config, self._stored(name), force=config.resume.force))
        self.changes = changes or NONE
        if name:
            with together():
                forced = self.state.load(Path(name), **config.resume.model_dump(exclude={"start"}))
            self.changes = replace(self.changes, forced=forced | self.changes.forced)
            left = max(0, self.total_samples - self.state.samples_seen)
            self.total_steps = self.state.step - (-left // self.batch_size)
        on_rank_0(lambda: write_config(config, self.folder, self.changes, self.state.step))
        with together():  # before any rank of this machine notes its own
            if distributed.local_rank() == 0:
                remove_shared_memory(self.folder)
        self.stream.on_workers = partial(note_workers, self.folder, self.rank)
        if self.rank == 0:
            remove_leftovers(self.folder)
            if self.state.step < self.total_steps:
                goes_on(self.folder)
        facts = {"config_sha256": config_hash(config)}
        texts = {"config.yaml": to_yaml(config)}
        self.saver = Saver(self.folder, self.state, config.checkpoint, facts, texts)
        if self.rank == 0:  # after all that may still refuse the folder
            cut_metrics(self.folder / "metrics.jsonl", self.state.step)
        self.quarantine.resume(self.state.step)
        self.guard.resume(self.state.step, name, partial=config.resume.allow_partial)
        self.guard.wait_for_saves = self.saver.wait
        self.tracker = on_rank_0(lambda: self._open_tracker(name))
        if self.tracker is not None and self.tracker.group:
            self.saver.texts[GROUP_NAME] = self.tracker.group + "\n"

    def _open_tracker(self, checkpoint: str) -> Tracker:
        """W&B's group is the run's; where its file is lost the checkpoint has it."""
        saved, own = Path(checkpoint, GROUP_NAME), self.folder / GROUP_NAME
        if self.folder in saved.parents and saved.is_file() and not own.exists():
            with saved.open("rb") as file:
                atomic_write_bytes(own, file.read(GROUP_BYTES))
        shown = self.config.model_dump(mode="json")
        goes_on = self.folder in Path(checkpoint).parents
        return Tracker(self.folder, self.config.tracking, shown, strict=not goes_on)

    def _stored(self, checkpoint: str) -> list[Path]:
        """Configs that the run may go on with: the folder's own, if something was trained with it, and the
        checkpoint's or, of an earlier version, its run's. Raises UserError, unless forced, where there is
        none: a difference would not be seen."""
        own, saved = self.folder / "config.yaml", Path(checkpoint, "config.yaml")
        if not saved.is_file() and saved.parent.parent.name == "checkpoints":
            saved = Path(checkpoint).parent.parent / "config.yaml"
        trained = bool(read_metrics(self.folder / "metrics.jsonl"))
        goes_on = self.folder in saved.parents
        counts = {own: trained, saved: bool(checkpoint) and (goes_on or not (trained and own.is_file()))}
        found = [file for file in counts if counts[file] and file.is_file()]
        if checkpoint and not found and not self.config.resume.force:
            raise UserError(
                f"resume.start: {checkpoint} has no config.yaml, so that settings cannot be compared; put "
                "that of its run there, or set resume.force=true"
            )
        return found

    def log(self, kind: str, row: dict[str, Any]) -> None:
        """Add a row to the metrics, and show it; on rank 0."""
        if self.tracker is None:
            return
        state = self.state
        full = {"kind": kind, "step": state.step, "samples_seen": state.samples_seen, **row}
        if kind == "train":
            full["bad_samples"] = self.quarantine.count
        self.tracker.log(full)
        if self.show is not None:
            self.show.row(full)

    def _total_steps(self) -> int:
        train = self.config.train
        if train.total_samples is not None:
            return -(-train.total_samples // self.batch_size)
        assert train.epochs is not None
        return max(1, round(train.epochs * self.stream.steps_per_epoch))

    def close(self) -> None:
        """Stop workers and close files."""
        self.saver.close()
        self.guard.close()
        self.stream.close()
        note_workers(self.folder, self.rank, [])
        if self.tracker is not None:
            self.tracker.finish()
