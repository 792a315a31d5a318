"""Pixels on their way to the device.

The host runs ahead of a GPU, so while one batch is computed the next one's pixels are already copied, from
page-locked memory on a stream of their own. The step waits for the copy; the host waits for nothing.
"""

from typing import Any

import torch

__all__ = ["PixelCopier"]

Batch = dict[str, Any]


class PixelCopier:
    """Brings a batch's ``image`` to the device; the rest is small, and a step's layout is worked out from it
    on the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch with its pixels on the device (uint8 [b, 3, S, S], as they are)."""
        if self._copies is None:
            return batch | {"image": batch["image"].to(self._device)}
        step = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._copies):
            image = batch["image"].to(self._device, non_blocking=True)
        step.wait_stream(self._copies)
        image.record_stream(step)  # or its memory could be given away while the step still reads it
        return batch | {"image": image}
