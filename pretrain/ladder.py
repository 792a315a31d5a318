"""The ladder for bad steps: leave them out, go back to a checkpoint, stop. Counts alone; guard.py acts."""

from collections.abc import Mapping
from typing import Any, Literal

from .guard_config import GuardConfig

__all__ = ["Ladder", "Rung"]

Rung = Literal["skip", "rollback", "stop"]
OVERFLOWS = 24
"""So many in a row fp16's scaler is let deal with alone: it begins at 2^16 and halves its scale each time."""


class Ladder:
    """What a bad step leads to, as a function of those before it. The same on every rank, and after a kill
    and a resume the same again, as its counters are saved with the checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.recent: list[int] = []  # bad steps within the window, since the last going back
        self.skipped = self.rollbacks = self.spikes = self.overflows = 0
        self.in_a_row = 0  # overflows, up to the last step
        self.told: list[str] = []  # what is told once

    def bad(self, step: int) -> Rung:
        """A step was left out; steps come in order."""
        self.skipped += 1
        self.recent = [one for one in self.recent if one > step - self.config.window_steps] + [step]
        return "skip" if len(self.recent) <= self.config.max_skips else self.back()

    def overflowed(self) -> bool:
        """Gradients were not finite under fp16's scaler. Whether lower scales do not help, so that the step
        counts as a bad one."""
        self.overflows += 1
        self.in_a_row += 1
        return self.in_a_row > OVERFLOWS

    def back(self) -> Rung:
        """Whether the run may go back once more."""
        return "rollback" if self.rollbacks < self.config.max_rollbacks else "stop"

    def went_back(self) -> None:
        """The run stands on a checkpoint's weights, and counts afresh."""
        self.rollbacks += 1
        self.recent, self.in_a_row = [], 0

    def first_time(self, what: str) -> bool:
        """Whether this was not told before."""
        new = what not in self.told
        if new:
            self.told.append(what)
        return new

    def counts(self) -> dict[str, int]:
        """For a row of metrics, since the run's beginning."""
        return {"skipped_steps": self.skipped, "rollbacks": self.rollbacks, "spikes": self.spikes}

    def state_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            **self.counts(),
            "overflows": self.overflows,
            "overflows_in_a_row": self.in_a_row,
            "recent": list(self.recent),
            "told": list(self.told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.skipped, self.rollbacks = int(state["skipped_steps"]), int(state["rollbacks"])
        self.spikes, self.overflows = int(state["spikes"]), int(state["overflows"])
        self.in_a_row = int(state.get("overflows_in_a_row", 0))  # not in what earlier versions wrote
        self.recent = [int(step) for step in state["recent"]]
        self.told = [str(what) for what in state["told"]]
