"""Spikes of loss and gradient norm, found on the device without waiting for it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .guard_config import SpikeConfig

__all__ = ["SpikeWatch"]

_TO_DEVIATION = 1.4826  # from the median absolute deviation, for a normal distribution
_LEAST = 0.05  # of a deviation of a logarithm, so about 5 %


class SpikeWatch:
    """The logarithms of the last losses and gradient norms, [2, window] on the device, and whether the next
    ones stand far above their medians."""

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self.config = config
        self._window = torch.full((2, config.window_steps), math.nan, device=device)
        self._steps = 0

    def look(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """Whether either is a spike, a bool [] on the device; the step then joins the window, also if it is
        one, or a new level would be a spike for ever. What is not finite is none and does not count."""
        values = torch.stack([loss, grad_norm]).float().clamp_min(1e-30).log_()
        median = self._window.nanmedian(1).values
        deviation = (self._window - median[:, None]).abs_().nanmedian(1).values
        limit = (_TO_DEVIATION * deviation).clamp_min_(_LEAST) * self.config.threshold
        # before the window is full its median must not decide
        spike = (values - median > limit).any() & (self._steps >= self.config.window_steps)
        known = torch.where(values.isfinite(), values, math.nan)
        self._window[:, self._steps % self.config.window_steps] = known
        self._steps += 1
        return spike

    def state_dict(self) -> dict[str, Any]:
        """As JSON; null stands for what was not finite."""
        rows = [[None if math.isnan(x) else x for x in row] for row in self._window.tolist()]
        return {"steps": self._steps, "window": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; with another ``window_steps`` it begins anew."""
        rows = [[math.nan if x is None else float(x) for x in row] for row in state["window"]]
        if len(rows[0]) == self.config.window_steps:
            self._window.copy_(torch.tensor(rows))
            self._steps = int(state["steps"])
