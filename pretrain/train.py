"""The training loop of a contrastive run, read from top to bottom.

Every process builds the same model, takes its rows of each global batch from the stream and joins the loss
over the global batch. One small all-reduce a step carries what all must know: damaged samples, a request to
stop, a failure, the end of a save.
"""

import time
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..configs.errors import UserError
from . import distributed
from .agree import on_rank_0, others_watched
from .clock import Clock
from .config import PretrainConfig
from .contrastive import contrastive_loss
from .encode import quick_retrieval
from .ending import begun, mark_end, stopped_early
from .engine import no_sync
from .fit import notes
from .gradcache import forward_backward
from .memory import memory_told
from .model import clamp_logit_scale
from .optim import clip_gradients, set_lr
from .owner import RunLock
from .parts import RunParts, Show
from .run import run_path
from .schedule import lr_at
from .stages import patch_dropout_at
from .stop import LOOK_S, Stopped, StopRequest, stop_on_signals
from .watch import Watch, record_flights

__all__ = ["Outcome", "Show", "train"]

Batch = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a call of ``train`` ended; ``reason`` is the signal or the launcher's end that ended it before its
    last step, else "".

    ``total_steps`` is 0 if it came before the run knew them; ``step`` then is what had been saved before.
    """

    folder: Path
    step: int
    total_steps: int
    reason: str = ""

    @property
    def stopped(self) -> bool:
        """Whether a signal ended it before its last step."""
        return bool(self.reason)


def train(config: PretrainConfig, show: Show | None = None) -> Outcome:
    """Train until the end of the config, or go on with the run that its folder holds.

    The same on every rank. Raises UserError for what the user can mend, on every rank alike.
    """
    lock = RunLock(run_path(config))
    record_flights(lock.folder)
    watch = Watch(config.watch, lock.folder)
    early = partial(stopped_early, lock)
    with others_watched(), memory_told(config), watch, stop_on_signals(early) as stop:
        try:
            device = distributed.setup(config.train.device, timeout_s=config.watch.startup_timeout_s)
            on_rank_0(lambda: begun(lock.take().folder))
            run = _Run(config, device, watch)
            run.show, run.lock = show if run.rank == 0 else None, lock
            run.saver.is_taken = lock.is_another
            try:
                return run.go(stop)
            finally:
                run.close()
        except (Stopped, RuntimeError):  # the latter where another rank was told, and has left
            with suppress(Stopped):  # a signal of its own may follow
                stop.closed()
            if not (stop.starting and stop.heard()):
                raise
            stop.saved = True
            stop.tell()
            if distributed.rank() == 0:  # in whose process the store may be
                time.sleep(2 * LOOK_S)
            return Outcome(lock.folder, stopped_early(lock, stop.reason), 0, stop.reason)
        finally:
            lock.release()
            distributed.teardown()


class _Run(RunParts):
    """The loop over one process's share of a run."""

    lock: RunLock

    def go(self, stop: StopRequest) -> Outcome:
        """The loop."""
        config, state = self.config, self.state
        if self.show is not None:
            self.show.start(self._facts())
        self.saver.tell = partial(self.log, "checkpoint")
        precision = config.train.precision
        clock = Clock(state.samples_seen, device=self.device, costs=self.costs, precision=precision)
        self.model.train()
        stop.closed()
        self.stream.while_waiting = stop.look
        while state.step < self.total_steps:
            batch = self._next(stop, clock)
            if batch is None:
                break

            # -- one step: features, loss over the global batch, averaged gradients, update
            lr = self._enter_step()
            out = forward_backward(
                self.model,
                batch,
                partial(self._loss, batch),
                micro_batches=self.micro_batches,
                backward=self.accelerator.backward,
                no_sync=lambda: no_sync(self.model),
                part=clock.part,
            )
            with clock.part("update"):
                self.accelerator.unscale_gradients(self.optimizer)
                grad_norm = clip_gradients(self.root.parameters(), config.optim.clip_grad_norm)
                if self.guard.passes(batch, out["loss"], grad_norm):
                    self.optimizer.step()
                    self.guard.clamped(clamp_logit_scale(self.root))
                    if state.ema is not None:
                        state.ema.update(self.clip, self.guard.sound)
                self.optimizer.zero_grad()
            state.step += 1
            state.samples_seen += self.batch_size
            self.watch.step_done()
            clock.count(batch, recomputed=self.micro_batches > 1 or config.train.grad_checkpointing)

            # -- what the step leaves behind
            last = state.step == self.total_steps
            logged = state.step % config.train.log_every_steps == 0 or last
            self.guard.settle(due=logged)
            if logged:
                row = {"epoch": batch["epoch"], "loss": out["loss"].item(), "lr": lr}
                row |= {"logit_scale": out["logit_scale"].item(), "grad_norm": grad_norm.item()}
                row |= self.guard.row(out)
                self.log("train", row | clock.row(state.samples_seen, self.world_size))
            if self._validation_due():
                with clock.paused():
                    self.guard.ready(to_save=False)
                    self.watch.be_patient()
                    self._validate(stop)
            if self.saver.due(state.step):
                with clock.paused():
                    self.guard.ready(to_save=True)
                    if self.saver.waits:
                        self.watch.be_patient()
                    self.saver.save()
        self.guard.ready(to_save=True)
        self.watch.be_patient()
        self.saver.finish()
        stop.saved = True
        return self._end(stop)

    def _enter_step(self) -> float:
        """Set learning rate and patch dropout for the step that comes; returns the rate."""
        config, seen = self.config, self.state.samples_seen
        lr = lr_at(
            config.schedule,
            config.optim.lr,
            samples_seen=seen,
            total_samples=self.total_samples,
            batch=self.batch_size,
        )
        set_lr(self.optimizer, lr)
        self.root.patch_dropout = patch_dropout_at(config.stages, seen, self.patch_dropout)
        self.guard.enter()
        return lr

    def _loss(self, batch: Batch, features: dict[str, torch.Tensor]) -> torch.Tensor:
        return contrastive_loss(
            **features,
            valid=batch["valid"],
            caption_hash=batch["caption_hash"],
            weight=batch.get("weight"),
            **self.config.loss.model_dump(),
        )

    def _next(self, stop: StopRequest, clock: Clock) -> Batch | None:
        """This rank's next batch; None if any rank was told to stop. A failure on one rank is raised on
        all."""
        place = self.stream.place
        batch: Batch = {}
        problem = ""
        try:
            with clock.waiting(), stop.waiting(interrupt=self.config.data.workers == 0):
                batch = next(self.stream)
            batch = self.to_device(batch)
            self.lock.keep()
        except Stopped:
            pass
        except UserError as error:
            problem = str(error)
        bad = batch.get("bad", [])
        flags = torch.tensor([len(bad), int(stop.asked), int(bool(problem)), *self.saver.flags()])
        damaged, asked, failed, *saving = distributed.all_reduce_sum(flags).tolist()
        stop.starting = False
        if asked:
            self.stream.place = place
            return None
        if failed:
            problems = distributed.gather_json(problem)
            raise UserError(next(text for text in problems if text))
        if damaged:
            seen = self.state.samples_seen + self.batch_size
            self.quarantine.add(bad, step=self.state.step + 1, samples_seen=seen)
        self.saver.heed(*saving)
        return batch

    def _end(self, stop: StopRequest) -> Outcome:
        """Say in the run folder how it ended."""
        state, reason = self.state, ""
        if state.step < self.total_steps:
            reason = next(text for text in distributed.gather_json(stop.reason) if text)
        if self.rank == 0:
            mark_end(self.folder, state.step, state.samples_seen, reason)
        return Outcome(self.folder, state.step, self.total_steps, reason)

    def _validation_due(self) -> bool:
        step, every = self.state.step, self.config.evaluate.every_steps
        return self.config.evaluate.data is not None and (step == self.total_steps or step % every == 0)

    def _validate(self, stop: StopRequest) -> None:
        """Rank 0 scores the held-out shards with the weights that would be exported; nothing if it is told to
        stop meanwhile."""
        with suppress(Stopped), self.state.exported() as root, stop.waiting(interrupt=True):
            if root is None or self.held_out is None:
                return
            scores = quick_retrieval(
                root,
                self.held_out,
                self.tokenizer,
                self.image_size,
                self.device,
                max_images=self.config.evaluate.max_images,
                look=stop.look,
            )
            self.saver.scored(scores)
            self.log("eval", dict(scores))
            self.guard.scored(scores, min(len(self.held_out), self.config.evaluate.max_images))

    def _facts(self) -> dict[str, Any]:
        return {
            "run": str(self.folder),
            "step": self.state.step,
            "total_steps": self.total_steps,
            "steps_per_epoch": self.stream.steps_per_epoch,
            "data": self.stream.describe(),
            "global_batch_size": self.batch_size,
            "world_size": self.world_size,
            "device": str(self.device),
            "precision": self.config.train.precision,
            "threads": torch.get_num_threads(),
            "parameters": sum(p.numel() for p in self.clip.parameters()),
            "notes": [*self.changes.lines(), *notes(self.config, self.clip, self.world_size)],
        }
