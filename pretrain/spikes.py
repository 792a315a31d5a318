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
    """The logarithms of the last losses and gradient norms, float64 [2, window] on the device, and whether
    the next ones stand far above their medians, which are worked out anew ten times a window."""

    def __init__(self, config: SpikeConfig, device: torch.device) -> None:
        self.config = config
        self._window = torch.full((2, config.window_steps), math.nan, dtype=torch.float64, device=device)
        self._limit = torch.full((2,), math.inf, dtype=torch.float64, device=device)
        self._steps = 0

    def look(self, numbers: Tensor) -> Tensor:
        """Whether loss or gradient norm, float64 [2], is a spike, a bool [] on the device; the step then
        joins the window, also if it is one, or a new level would be a spike for ever. What is not finite does
        not count there."""
        logarithms = numbers.log()
        spike = (logarithms > self._limit).any()
        size = self.config.window_steps
        self._window[:, self._steps % size] = logarithms
        self._steps += 1
        if self._steps >= size and self._steps % (size // 10) == 0:
            known = torch.where(self._window.isfinite(), self._window, math.nan)
            median = known.nanmedian(1).values
            deviation = _TO_DEVIATION * (known - median[:, None]).abs_().nanmedian(1).values
            self._limit = (median + self.config.threshold * deviation.clamp_min_(_LEAST)).nan_to_num_(
                math.inf
            )
        return spike

    def state_dict(self) -> dict[str, Any]:
        """As JSON; what is not finite is null."""
        rows = [_to_json(row) for row in self._window.tolist()]
        return {"steps": self._steps, "limit": _to_json(self._limit.tolist()), "window": rows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what ``state_dict`` gave; with another ``window_steps`` it begins anew."""
        rows = [_from_json(row, math.nan) for row in state["window"]]
        if len(rows[0]) == self.config.window_steps:
            self._window.copy_(torch.tensor(rows, dtype=torch.float64))
            self._limit.copy_(torch.tensor(_from_json(state["limit"], math.inf), dtype=torch.float64))
            self._steps = int(state["steps"])


def _to_json(numbers: list[float]) -> list[float | None]:
    return [x if math.isfinite(x) else None for x in numbers]


def _from_json(numbers: list[float | None], instead: float) -> list[float]:
    return [instead if x is None else float(x) for x in numbers]
