"""Guards a run's steps: what must not be applied is left out on the device, told, answered by going back.

Loss and gradient norm are the same bits on every rank, as the loss is summed over all and the norm is taken
of averaged gradients: a NaN on one rank is one on all, every rank decides alike, nothing more is exchanged.
On a CPU a bad step is a branch. On a GPU the host does not wait to know: the optimizer's ``found_inf`` and a
factor on the average keep everything where it is, and the numbers are read with the next row.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# torch has no public base
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

from ..configs.errors import UserError
from ..configs.files import Lines
from . import distributed
from .agree import on_rank_0, together
from .checkpoint import PARTS, newest_checkpoint, verify
from .collapse import ALIKE, at_chance, feature_std, works
from .guard_config import GuardConfig
from .ladder import Ladder
from .replicas import compare, fingerprint, fingerprint_json
from .spikes import SpikeWatch
from .state import TrainState
from .tracking import cut_metrics

__all__ = ["Guard"]

_AT_MOST = 100  # steps whose numbers wait on the device

Tell = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class _Step:
    """A step that is not yet judged on the host: loss and gradient norm, float64 [2], and whether one is a
    spike, a bool [], on the device; and which samples this rank had in it."""

    step: int
    epoch: int
    sample_ids: Tensor
    sources: Tensor
    numbers: Tensor
    spike: Tensor


class Guard:
    """One rank's guard over its share of a run; all ranks call the same methods in the same order."""

    def __init__(
        self,
        config: GuardConfig,
        state: TrainState,
        folder: Path,
        *,
        peak_lr: float,
        tell: Tell,
        waits: bool | None = None,
    ) -> None:
        """``tell`` gets a row for the metrics. ``waits``: whether the numbers of a step wait on the device,
        by default on all but a CPU."""
        self.config, self.ladder = config, Ladder(config)
        self.path = folder / "bad_steps.jsonl"
        self._lines = Lines(self.path)
        self._state, self._folder, self._lr, self._tell = state, folder, peak_lr, tell
        self._scaled = state.scaler is not None
        self._waits = state.device.type != "cpu" if waits is None else waits
        self._spikes = SpikeWatch(config.spike, state.device) if config.spike.action != "off" else None
        self._no = torch.zeros((), dtype=torch.bool, device=state.device)
        self._steps: list[_Step] = []
        norms = [module for module in state.root.modules() if isinstance(module, _BatchNorm)]
        self._statistics = [buffer for norm in norms for buffer in norm.buffers()]
        self._before: list[Tensor] = []
        self._clamped: Tensor | float = 0.0
        self._since_row, self._compared, self._ready = 0, state.step, -1
        self.wait_for_saves: Callable[[], None] = lambda: None
        """Called before a checkpoint is looked for, by all ranks."""
        self._origin, self._partial = "", False
        self.sound: Tensor | None = None
        """Where the host does not wait: whether the present step is applied, a bool [] on the device."""
        if self._waits:
            state.optimizer.register_step_pre_hook(self._leave_out)

    def _leave_out(self, optimizer: Any, *_: Any) -> None:
        assert self.sound is not None
        optimizer.found_inf = (~self.sound).float()

    def enter(self) -> None:
        """Before a step's forward, in which batch norms count what they see."""
        self._before = [buffer.clone() for buffer in self._statistics]

    @torch.no_grad()
    def passes(self, batch: Mapping[str, Any], loss: Tensor, grad_norm: Tensor) -> bool:
        """Whether the optimizer may step. True where the host does not wait; then ``sound`` says it.

        loss, grad_norm: one-element tensors on the device.
        """
        numbers = torch.stack([loss.detach().reshape(()), grad_norm.detach().reshape(())]).double()
        sound = (numbers - numbers == 0).all()  # finite
        spike = self._no if self._spikes is None else self._spikes.look(numbers)
        if self.config.spike.action == "skip":
            sound &= ~spike
        step = self._state.step + 1
        ids, sources = batch["sample_id"], batch["source"]
        self._steps.append(_Step(step, batch["epoch"], ids, sources, numbers, spike))
        self._since_row += 1
        if not self._waits:
            if passes := bool(sound):
                return passes
            for buffer, before in zip(self._statistics, self._before, strict=True):
                buffer.copy_(before)
            return False
        self.sound = sound
        for buffer, before in zip(self._statistics, self._before, strict=True):
            buffer.copy_(torch.where(sound, buffer, before))
        return True

    def clamped(self, bound: Tensor) -> None:
        """Take in whether the logit scale was clamped."""
        self._clamped = self._clamped + bound

    def settle(self, *, due: bool = True) -> None:
        """After a step: read the numbers that wait, name bad steps and climb the ladder; ``due`` where the
        device is waited for anyway. Raises UserError, on every rank, at the ladder's end and where processes
        no longer hold the same."""
        if self._waits and not due and len(self._steps) < _AT_MOST:
            return
        steps, self._steps = self._steps, []
        if steps:
            values = torch.stack([one.numbers for one in steps]).tolist()  # sync point
            spikes = torch.stack([one.spike for one in steps]).tolist()
            rungs = [self._judge(*one) for one in zip(steps, values, spikes, strict=True)]
            if worst := next((rung for rung in ("stop", "rollback") if rung in rungs), ""):
                self._climb(worst, values[-1])
        every = self.config.replicas_every_steps
        if every and self._state.step // every > self._compared // every:
            self._compare()

    def ready(self, *, to_save: bool) -> None:
        """Before weights are scored or saved: nothing waits, they give finite features and, to be saved, are
        the same on all ranks. Raises UserError as ``settle`` does."""
        self.settle()
        if self._ready == self._state.step:
            return
        if to_save and self.config.replicas_every_steps and self._compared < self._state.step:
            self._compare()
        if not works(self._state.root):
            self._climb(self.ladder.back(), [math.inf, math.nan])
        self._ready = self._state.step if to_save else -1

    def _judge(self, one: _Step, both: list[float], spike: bool) -> str:
        """What a step leads to: nothing, or a rung of the ladder."""
        loss, grad_norm = both
        numbers = f"loss {loss:.4g}, gradient norm {grad_norm:.4g}"
        reason = self._reason(loss, grad_norm, spike)
        if reason == "spike" and self.config.spike.action == "warn":
            self._say("spike", one.step, f"step {one.step} is a spike ({numbers})")
            return ""
        if not reason:
            return ""
        rung = self.ladder.bad(one.step)
        mine = {"step": one.step, "ids": one.sample_ids.tolist(), "sources": one.sources.tolist()}
        everyone = distributed.gather_json(mine)
        assert {part["step"] for part in everyone} == {one.step}, "ranks judge a step differently"
        self._write(
            {
                "step": one.step,
                "reason": reason,
                "loss": _plain(loss),
                "grad_norm": _plain(grad_norm),
                "epoch": one.epoch,
                "sample_ids": [number for part in everyone for number in part["ids"]],
                "sources": [number for part in everyone for number in part["sources"]],
            }
        )
        recent, window = len(self.ladder.recent), self.config.window_steps
        counted = f"{recent} of the last {window} steps; its samples are in {self.path.name}"
        self._say("skip", one.step, f"step {one.step} is left out: {reason} ({numbers}); {counted}")
        return rung

    def _reason(self, loss: float, grad_norm: float, spike: bool) -> str:
        """What is wrong with a step, "" if nothing is; counts it."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.ladder.in_a_row = 0
            self.ladder.spikes += spike
            return "spike" if spike else ""
        if self._scaled and math.isfinite(loss):  # fp16's scaler copes with gradients that overflow
            return "gradients overflow at any scale" if self.ladder.overflowed() else ""
        return "not finite"

    def _climb(self, rung: str, last: list[float]) -> None:
        """Go back, or stop."""
        state, bad = self._state, list(self.ladder.recent)
        if rung == "stop":
            raise UserError(self._end(last, f"after going back {self.ladder.rollbacks} times"))
        self.wait_for_saves()
        run, before = self._folder, bad[0] if bad else state.step

        def target() -> str:
            own = newest_checkpoint(run, before=before) or newest_checkpoint(run)
            return str(own or self._first())

        name = distributed.broadcast_json(on_rank_0(target))
        if not name:
            raise UserError(self._end(last, "and there is no checkpoint to go back to"))
        with together():
            step = int(state.go_back(Path(name), allow_partial=self._partial)["step"])
        self.ladder.went_back()
        passed = {"first_step": step + 1, "last_step": state.step}
        self._write({"step": state.step, "reason": "rollback", "checkpoint": Path(name).name, **passed})
        self._say(
            "rollback",
            state.step,
            f"weights are those of step {step} again, the batches of steps {step + 1} to {state.step} are "
            f"passed over ({self.ladder.rollbacks} of {self.config.max_rollbacks} times)",
        )

    def _first(self) -> str:
        """The checkpoint that the run went on from, maybe another run's, if it is whole still, else ""."""
        without = PARTS if self._partial else ()
        whole = self._origin and verify(Path(self._origin), without=without) is None
        return self._origin if whole else ""

    def _end(self, last: list[float], why: str) -> str:
        recent = self.ladder.recent
        left_out = f"left out: steps {', '.join(map(str, recent[-8:]))}"
        bad = left_out if recent else "weights give no finite features"
        return (
            f"optim.lr: the loss diverged at step {self._state.step} (loss {last[0]:.4g}, gradient norm "
            f"{last[1]:.4g}; {bad}), {why}; lower optim.lr (now {self._lr:g}) or lengthen "
            f"schedule.warmup_samples, look at the samples in {self.path}, or raise guard.max_skips or "
            "guard.max_rollbacks to go on; checkpoints up to here are untouched"
        )

    def _compare(self) -> None:
        """Raise UserError, on every rank, if the processes no longer hold the same."""
        state = self._state
        self._compared = state.step
        if distributed.world_size() == 1:
            return
        counters = [state.step, state.samples_seen, self.ladder.counts(), self.ladder.recent]
        prints = {name: fingerprint(value) for name, value in state.kept_alike().items()}
        prints["the place in the data"] = fingerprint_json(state.stream.state_dict())
        prints["the run's counters"] = fingerprint_json(counters)
        if (difference := compare(prints)) is not None:
            raise UserError(
                f"guard.replicas_every_steps: at step {state.step} the processes no longer hold the same: "
                f"{difference}; nothing of it was saved, the same command goes on from the newest "
                "checkpoint; look at the memory and GPU of what is named, or set 0 where devices of several "
                "kinds round differently"
            )

    def row(self, out: Mapping[str, Tensor]) -> dict[str, float]:
        """For a row of metrics: what happened since the run's beginning, the share of steps since the last
        row in which the logit scale was clamped, and how far this rank's features (``image_features`` and
        ``text_features`` [b, D]) are spread."""
        spread = torch.stack([feature_std(out[f"{kind}_features"]) for kind in ("image", "text")]).tolist()
        share = float(self._clamped) / max(1, self._since_row)
        self._clamped, self._since_row = 0.0, 0
        rows, width = out["image_features"].shape
        if rows > 1:
            self._warn_of_collapse(min(spread) * width**0.5)
        row: dict[str, float] = {"logit_scale_clamped": share}
        row |= {"image_feature_std": spread[0], "text_feature_std": spread[1], **self.ladder.counts()}
        return row | ({"overflows": self.ladder.overflows} if self._scaled else {})

    def _warn_of_collapse(self, spread: float) -> None:
        if self._late() and spread < ALIKE and self.ladder.first_time("alike"):
            self._say(
                "collapse",
                self._state.step,
                "features are nearly all alike, so the model tells nothing apart: lower optim.lr, lengthen "
                "schedule.warmup_samples, or look at what data.captions draws",
            )

    def scored(self, scores: Mapping[str, float], images: int) -> None:
        """Take in held-out retrieval over so many images; on rank 0."""
        if self._late() and at_chance(scores, images) and self.ladder.first_time("chance"):
            self._say(
                "chance",
                self._state.step,
                f"held-out retrieval is at the level of guessing after {self._state.samples_seen} samples: "
                "look at whether captions belong to their images (`diptych data verify`) and at optim.lr",
            )

    def _late(self) -> bool:
        after = self.config.collapse_after_samples
        return after is not None and self._state.samples_seen >= after

    def _say(self, event: str, step: int, text: str) -> None:
        self._tell({"event": event, "at_step": step, "text": text})

    def _write(self, row: dict[str, Any]) -> None:
        if distributed.rank() == 0:
            self._lines.add(json.dumps(row) + "\n")

    def close(self) -> None:
        """Close the list of bad steps."""
        self._lines.close()

    def resume(self, step: int, origin: str = "", *, partial: bool = False) -> None:
        """Forget what came after ``step``; the run's folder is there. ``origin``: the checkpoint that the run
        went on from, "" if it began, of which parts were allowed to be missing or not."""
        self._compared, self._lines = step, Lines(self.path)
        self._origin, self._partial = origin, partial
        if distributed.rank() == 0:
            cut_metrics(self.path, step)

    def state_dict(self) -> dict[str, Any]:
        """As JSON; nothing waits."""
        assert not self._steps
        spikes = None if self._spikes is None else self._spikes.state_dict()
        return {**self.ladder.state_dict(), "spike_window": spikes}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.ladder.load_state_dict(state)
        if self._spikes is not None and state["spike_window"] is not None:
            self._spikes.load_state_dict(state["spike_window"])


def _plain(number: float) -> float | str:
    return number if math.isfinite(number) else str(number)
