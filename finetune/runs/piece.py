"""One training (a head with one seed) on disk: its latest epoch while it goes on, then its result.

``training/NAME/seed_N/`` of a run or a fold is written as pretraining's checkpoints are, whole and verified,
and removed once the head is saved. A training goes on from it if it is the same: settings, data, seed.
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...pretrain import checkpoint
from ..adapt.fit import Fitted
from ..adapt.training import Tensors

__all__ = ["Piece"]

TENSORS, FACTS = "training.safetensors", "training.json"


class Piece:
    """A ``Keeper`` of epochs, and of the result."""

    def __init__(self, folder: Path, key: str, *, writes: bool = True) -> None:
        """``key``: what the training depends on. ``writes``: of processes that train together one alone."""
        self.folder, self.key, self.writes = folder, key, writes
        self._step = 0

    def _read(self) -> tuple[Path, dict[str, Any]] | None:
        """The newest state of this very training."""
        newest = checkpoint.newest_checkpoint(self.folder)
        if newest is None:
            return None
        facts = checkpoint.read_document(newest / FACTS)
        return (newest, facts) if facts["key"] == self.key else None

    def _write(self, tensors: Tensors, facts: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        if self._step == 0:
            newest = self._read()
            self._step = 0 if newest is None else int(newest[1]["step"])
            if newest is None:  # of another training
                shutil.rmtree(self.folder, ignore_errors=True)
            checkpoint.remove_leftovers(self.folder)
        self._step += 1
        facts = {"key": self.key, "step": self._step, **facts}
        named = {TENSORS: tensors}
        checkpoint.save(self.folder, self._step, tensors=named, documents={FACTS: facts}, keep=1)

    def save_epoch(self, tensors: Tensors, facts: dict[str, Any]) -> None:
        """See ``Keeper``."""
        self._write(tensors, {"epoch": facts})

    def load_epoch(self) -> tuple[Tensors, dict[str, Any]] | None:
        """See ``Keeper``."""
        found = self._read()
        if found is None or "epoch" not in found[1]:
            return None
        return checkpoint.read_tensors(found[0] / TENSORS), found[1]["epoch"]

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        found = self._read()
        return found is not None and "result" in found[1]

    def save_result(self, got: Fitted, rows: list[dict[str, Any]], seconds: float) -> None:
        """Keep what was trained, its rows of the log and how long it took."""
        tensors = {f"head/{name}": value for name, value in got.head.state_dict().items()}
        if got.model is not None:
            tensors |= {f"clip/{name}": value for name, value in got.model.clip.state_dict().items()}
        names = ("scale", "shift", "best_epoch", "trained", "facts")
        result = {name: getattr(got, name) for name in names}
        self._write(tensors, {"result": result, "rows": rows, "seconds": seconds})

    def load_result(self) -> tuple[Tensors, dict[str, Any]] | None:
        """``head/..`` and ``clip/..``, and what ``save_result`` was told; None if it is not there."""
        found = self._read()
        if found is None or "result" not in found[1]:
            return None
        return checkpoint.read_tensors(found[0] / TENSORS), found[1]

    def remove(self) -> None:
        """Forget it."""
        shutil.rmtree(self.folder, ignore_errors=True)
