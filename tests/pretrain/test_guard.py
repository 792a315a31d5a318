"""The finite guard: the first bad step is remembered, whenever somebody looks."""

import math

import pytest
import torch

from diptych.configs.errors import UserError
from diptych.pretrain.guard import FiniteGuard

CPU = torch.device("cpu")
GOOD = (torch.tensor(1.0), torch.tensor(2.0))


@pytest.mark.parametrize(
    ("loss", "norm", "scaled", "bad"),
    [
        (math.nan, 1.0, False, True),
        (1.0, math.inf, False, True),
        (1.0, math.inf, True, False),
        (math.inf, 1.0, True, True),
        (1.0, 1.0, False, False),
    ],
)
def test_what_is_not_finite_is_told(loss: float, norm: float, scaled: bool, bad: bool) -> None:
    guard = FiniteGuard(CPU, scaled=scaled)
    guard.look(1, *GOOD)
    guard.look(2, torch.tensor(loss), torch.tensor([norm]))
    guard.look(3, torch.tensor(math.nan) if bad else GOOD[0], GOOD[1])
    guard.look(4, *GOOD)
    if not bad:
        guard.check(1e-3)
        return
    with pytest.raises(UserError, match=r"optim.lr: the loss diverged at step 2 \(loss .*now 0.001"):
        guard.check(1e-3)
