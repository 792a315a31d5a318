"""How a run ended, for scripts: exit codes do not tell, since torchrun's is 1 after a signal however clean
the end was.

``stopped.json`` is there after a clean stop and until the next start, ``finished.json`` once the run is
complete; after a crash there is neither. Both hold ``step``, ``samples_seen`` and ``checkpoint`` (its place
in the run folder, null if there is none yet), the first also ``reason``: the name of a signal, or
"the launcher's end".
"""

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ..configs.errors import UserError
from ..configs.files import atomic_write_text
from .checkpoint import newest_step, read_document
from .owner import RunLock

__all__ = ["FINISHED", "STOPPED", "begun", "goes_on", "mark_end", "stopped_early"]

STOPPED, FINISHED = "stopped.json", "finished.json"


def begun(run: Path) -> None:
    """A start: the last stop is past, also if this start fails."""
    (run / STOPPED).unlink(missing_ok=True)


def goes_on(run: Path) -> None:
    """There are steps to do."""
    (run / FINISHED).unlink(missing_ok=True)


def mark_end(run: Path, step: int, samples_seen: int, reason: str) -> None:
    """Write ``stopped.json`` if there is a reason, else ``finished.json``; never both."""
    newest = newest_step(run)
    document: dict[str, Any] = {"step": step, "samples_seen": samples_seen}
    document["checkpoint"] = None if newest is None else f"checkpoints/{newest[1].name}"
    if reason:
        document["reason"] = reason
    begun(run)
    goes_on(run)
    atomic_write_text(run / (STOPPED if reason else FINISHED), json.dumps(document) + "\n")


def stopped_early(lock: RunLock, reason: str) -> int:
    """Mark a run that was told to stop while it started, and return the step that it has saved. One process
    of it does so, and none if another process uses the run folder or the run is complete."""
    newest = newest_step(lock.folder)
    step = samples_seen = 0
    if newest is not None:
        step, samples_seen = newest[0], int(read_document(newest[1] / "trainer.json")["samples_seen"])
    if os.environ.get("RANK", "0") == "0" and not (lock.folder / FINISHED).exists():
        with suppress(UserError, OSError):
            lock.take(patient=False)
            mark_end(lock.folder, step, samples_seen, reason)
    return step
