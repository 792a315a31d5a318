"""Ordered classes: one score per row against K - 1 ordered thresholds."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .head import Features, Head, Present

__all__ = ["Ordinal"]


class Ordinal(Head):
    """y_k = s + b_k, P(class > k) = sigmoid(y_k), s the one output of any head and b_1 > b_2 > .. (CORAL, Cao
    et al. 2020, arXiv 1901.07884; the proportional-odds model, McCullagh 1980).

    b_{k+1} = b_k - softplus(d_k): the probabilities of the classes are never negative, at no step of the
    training. All of it is the score's work but where the classes begin, so a ``late`` head averages scores.
    """

    def __init__(self, inner: Head, thresholds: int) -> None:
        super().__init__({})
        assert thresholds > 1, "two ordered classes are a binary task"
        self.inner = inner
        self.modalities = inner.modalities
        # a property there
        self.reads_tokens = inner.reads_tokens  # pyright: ignore[reportAttributeAccessIssue]
        # a property there
        self.reads_inputs = inner.reads_inputs  # pyright: ignore[reportAttributeAccessIssue]
        self.first = nn.Parameter(torch.full((1,), (thresholds - 1) / 2))
        self.gaps = nn.Parameter(torch.full((thresholds - 1,), math.log(math.e - 1)))

    @property
    def thresholds(self) -> Tensor:
        """b [K - 1], falling."""
        return torch.cat([self.first, self.first - F.softplus(self.gaps).cumsum(0)])

    @torch.no_grad()
    def fit_thresholds(self, counts: Sequence[int]) -> None:
        """Start where a score of 0 gives the classes' frequencies; half a row is added to every class."""
        size = torch.tensor(counts, dtype=torch.float64) + 0.5
        greater = 1 - (size.cumsum(0) / size.sum())[:-1]
        b = torch.logit(greater)
        self.first.copy_(b[:1])
        self.gaps.copy_((b[:-1] - b[1:]).clamp_min(1e-6).expm1().log())

    def fit_standard(self, features: Features, present: Present) -> None:
        """Take means and scales from the training rows."""
        self.inner.fit_standard(features, present)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Cumulative logits [b, K - 1], falling along a row."""
        return self.inner(features, present) + self.thresholds

    def parts(self, features: Features, present: Present) -> list[tuple[Tensor, Tensor]]:
        """Those of the inner head, each against the thresholds."""
        return [(score + self.thresholds, rows) for score, rows in self.inner.parts(features, present)]
