"""The lines of ``metrics.jsonl``: one per head, seed and epoch, in the order in which heads are trained."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...configs.files import atomic_write_text
from ...pretrain.tracking import Tracker
from ..config import FinetuneConfig

__all__ = ["Journal"]


class Journal:
    """Counts the lines of a run and passes them to its tracker, which opens with the first new line.

    Every trained head keeps its own lines beside its weights. A run that goes on cuts ``metrics.jsonl`` back
    to the heads that come before the first one it trains.
    """

    def __init__(self, folder: Path, config: FinetuneConfig) -> None:
        self.histories: list[Path] = []
        """The files of all heads' own lines, in the order of training; whoever trains them fills it first."""
        self._folder, self._config = folder, config
        self._step = 0
        self._tracker: Tracker | None = None

    def keep(self, history: Path) -> None:
        """A head that was trained before: its lines count."""
        lines = _lines(history)
        if self._tracker is not None:  # a head before this one was trained anew
            for i, line in enumerate(lines):
                self._tracker.log(json.loads(line) | {"step": self._step + i})
        self._step += len(lines)

    def begin(self, history: Path) -> None:
        """A head is about to be trained."""
        if self._tracker is not None:
            return
        before = self.histories[: self.histories.index(history)]
        kept = [line for path in before for line in _lines(path)]
        atomic_write_text(self._folder / "metrics.jsonl", "".join(line + "\n" for line in kept))
        settings = json.loads(self._config.model_dump_json())
        self._tracker = Tracker(self._folder, self._config.tracking, settings)

    def log(self, kind: str, row: Mapping[str, Any]) -> dict[str, Any]:
        """Number a new line, track it and return it whole."""
        line: dict[str, Any] = {"kind": kind, "step": self._step, **row}
        self._step += 1
        assert self._tracker is not None
        self._tracker.log(line)
        return line

    def finish(self, exit_code: int = 0) -> None:
        """Close the tracker, if there was anything to track."""
        if self._tracker is not None:
            self._tracker.finish(exit_code)
            self._tracker = None


def _lines(history: Path) -> list[str]:
    return history.read_text(encoding="utf-8").splitlines() if history.is_file() else []
