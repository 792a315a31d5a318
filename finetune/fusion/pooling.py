"""Several pictures of a row, or frames of a video, as one vector; their order does not matter.

Both ways start from the pictures' own embeddings x_1 .. x_P, each encoded once however many rows show it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .head import Features, Head, Present, Standard, masked_softmax

__all__ = ["Pooled", "mean_pool"]

HIDDEN = 128


def mean_pool(x: Tensor, mask: Tensor) -> Tensor:
    """The mean of the embeddings x [b, P, D] that the mask bool [b, P] tells, brought back to length 1; a
    single one as it is; zeros without any. Sorted before they are added, so it is the same in every order
    to the last bit."""
    given = torch.where(mask[..., None], x, 0.0).sort(dim=1).values
    total = given[:, 0]
    for i in range(1, given.shape[1]):
        total = total + given[:, i]
    return torch.where(mask.sum(1, keepdim=True) > 1, F.normalize(total, dim=-1), total)


class Attend(nn.Module):
    """sum_i a_i x_i, a = softmax_i(w^T tanh(V z_i + c)), z_i the standardised x_i (attention-based pooling,
    Ilse et al. 2018, arXiv 1802.04712). w starts at zero, and the pool at the mean."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.standard = Standard(width)
        self.hidden = nn.Linear(width, HIDDEN)
        self.score = nn.Linear(HIDDEN, 1, bias=False)
        nn.init.zeros_(self.score.weight)

    def weights(self, x: Tensor, mask: Tensor) -> Tensor:
        """a [b, P]: 0 where the mask is False, else summing to 1."""
        z = self.standard(torch.where(mask[..., None], x, 0.0))
        return masked_softmax(self.score(torch.tanh(self.hidden(z)))[..., 0], mask)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """[b, D] of x [b, P, D]; zeros where the mask bool [b, P] has no True."""
        x = torch.where(mask[..., None], x, 0.0)
        return (self.weights(x, mask)[..., None] * x).sum(1)


class Pooled(Head):
    """A head in front of which some modalities are pooled, with weights that are trained with it: it reads
    ``<k>_set`` [b, P, D] and ``<k>_set_mask`` bool [b, P] and gives the head below their mean as ``<k>``."""

    def __init__(self, inner: Head, widths: Mapping[str, int]) -> None:
        """``widths``: of the modalities that are pooled, and that the inner head reads."""
        super().__init__({})
        self.inner = inner
        self.modalities = inner.modalities
        self.pool = nn.ModuleDict({k: Attend(width) for k, width in widths.items()})

    @staticmethod
    def read(features: Features, present: Present, k: str) -> tuple[Tensor, Tensor]:
        """x [b, P, D] and bool [b, P], True for real ones of rows that have the modality."""
        return features[f"{k}_set"], features[f"{k}_set_mask"] & present[k][:, None]

    def pooled(self, features: Features, present: Present) -> Features:
        """The features with the pooled vectors among them."""
        return {**features, **{k: pool(*self.read(features, present, k)) for k, pool in self.pool.items()}}

    @torch.no_grad()
    def fit_standard(self, features: Features, present: Present) -> None:
        """Take means and scales from the training rows, of all their pictures and of the pooled ones."""
        for k, pool in self.pool.items():
            assert isinstance(pool, Attend)
            x, mask = self.read(features, present, k)
            pool.standard.fit(x[mask])
        self.inner.fit_standard(self.pooled(features, present), present)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        return self.inner(self.pooled(features, present), present)

    def parts(self, features: Features, present: Present) -> list[tuple[Tensor, Tensor]]:
        """Those of the inner head."""
        return self.inner.parts(self.pooled(features, present), present)
