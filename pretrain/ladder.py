"""The ladder for bad steps: leave them out, go back to a checkpoint, stop. Counts alone; guard.py acts."""

from collections.abc import Mapping
from typing import Any, Literal

from .guard_config import GuardConfig

__all__ = ["Ladder", "Rung"]

Rung = Literal["skip", "rollback", "stop"]


class Ladder:
    """What a bad step leads to, as a function of those before it. The same on every rank, and after a kill
    and a resume the same again, as its counters are saved with the checkpoint."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.recent: list[int] = []  # bad steps within the window, since the last going back
        self.skipped = self.rollbacks = self.spikes = self.overflows = 0
        self.told: list[str] = []  # what is told once

    def bad(self, step: int) -> Rung:
        """A step was left out; steps come in order."""
        self.skipped += 1
        self.recent = [one for one in self.recent if one > step - self.config.window_steps] + [step]
        return "skip" if len(self.recent) <= self.config.max_skips else self.back()

    def back(self) -> Rung:
        """Whether the run may go back once more."""
        return "rollback" if self.rollbacks < self.config.max_rollbacks else "stop"

    def went_back(self) -> None:
        """The run stands on a checkpoint's weights, and counts afresh."""
        self.rollbacks += 1
        self.recent = []

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
            "recent": list(self.recent),
            "told": list(self.told),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave."""
        self.skipped, self.rollbacks = int(state["skipped_steps"]), int(state["rollbacks"])
        self.spikes, self.overflows = int(state["spikes"]), int(state["overflows"])
        self.recent = [int(step) for step in state["recent"]]
        self.told = [str(what) for what in state["told"]]
