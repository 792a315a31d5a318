"""Fusion heads: encoder outputs of several modalities to logits. This file has those that read embeddings.

No head attends over pooled vectors: a softmax over one key is 1, and attention over two is a gate with more
parameters. For notation and shapes see ``head.py``.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...configs.errors import UserError
from ..config import ENCODED, STAGES, HeadConfig, Link
from .bottleneck import Bottleneck
from .cross import Cross
from .head import Features, Head, Present, Standard, alike, masked_softmax, mlp
from .joint import Joint
from .late import Late, Stacking
from .merged import Merged
from .ordinal import Ordinal
from .pooling import Pooled
from .projection import Vectors

__all__ = ["STAGES", "Features", "Head", "Late", "Present", "Standard", "build_head", "check_heads"]

MOST_WEIGHTS = 2**26  # of a full bilinear map: with AdamW's moments and gradients 1 GiB


class Single(Head):
    """One modality alone: y = f(z~), f linear or with one hidden layer. The baseline of every fusion."""

    def __init__(self, modality: str, width: int, outputs: int, config: HeadConfig) -> None:
        super().__init__({modality: width})
        self.classify = mlp(width, config.width or 0, outputs, config.dropout or 0.0)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        return self.classify(self.filled(features, present)[0])


class Similarity(Head):
    """y = a * (cos(z_i, z_t) - mean) / s + c, two learned numbers on the contrastive model's own score (CLIP,
    arXiv 2103.00020); a learned constant where a modality is missing. It reads image and text alone."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__({})
        self.modalities = tuple(k for k in widths if k in ENCODED)
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
    """y = W_2 gelu(W_1 x + b), x = [z~_1; ..; z~_M] (ConcatBERT, Kiela et al. 2020, arXiv 2005.04790).

    With interactions x also has |u_j - u_k| and u_j * u_k of every pair (InferSent, Conneau et al. 2017,
    arXiv 1705.02364), u = z~, or where widths differ a linear map of it to the widest. Width 0 makes it
    linear in x: without interactions it then cannot tell whether the two agree.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        self.interactions = bool(config.interactions)
        inputs = sum(widths.values())
        if self.interactions:
            widest, self.project = alike(widths)
            inputs += 2 * widest * (len(widths) * (len(widths) - 1) // 2)
        self.classify = mlp(inputs, config.width or 0, outputs, config.dropout or 0.0)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        x = z = self.filled(features, present)
        if self.interactions:
            named = zip(self.modalities, z, strict=True)
            u = [self.project[k](v) if k in self.project else v for k, v in named]
            x = [*z, *(part for a, b in combinations(u, 2) for part in ((a - b).abs(), a * b))]
        return self.classify(torch.cat(x, dim=1))


class WeightedSum(Head):
    """y = W sum_k w_k u_k over the modalities that are present; w given (alpha and beta), equal, or softmax
    of learned numbers; u = z~, or where widths differ a linear map of it to the widest.

    Linear in each modality, so it adds evidence and cannot compare.
    """

    given: Tensor

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        self.null = nn.ParameterDict()  # what is missing has no weight
        self.learned = config.weights == "learned"
        if self.learned:
            self.scores = nn.Parameter(torch.zeros(len(widths)))
        self.register_buffer("given", _given(config, tuple(widths)), persistent=False)
        widest, self.project = alike(widths)
        self.classify = mlp(widest, 0, outputs, config.dropout or 0.0)

    def weights(self, present: Present) -> Tensor:
        """w [b, M], 0 where a modality is missing; rows sum to 1."""
        mask = self.masks(present)
        if self.learned:
            return masked_softmax(self.scores.expand(mask.shape), mask)
        w = self.given * mask
        return w / w.sum(1, keepdim=True).clamp_min(1e-30)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        named = zip(self.modalities, self.filled(features, present), strict=True)
        u = torch.stack([self.project[k](v) if k in self.project else v for k, v in named], dim=1)
        return self.classify((self.weights(present)[..., None] * u).sum(1))


def _given(config: HeadConfig, modalities: tuple[str, ...]) -> Tensor:
    """Weights [M] of a config, equal where it gives none."""
    if isinstance(config.weights, dict):
        return torch.tensor([config.weights[k] for k in modalities])
    if isinstance(config.weights, tuple):
        assert len(config.weights) == len(modalities)
        return torch.tensor(config.weights)
    return torch.ones(len(modalities))


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
        self.classify = mlp(config.width, 0, outputs, config.dropout or 0.0)

    def gates(self, z: list[Tensor], present: Present) -> Tensor:
        """g [b, M, H] or [b, M, 1], 0 where a modality is missing; it sums to 1 over M."""
        scores = self.gate(torch.cat(z, dim=1)).unflatten(1, (len(self.modalities), self.gate_width))
        return masked_softmax(scores, self.masks(present)[..., None])

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        z = self.filled(features, present)
        h = torch.stack([torch.tanh(w(x)) for w, x in zip(self.project, z, strict=True)], dim=1)
        return self.classify((self.gates(z, present) * h).sum(1))


class Bilinear(Head):
    """y = P (f_1 * .. * f_M), f_k = U_k z_k + c_k in R^r, or a learned vector where k is missing: low-rank
    bilinear pooling (MLB, Kim et al. 2017, arXiv 1610.04325; LMF, Liu et al. 2018, arXiv 1806.00064).

    It starts at the inner product of the embeddings: U_k is the identity (for r < D the same orthonormal rows
    for all k), c_k = 0 and P = 1 / sqrt(r). With more than one output or more than two modalities, c_k = 1
    and P is random, so that each modality also counts by itself from the start: (1 + u)(1 + v) =
    1 + u + v + uv.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        assert config.rank != "full"
        width = max(widths.values())
        rank = config.rank or width
        inner_product = outputs == 1 and len(widths) == 2
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
            nn.init.constant_(factor.bias, 0.0 if inner_product else 1.0)
        if inner_product:
            nn.init.constant_(self.classify.weight, rank**-0.5)
            nn.init.zeros_(self.classify.bias)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        product: Tensor | None = None
        for k in self.modalities:
            there = present[k][:, None]
            z = torch.where(there, self.standard[k](features[k]), 0.0)
            factor = torch.where(there, self.factors[k](z), self.null[k])
            product = factor if product is None else product * factor
        assert product is not None
        return self.classify(self.dropout(product))


class FullBilinear(Head):
    """y_c = <W_c, [z~_1; 1] x .. x [z~_M; 1]>, W_c [D_1 + 1, .., D_M + 1]: the whole outer product, the ones
    keep what each modality says by itself (TFN, Zadeh et al. 2017, arXiv 1707.07250; without them the
    feature interaction matrix of Hate-CLIPper, Kumar and Nandakumar 2022, arXiv 2210.05916).

    W starts at zero, and with one output and two modalities of one width at their inner product. The product
    is contracted one modality after the other and never formed.
    """

    def __init__(self, widths: Mapping[str, int], outputs: int, config: HeadConfig) -> None:
        super().__init__(widths)
        self.order = sorted(widths, key=lambda k: -widths[k])  # the widest first: it leaves least to hold
        self.dropout = nn.Dropout(config.dropout or 0.0)
        weight = torch.zeros(outputs, *(widths[k] + 1 for k in self.order))
        if outputs == 1 and len(widths) == 2 and len(set(widths.values())) == 1:
            width = widths[self.order[0]]
            weight[0, :width, :width] = torch.eye(width) / width**0.5
        self.weight = nn.Parameter(weight)

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, C]."""
        filled = dict(zip(self.modalities, self.filled(features, present), strict=True))
        x = [F.pad(self.dropout(filled[k]), (0, 1), value=1.0) for k in self.order]
        left = torch.einsum("bn,cn...->bc...", x[0], self.weight)
        for factor in x[1:]:
            left = torch.einsum("bcn...,bn->bc...", left, factor)
        return left


def check_heads(
    heads: Mapping[str, HeadConfig], widths: Mapping[str, int], outputs: int, link: Link | None = None
) -> None:
    """Raise UserError, with its name, for a head that the embeddings' widths or the task do not allow."""
    for name, head in heads.items():
        numbers = link == "identity" and head.rule in ("product", "vote")
        if numbers or (link == "cumulative" and head.rule == "vote"):
            raise UserError(f"heads.{name}.rule: {head.rule} is for tasks of classes; give mean or learned")
        size = prod(w + 1 for w in widths.values()) * outputs
        if head.rank == "full" and size > MOST_WEIGHTS:
            shape = " x ".join(str(w + 1) for w in widths.values())
            raise UserError(
                f"heads.{name}.rank: full has {shape} x {outputs} = {size:,} weights, more than "
                f"{MOST_WEIGHTS:,}; give a number, for instance {min(256, *widths.values())}"
            )
        compared = [w for k, w in widths.items() if k in ENCODED]
        if (head.op == "similarity" or link == "vectors") and len(set(compared)) > 1:
            raise UserError(
                f"heads.{name}: similarity compares embeddings of one width, and these have "
                f"{' and '.join(map(str, compared))}; remove it"
            )


def build_head(
    config: HeadConfig,
    widths: Mapping[str, int],
    outputs: int,
    token_widths: Mapping[str, int] | None = None,
    link: Link | None = None,
    pooled: Sequence[str] = (),
) -> Head:
    """The head of a config. ``widths``: embedding width per modality, in a fixed order; ``token_widths``:
    token width of the modalities that have tokens, for heads that read them (of others they read the
    embedding as one token); ``pooled``: modalities of several vectors per row, which a head that reads no
    tokens pools; ``outputs``, ``link``: those of the task, the link by default softmax, or sigmoid
    of a single output. With the cumulative link it is a head of one output against ``outputs`` thresholds."""
    if link == "vectors":
        return Vectors(widths, project=config.op == "similarity")
    if link == "cumulative":
        return Ordinal(build_head(config, widths, 1, token_widths, "identity", pooled), outputs)
    head = _build(config, widths, outputs, token_widths, link)
    several = {k: widths[k] for k in pooled if k in head.modalities and not head.reads_tokens}
    return Pooled(head, several) if several else head


def _build(
    config: HeadConfig,
    widths: Mapping[str, int],
    outputs: int,
    token_widths: Mapping[str, int] | None,
    link: Link | None,
) -> Head:
    widths_of_tokens = {k: (token_widths or {}).get(k, width) for k, width in widths.items()}
    match config.op:
        case "zero_shot":
            raise AssertionError("zero_shot gives vectors alone")
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
            kind = FullBilinear if config.rank == "full" else Bilinear
            return kind(widths, outputs, config)
        case "merged":
            return Merged(widths_of_tokens, outputs, config)
        case "cross":
            return Cross(widths_of_tokens, outputs, config)
        case "bottleneck":
            return Bottleneck(widths_of_tokens, outputs, config)
        case "joint":
            return Joint(tuple(widths), outputs, config)
        case "late":
            late = Stacking if config.rule == "stacking" else Late
            return late(widths, outputs, config, link)
        case modality:
            return Single(modality, widths[modality], outputs, config)
