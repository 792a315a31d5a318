"""Exponential moving average of the weights, for evaluation and export (Polyak and Juditsky, 1992)."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .distributed import local


class Ema:
    """Running average of a module's parameters and float buffers; integer buffers are copied.

    The decay of update t (from 0) is ``min(decay, (1 + t) / (10 + t))``, so that early averages are not held
    by the initial weights. All ranks hold the same weights, or each its part of them, so each averages for
    itself and no communication is needed.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        assert 0 < decay < 1
        self.decay = decay
        self.updates: int | Tensor = 0  # a float64 [] on the device once it is told ``sound``
        self._average = {name: t.detach().clone() for name, t in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module, sound: Tensor | None = None) -> None:
        """Take in the module's present weights; call after every optimizer step.

        ``sound``: a bool [] on the device, for a host that does not wait to know it; nothing moves where it
        is False, if the module has not moved either.
        """
        weight = self._weight(sound)
        for name, value in module.state_dict().items():
            average = local(self._average[name])
            if value.is_floating_point():
                weight_of = weight.to(average.dtype) if isinstance(weight, Tensor) else weight
                average.lerp_(local(value), weight_of)
            else:
                average.copy_(local(value))

    def _weight(self, sound: Tensor | None) -> float | Tensor:
        """Of the present weights in the average, which has one update more afterwards."""
        if sound is None:
            decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
            self.updates += 1
            return 1 - decay
        updates = torch.as_tensor(self.updates, dtype=torch.float64, device=sound.device)
        self.updates = updates + sound
        return (1 - ((1 + updates) / (10 + updates)).clamp_max(self.decay)) * sound

    def weights(self) -> dict[str, Tensor]:
        """The averaged state dict, under the module's own names (not a copy), sharded as the module is."""
        return dict(self._average)

    @contextmanager
    def applied(self, module: nn.Module) -> Generator[nn.Module]:
        """The module with the averaged weights inside the block; its own weights come back at the end, also
        after an error."""
        own = {name: t.detach().clone() for name, t in module.state_dict().items()}
        module.load_state_dict(self._average)
        try:
            yield module
        finally:
            module.load_state_dict(own)

    def state_dict(self) -> dict[str, int | float]:
        """Counters (JSON); the weights are saved apart, from ``weights()``."""
        return {"decay": self.decay, "updates": int(self.updates)}

    def load_state_dict(self, state: Mapping[str, int | float], weights: Mapping[str, Tensor]) -> None:
        """Take counters and weights back. ``weights`` must have exactly the module's names and sharding."""
        assert weights.keys() == self._average.keys(), "the averaged weights belong to another model"
        self.updates = int(state["updates"])
        for name, value in weights.items():
            self._average[name].copy_(value)
