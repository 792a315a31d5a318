"""Damaged samples of a run: counted on every rank, named in ``quarantine.jsonl``, bounded by a budget."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configs.errors import UserError
from ..configs.files import Lines
from . import distributed
from .tracking import cut_metrics, read_metrics

__all__ = ["Quarantine"]


class Quarantine:
    """The damaged samples met so far, each named once; every rank counts, rank 0 writes."""

    def __init__(self, path: Path, allowed: Callable[[int], int]) -> None:
        """``allowed``: how many distinct samples may be damaged after so many samples seen."""
        self.path = path
        self._lines = Lines(path)
        self.allowed = allowed
        self._known: set[_Sample] = set()

    @property
    def count(self) -> int:
        """Distinct damaged samples."""
        return len(self._known)

    def resume(self, step: int) -> None:
        """Forget what was met after ``step``; the run's folder is there."""
        self._lines = Lines(self.path)
        if distributed.rank() == 0:
            cut_metrics(self.path, step)
        distributed.barrier()
        self._known = {_sample(row) for row in read_metrics(self.path)}

    def add(self, bad: Sequence[Mapping[str, Any]], *, step: int, samples_seen: int) -> None:
        """Take in this rank's damaged samples of one step; every rank calls it in the same step.

        Raises UserError, on every rank, past what is allowed.
        """
        everyone = [row for part in distributed.gather_json(list(bad)) for row in part]
        new = {_sample(row): {**row, "step": step} for row in everyone}
        rows = [row for sample, row in new.items() if sample not in self._known]
        self._known |= new.keys()
        if distributed.rank() == 0:
            self._lines.add(*(json.dumps(row) + "\n" for row in rows))
        if self.count > self.allowed(samples_seen):
            first = ", ".join(f"{row['key']} in {row['shard']} ({row['reason']})" for row in everyone[:3])
            raise UserError(
                f"data.max_bad_fraction: {self.count} samples are damaged after {samples_seen} seen, more "
                f"than it allows, for instance {first}; all are named in {self.path}: raise the limit to go "
                "on, or mend the shards (`diptych data verify`) and start a new run from the weights"
            )


_Sample = tuple[int, int, str, str]


def _sample(row: Mapping[str, Any]) -> _Sample:
    """What is damaged: source, number, shard and key. What was written before there were sources is of the
    first; where a tar without an index breaks, samples have no number."""
    return int(row.get("source", 0)), int(row["sample_id"]), row["shard"], row["key"]
