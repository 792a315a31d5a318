"""Fusion heads: encoder outputs of several modalities to logits.

Notation: b rows, M modalities, D the embedding width, H the head's width, C outputs (1 for binary tasks);
z_k [b, D] the embedding of modality k, standardised (see ``Standard``); m_k [b] its presence; n_k [D] a
learned null vector. Where a modality is missing, z~_k = n_k, so whatever stands in that slot changes nothing.

Every head is a module ``(features, present) -> logits [b, C]``. ``features`` maps a modality to its
L2-normalised embeddings [b, D], and for ``cross`` also ``image_tokens`` [b, P, W], ``text_tokens`` [b, L, W']
and ``text_mask`` bool [b, L]. ``present`` maps a modality to bool [b].

No head attends over pooled vectors: a softmax over one key is 1, and attention over two is a gate with more
parameters.
"""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import SINGLE, HeadConfig

__all__ = ["STAGES", "Features", "Head", "Present", "Standard", "build_head"]

Features = Mapping[str, Tensor]
Present = Mapping[str, Tensor]

STAGES = {
    "image": ("single", "embedding"),
    "text": ("single", "embedding"),
    "similarity": ("mid", "embedding"),
    "concat": ("mid", "embedding"),
    "weighted_sum": ("mid", "embedding"),
    "gated": ("mid", "embedding"),
    "bilinear": ("mid", "embedding"),
    "cross": ("mid", "token"),
    "late": ("late", "decision"),
}
"""Stage and level of each operator, as docs/finetune.md defines them."""


class Standard(nn.Module):
    """x -> (x - mean) / s with the mean vector and one scale s of the training rows.

    Contrastive embeddings of the two modalities lie in two narrow cones (Liang et al. 2022, arXiv
    2203.02053); without their means the products of elements carry signs. One scale for all elements keeps
    angles, so an inner product stays one.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, x: Tensor) -> None:
        """Take mean and scale from rows [n, width]; without rows nothing changes."""
        if len(x):
            self.mean.copy_(x.mean(0))
            self.scale.copy_((x - self.mean).square().mean().sqrt().clamp_min(1e-6))

    def forward(self, x: Tensor) -> Tensor:
        """Standardised x, the same shape."""
        return (x - self.mean) / self.scale


class Head(nn.Module):
    """Base of the heads: standardises embeddings and puts null vectors where a modality is missing."""

    reads_tokens: ClassVar[bool] = False

    def __init__(self, widths: Mapping[str, int]) -> None:
        """``widths``: the modalities that the head reads, with their embedding widths."""
        super().__init__()
        self.modalities = tuple(widths)
        self.standard = nn.ModuleDict({k: Standard(width) for k, width in widths.items()})
        self.null = nn.ParameterDict({k: nn.Parameter(torch.zeros(width)) for k, width in widths.items()})

    def fit_standard(self, features: Features, present: Present) -> None:
        """Take means and scales from the training rows."""
        for k in self.modalities:
            standard = self.standard[k]
            assert isinstance(standard, Standard)
            standard.fit(features[k][present[k]])

    def filled(self, features: Features, present: Present) -> list[Tensor]:
        """z~_k [b, D] per modality; zeros for a missing one where the head has no null vectors."""
        out: list[Tensor] = []
        for k in self.modalities:
            z = self.standard[k](features[k])
            null = self.null[k] if k in self.null else z.new_zeros(())
            out.append(torch.where(present[k][:, None], z, null))
        return out

    def masks(self, present: Present) -> Tensor:
        """m, bool [b, M]."""
        return torch.stack([present[k] for k in self.modalities], dim=1)

    def parts(self, features: Features, present: Present) -> list[tuple[Tensor, Tensor]]:
        """Logits [b, C] that have a loss of their own, each with the rows bool [b] that count for it."""
        return [(self(features, present), torch.ones_like(present[self.modalities[0]]))]


def _mlp(inputs: int, width: int, outputs: int, dropout: float) -> nn.Sequential:
    """One hidden layer, or for width 0 a linear map."""
    if width == 0:
        return nn.Sequential(nn.Dropout(dropout), nn.Linear(inputs, outputs))
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Dropout(dropout), nn.Linear(width, outputs))


class Single(Head):
    """One modality alone: y = f(z~), f linear or with one hidden layer. The baseline of every fusion."""

    def __init__(self, modality: str, width: int, outputs: int, config: HeadConfig) -> None:
        super().__init__({modality: width})
        self.classify = _mlp(width, config.width or 0, outputs, config.dropout or 0.0)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        return self.classify(self.filled(features, present)[0])


class Similarity(Head):
    """y = a * (cos(z_i, z_t) - mean) / s + c, two learned numbers on the contrastive model's own score (CLIP,
    arXiv 2103.00020); a learned constant where a modality is missing."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__({})
        self.modalities = tuple(widths)
        self.cosine = Standard(1)
        self.weight = nn.Parameter(torch.ones(1))
        self.bias = nn.Parameter(torch.zeros(1))
        self.missing = nn.Parameter(torch.zeros(1))

    def _cosine(self, features: Features, present: Present) -> Tensor:
        first, second = (torch.where(present[k][:, None], features[k], 0.0) for k in self.modalities)
        return F.cosine_similarity(first, second, dim=-1)[:, None]

    def fit_standard(self, features: Features, present: Present) -> None:
        """Take mean and scale of the cosine from rows that have both."""
        self.cosine.fit(self._cosine(features, present)[self.masks(present).all(1)])

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, 1]."""
        score = self.weight * self.cosine(self._cosine(features, present)) + self.bias
        return torch.where(self.masks(present).all(1)[:, None], score, self.missing)


class Concat(Head):
    """y = W_2 gelu(W_1 x + b), x = [z~_i; z~_t] (ConcatBERT, Kiela et al. 2020, arXiv 2005.04790).

    With interactions x = [z~_i; z~_t; |z~_i - z~_t|; z~_i * z~_t] (InferSent, Conneau et al. 2017, arXiv
    1705.02364). Width 0 makes it linear in x: without interactions it then cannot tell whether the two
    agree.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        self.interactions = bool(config.interactions)
        inputs = sum(widths.values()) + (2 * next(iter(widths.values())) if self.interactions else 0)
        self.classify = _mlp(inputs, config.width or 0, outputs, config.dropout or 0.0)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        z = self.filled(features, present)
        if self.interactions:
            z = [*z, (z[0] - z[1]).abs(), z[0] * z[1]]
        return self.classify(torch.cat(z, dim=1))


class WeightedSum(Head):
    """y = W sum_k w_k z~_k over the modalities that are present; w equal, or softmax of learned numbers.

    Linear in each modality, so it adds evidence and cannot compare.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        self.null = nn.ParameterDict()  # what is missing has no weight
        self.learned = config.weights == "learned"
        if self.learned:
            self.scores = nn.Parameter(torch.zeros(len(widths)))
        self.classify = _mlp(next(iter(widths.values())), 0, outputs, config.dropout or 0.0)

    def weights(self, present: Present) -> Tensor:
        """w [b, M], 0 where a modality is missing; rows sum to 1."""
        mask = self.masks(present)
        scores = self.scores if self.learned else torch.zeros(mask.shape[1], device=mask.device)
        return _masked_softmax(scores.expand(mask.shape), mask)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        z = torch.stack(self.filled(features, present), dim=1)
        return self.classify((self.weights(present)[..., None] * z).sum(1))


class Gated(Head):
    """h_k = tanh(W_k z~_k), g = softmax_k(G_k [z~_1; ..; z~_M]), y = W sum_k g_k * h_k (GMU, Arevalo et al.
    2017, arXiv 1702.01992; for two modalities the softmax is its sigmoid).

    g is [b, M, H] (``gate: element``, the paper's) or [b, M, 1] (``gate: modality``); missing modalities get
    no weight and enter the gate as zeros.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        assert config.width
        self.null = nn.ParameterDict()  # what is missing has no weight; of two, the other's gate is then 1
        self.project = nn.ModuleList([nn.Linear(w, config.width) for w in widths.values()])
        self.gate_width = config.width if config.gate == "element" else 1
        self.gate = nn.Linear(sum(widths.values()), len(widths) * self.gate_width)
        self.classify = _mlp(config.width, 0, outputs, config.dropout or 0.0)

    def gates(self, z: list[Tensor], present: Present) -> Tensor:
        """g [b, M, H] or [b, M, 1], 0 where a modality is missing; it sums to 1 over M."""
        scores = self.gate(torch.cat(z, dim=1)).unflatten(1, (len(self.modalities), self.gate_width))
        return _masked_softmax(scores, self.masks(present)[..., None])

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        z = self.filled(features, present)
        h = torch.stack([torch.tanh(w(x)) for w, x in zip(self.project, z, strict=True)], dim=1)
        return self.classify((self.gates(z, present) * h).sum(1))


class Bilinear(Head):
    """y = P (f_i * f_t), f_k = U_k z_k + c_k in R^r, or a learned vector where k is missing: low-rank
    bilinear pooling (MLB, Kim et al. 2017, arXiv 1610.04325; LMF, Liu et al. 2018, arXiv 1806.00064).

    It starts at the inner product of the embeddings: U_k is the identity (for r < D the same orthonormal rows
    for all k), c_k = 0 and P = 1 / sqrt(r). With more than one output, c_k = 1 and P is random, so that each
    modality also counts by itself from the start: (1 + u)(1 + v) = 1 + u + v + uv.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        width = max(widths.values())
        rank = config.rank or width
        self.null = nn.ParameterDict({k: nn.Parameter(torch.ones(rank)) for k in widths})
        self.factors = nn.ModuleDict({k: nn.Linear(w, rank) for k, w in widths.items()})
        self.dropout = nn.Dropout(config.dropout or 0.0)
        self.classify = nn.Linear(rank, outputs)
        basis = nn.init.orthogonal_(torch.empty(rank, width))
        for factor in self.factors.values():
            assert isinstance(factor, nn.Linear)
            nn.init.eye_(factor.weight) if rank == width else factor.weight.data.copy_(
                basis[:, : factor.in_features]
            )
            nn.init.constant_(factor.bias, 0.0 if outputs == 1 else 1.0)
        if outputs == 1:
            nn.init.constant_(self.classify.weight, rank**-0.5)
            nn.init.zeros_(self.classify.bias)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        product: Tensor | None = None
        for k in self.modalities:
            factor = self.factors[k](self.standard[k](features[k]))
            factor = torch.where(present[k][:, None], factor, self.null[k])
            product = factor if product is None else product * factor
        assert product is not None
        return self.classify(self.dropout(product))


class Late(Head):
    """p = sum_k w_k p_k over present modalities, p_k the probabilities of a linear classifier of modality k
    (Kittler et al. 1998); w equal (``rule: mean``) or a softmax of learned numbers.

    Each classifier learns from its own loss, so with one modality missing the result is the other's own
    prediction. Returns log p (binary: the log odds), which losses and softmax read as logits.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        self.null = nn.ParameterDict()
        self.classify = nn.ModuleDict({k: nn.Linear(w, outputs) for k, w in widths.items()})
        self.learned = config.rule == "learned"
        if self.learned:
            self.scores = nn.Parameter(torch.zeros(len(widths)))

    def single(self, features: Features, present: Present, k: str) -> Tensor:
        """Logits [b, C] of one modality; zeros where it is missing."""
        z = torch.where(present[k][:, None], self.standard[k](features[k]), 0.0)
        return torch.where(present[k][:, None], self.classify[k](z), 0.0)

    def mixture(self, logits: list[Tensor], present: Present) -> Tensor:
        """log p [b, C], or for one output the log odds [b, 1]."""
        mask = self.masks(present)
        scores = self.scores if self.learned else torch.zeros(mask.shape[1], device=mask.device)
        log_w = _masked_softmax(scores.expand(mask.shape), mask).clamp_min(1e-30).log()
        stacked = torch.stack(logits, dim=1)  # [b, M, C]
        if stacked.shape[2] > 1:
            return torch.logsumexp(log_w[..., None] + stacked.log_softmax(-1), dim=1)
        yes = torch.logsumexp(log_w[..., None] + F.logsigmoid(stacked), dim=1)
        return yes - torch.logsumexp(log_w[..., None] + F.logsigmoid(-stacked), dim=1)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Log probabilities [b, C] or log odds [b, 1]."""
        return self.mixture([self.single(features, present, k) for k in self.modalities], present)

    def parts(self, features: Features, present: Present) -> list[tuple[Tensor, Tensor]]:
        """Each classifier on the rows that have its modality, and for learned weights the mixture of the
        classifiers as they stand."""
        logits = [self.single(features, present, k) for k in self.modalities]
        parts = [(own, present[k]) for own, k in zip(logits, self.modalities, strict=True)]
        if self.learned:
            mixed = self.mixture([own.detach() for own in logits], present)
            parts.append((mixed, torch.ones_like(present[self.modalities[0]])))
        return parts


def _masked_softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """Softmax over dim 1 of scores [b, M, ..] where mask is True, 0 elsewhere; every row has a True."""
    return torch.where(mask, scores, float("-inf")).softmax(dim=1)


def build_head(
    config: HeadConfig, widths: Mapping[str, int], outputs: int, token_widths: Mapping[str, int] | None = None
) -> Head:
    """The head of a config. ``widths``: embedding width per modality, in a fixed order; ``token_widths``:
    token width per modality, for ``cross``; ``outputs``: 1 for binary tasks, else the number of classes."""
    match config.op:
        case "image" | "text":
            return Single(config.op, widths[config.op], outputs, config)
        case "similarity":
            assert outputs == 1, "similarity has one output"
            return Similarity(widths)
        case "concat":
            return Concat(widths, outputs, config)
        case "weighted_sum":
            return WeightedSum(widths, outputs, config)
        case "gated":
            return Gated(widths, outputs, config)
        case "bilinear":
            return Bilinear(widths, outputs, config)
        case "late":
            return Late(widths, outputs, config)
        case "cross":
            from .cross import Cross

            assert token_widths is not None
            return Cross(token_widths, outputs, config)


assert set(SINGLE) < set(STAGES)
