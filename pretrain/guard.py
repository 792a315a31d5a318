"""Whether loss and gradients were finite in every step, without waiting for the device in each."""

import torch
from torch import Tensor

from ..configs.errors import UserError

__all__ = ["FiniteGuard"]


class FiniteGuard:
    """Remembers, on the device, the first step whose numbers were not finite.

    ``check`` fetches it: before anything is saved, scored or told, and where ``waits`` is False, because it
    costs nothing there (a CPU), after every step.
    """

    def __init__(self, device: torch.device, *, scaled: bool) -> None:
        """``scaled``: fp16's scaler copes with gradients that overflow, so the loss alone is looked at."""
        self._scaled = scaled
        self._first = torch.full((3,), -1.0, dtype=torch.float64, device=device)
        self.waits = device.type != "cpu"

    def look(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Take in a step's loss and gradient norm, one-element tensors on the device."""
        loss, grad_norm = loss.detach().double().reshape(()), grad_norm.detach().double().reshape(())
        finite = torch.isfinite(loss) if self._scaled else torch.isfinite(loss) & torch.isfinite(grad_norm)
        seen = torch.stack([torch.full_like(loss, step), loss, grad_norm])
        self._first = torch.where(finite | (self._first[0] >= 0), self._first, seen)

    def check(self, lr: float) -> None:
        """Raise UserError if a step since the beginning was not finite; ``lr`` is the peak rate to lower."""
        step, loss, grad_norm = self._first.tolist()  # sync point
        if step >= 0:
            raise UserError(
                f"optim.lr: the loss diverged at step {int(step)} (loss {loss:.4g}, gradient norm "
                f"{grad_norm:.4g}); lower optim.lr (now {lr:g}) or lengthen schedule.warmup_samples; "
                "checkpoints up to here are untouched"
            )
