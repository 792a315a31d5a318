"""The learning rate as a pure function of the samples seen.

Samples, not steps, are the clock, so that a run resumed with another batch size or world size keeps its
curve. With a fixed batch and whole steps the values are those of open_clip's ``cosine_lr``, ``const_lr`` and
``const_lr_cooldown`` (open_clip_train/scheduler.py).
"""

import math
from typing import Literal

from pydantic import Field

from ..configs.load import StrictModel


class ScheduleConfig(StrictModel):
    """How the learning rate moves. Durations are in samples, so they do not depend on the batch size."""

    kind: Literal["cosine", "constant", "linear"] = "cosine"
    """Course after the warm-up: half a cosine, a straight line, or constant (with an optional cool-down)."""
    warmup_samples: int = Field(default=0, ge=0)
    """Linear rise from 0 over this many samples."""
    cooldown_samples: int = Field(default=0, ge=0)
    """Only for ``constant``: linear fall over the last so many samples."""
    final_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """Where the fall ends, as a fraction of the peak."""


def lr_factor(config: ScheduleConfig, *, samples_seen: int, total_samples: int, batch: int) -> float:
    """Factor in [0, 1] on the peak rate for the step that starts after ``samples_seen`` samples.

    ``batch`` is the global batch size of this step: the warm-up counts it in, so the first step is not lost.
    """
    if samples_seen < config.warmup_samples:
        return min(1.0, (samples_seen + batch) / config.warmup_samples)
    low = config.final_lr_fraction
    if config.kind == "constant":
        start = total_samples - config.cooldown_samples
        if samples_seen < start or config.cooldown_samples == 0:
            return 1.0
        progress = (samples_seen - start) / config.cooldown_samples
        return low + (1 - low) * max(0.0, 1 - progress)
    progress = (samples_seen - config.warmup_samples) / max(1, total_samples - config.warmup_samples)
    progress = min(1.0, progress)
    fall = 0.5 * (1 + math.cos(math.pi * progress)) if config.kind == "cosine" else 1 - progress
    return low + (1 - low) * fall


def lr_at(config: ScheduleConfig, peak: float, *, samples_seen: int, total_samples: int, batch: int) -> float:
    """Learning rate of the step that starts after ``samples_seen`` samples; see ``lr_factor``."""
    return peak * lr_factor(config, samples_seen=samples_seen, total_samples=total_samples, batch=batch)
