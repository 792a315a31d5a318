"""When checkpoints are written, and which of them stay."""

import math
from collections.abc import Sequence
from typing import Literal, Self, get_args

from pydantic import Field, model_validator

from ..configs.load import StrictModel
from .manifest import Found

__all__ = ["METRICS", "CheckpointConfig", "KeepBest", "best_of", "superseded"]


Metric = Literal[
    "val/image_to_text_R@1",
    "val/image_to_text_R@5",
    "val/image_to_text_R@10",
    "val/text_to_image_R@1",
    "val/text_to_image_R@5",
    "val/text_to_image_R@10",
]
METRICS: tuple[str, ...] = get_args(Metric)


class KeepBest(StrictModel):
    """Checkpoints that stay for a score they had on the held-out shards."""

    metric: Metric = "val/image_to_text_R@5"
    """A score of the rows of kind ``eval`` in ``metrics.jsonl``; the highest are the best."""
    count: int = Field(default=1, ge=1)


class CheckpointConfig(StrictModel):
    """When checkpoints are written, and which stay."""

    every_steps: int = Field(default=500, ge=1)
    """A checkpoint is also written at the end and when the run is told to stop."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest checkpoints stay; older ones are removed once a newer one is complete."""
    keep_every_steps: int | None = Field(default=None, ge=1)
    """Checkpoints at multiples of this stay for ever; a multiple of ``every_steps``."""
    keep_best: KeepBest | None = None
    """Also keep the best, of those at whose step the held-out shards were scored."""
    asynchronous: bool = True
    """Training stands still for a copy of the state alone; it is written, hashed and synced beside the next
    steps. Takes the size of the state once more in CPU memory."""
    retry_s: float = Field(default=120.0, gt=0)
    """After a save that failed, when to try again, if no checkpoint is due before."""
    max_failed_saves: int = Field(default=10, ge=1)
    """After so many failures in a row the run stops; until then it warns and goes on."""

    @model_validator(mode="after")
    def _at_checkpoints(self) -> Self:
        if self.keep_every_steps is not None and self.keep_every_steps % self.every_steps:
            raise ValueError(
                f"checkpoint.keep_every_steps: {self.keep_every_steps} is no multiple of "
                f"checkpoint.every_steps ({self.every_steps}); give one"
            )
        return self


def best_of(found: Sequence[Found], best: KeepBest) -> list[Found]:
    """The best whole checkpoints, the newer of equal ones; ``found`` is newest first."""
    scored: list[tuple[float, Found]] = []
    for one in found:
        value = one.facts.get("metrics", {}).get(best.metric)
        if one.problem is None and isinstance(value, int | float) and math.isfinite(value):
            scored.append((value, one))
    return [one for _, one in sorted(scored, key=lambda pair: -pair[0])][: best.count]


def superseded(
    found: Sequence[Found],
    *,
    keep: int,
    keep_every_steps: int | None = None,
    keep_best: KeepBest | None = None,
    newest: int | None = None,
) -> list[Found]:
    """Those of ``found`` (newest first) that may go: older than the ``keep`` newest whole ones, none of the
    multiples, none of the best.

    A damaged one never counts as kept. Nothing newer than step ``newest`` counts either or is touched:
    what a run has just written is its newest, whatever else lies there.
    """
    whole = [one for one in found if one.problem is None and (newest is None or one.step <= newest)]
    if not whole:
        return []
    oldest = whole[:keep][-1].step
    best = best_of(whole, keep_best) if keep_best is not None else []
    return [
        one
        for one in found
        if one.step < oldest
        and not (keep_every_steps and one.step % keep_every_steps == 0)
        and one not in best
    ]
