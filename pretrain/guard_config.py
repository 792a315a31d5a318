"""What a run does about steps, weights and features that go wrong: the config section ``guard``."""

from typing import Literal

from pydantic import Field

from ..configs.load import StrictModel

__all__ = ["GuardConfig", "SpikeConfig"]


class SpikeConfig(StrictModel):
    """Steps whose loss or gradient norm stands far above those before them.

    Measured against the median of the last steps in robust standard deviations (1.4826 times the median
    absolute deviation) of the logarithm, so that neither a past spike nor the scale matters. Bad batches are
    passed over after going back, as in PaLM (Chowdhery et al., 2022, arXiv 2204.02311, section 5.1).
    """

    action: Literal["off", "warn", "skip"] = "warn"
    """``warn``: say and count it. ``skip``: leave the update out and count the step as a bad one, which past
    ``guard.max_skips`` takes the run back. The default changes no result: what is a spike is a guess, what is
    not a number is none."""
    window_steps: int = Field(default=100, ge=10)
    """How many steps the median is taken over; before so many there are no spikes."""
    threshold: float = Field(default=8.0, gt=0)
    """Robust standard deviations. One counts at least 5 %, so that by default a spike is half as much again
    as the median or more."""


class GuardConfig(StrictModel):
    """The ladder for bad steps: leave out, go back, stop; and watches over what a loss does not show."""

    max_skips: int = Field(default=5, ge=0)
    """A step whose loss or gradients are not finite changes nothing. With more than so many among
    ``window_steps`` the run goes back to the newest checkpoint from before them."""
    window_steps: int = Field(default=100, ge=1)
    """The steps over which ``max_skips`` counts."""
    max_rollbacks: int = Field(default=3, ge=0)
    """How often a run may go back. Weights, optimizer and averages are then the checkpoint's; the data goes
    on from where it was. The next time it stops."""
    spike: SpikeConfig = SpikeConfig()
    replicas_every_steps: int = Field(default=500, ge=0)
    """Every so many steps, and before every checkpoint, the processes compare what must be the same on all,
    bit for bit; 0 for never. GPUs or CPUs of several kinds in one run round differently: set it to 0 there.
    With ``train.parallel: fsdp`` only the place in the data and what is not sharded can be compared."""
    collapse_after_samples: int | None = Field(default=1_000_000, ge=0)
    """After so many samples, warn once if features are all alike or held-out retrieval is still at the level
    of guessing; null for never."""
