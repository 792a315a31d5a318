"""Late fusion: a classifier per modality, and a rule by which their answers meet.

Each classifier learns from its own loss, so with one modality missing the result is the other's own
prediction, exactly. Heads return log p (where an output is one yes or no: the log odds), which losses and
softmax read as logits.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import HeadConfig, Link
from .head import Features, Head, Present, masked_softmax

__all__ = ["FOLDS", "Late", "Stacking"]

FOLDS = 5


class Late(Head):
    """p_k are the probabilities of a linear classifier of modality k, k runs over those that are present, m
    of them (Kittler et al. 1998, "On combining classifiers").

    ``mean``: p = sum_k p_k / m. ``learned``: p = sum_k w_k p_k, w a softmax of learned numbers. ``product``:
    p ~ prod_k p_k^(1/m), the mean of the logits. ``vote``: the class that most classifiers say, of equals the
    one with the greatest mean p; p is the mean of the p_k that said so. Numbers instead of probabilities
    (``link`` identity) are averaged as they are.
    """

    def __init__(
        self, widths: Mapping[str, int], outputs: int, config: HeadConfig, link: Link | None = None
    ) -> None:
        """``link``: how logits become answers; by default softmax, or sigmoid of a single output."""
        super().__init__(widths)
        self.null = nn.ParameterDict()
        self.classify = nn.ModuleDict({k: nn.Linear(w, outputs) for k, w in widths.items()})
        self.rule = config.rule
        self.link = link or ("softmax" if outputs > 1 else "sigmoid")
        self.learned = config.rule == "learned"
        if self.learned:
            self.scores = nn.Parameter(torch.zeros(len(widths)))

    def single(self, features: Features, present: Present, k: str) -> Tensor:
        """Logits [b, C] of one modality; zeros where it is missing."""
        z = torch.where(present[k][:, None], self.standard[k](features[k]), 0.0)
        return torch.where(present[k][:, None], self.classify[k](z), 0.0)

    def mixture(self, logits: list[Tensor], present: Present) -> Tensor:
        """log p [b, C], log odds [b, C] or numbers [b, C] of the modalities' logits."""
        mask = self.masks(present)
        mask = mask | ~mask.any(1, keepdim=True)  # where nothing is there, all say nothing
        stacked = torch.stack(logits, dim=1)  # [b, M, C]
        scores = self.scores if self.learned else stacked.new_zeros(mask.shape[1])
        weights = masked_softmax(scores.expand(mask.shape), mask)[..., None]
        if self.link == "identity":
            return (weights * stacked).sum(1)
        log_p = self._log_p(stacked)  # [b, M, K, answers]
        if self.rule == "product":
            return self._logits((weights[..., None] * log_p).sum(1))
        if self.rule == "vote":
            return self._logits(_mean(log_p, _winners(log_p, mask)))
        return self._logits(_mean(log_p, weights))

    def _log_p(self, logits: Tensor) -> Tensor:
        """log p [.., K, answers] of logits [.., C]: one question with C answers, or C with yes and no."""
        if self.link == "softmax":
            return logits.log_softmax(-1)[..., None, :]
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)

    def _logits(self, log_p: Tensor) -> Tensor:
        """The inverse: [.., C] of [.., K, answers]."""
        if self.link == "softmax":
            return log_p[..., 0, :].log_softmax(-1)
        return log_p[..., 1] - log_p[..., 0]

    def forward(self, features: Features, present: Present) -> Tensor:
        """Log probabilities [b, C] or log odds [b, C]."""
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


def _mean(log_p: Tensor, weights: Tensor) -> Tensor:
    """log sum_k w_k p_k [b, K, answers] of log p [b, M, K, answers] and w [b, M, 1] or [b, M, K]."""
    return torch.logsumexp(weights.clamp_min(1e-30).log()[..., None] + log_p, dim=1)


def _greatest(scores: Tensor) -> Tensor:
    """Index of the greatest of the last dim; of equals the first, of two answers the second, as a
    prediction is made of probabilities."""
    if scores.shape[-1] == 2:
        return (scores[..., 1] >= scores[..., 0]).long()
    return scores.argmax(-1)


def _winners(log_p: Tensor, mask: Tensor) -> Tensor:
    """Equal weights [b, M, K] of the classifiers that say what wins the vote."""
    said = _greatest(log_p)  # [b, M, K]
    there = mask[..., None, None].to(log_p.dtype)
    votes = (F.one_hot(said, log_p.shape[-1]) * there).sum(1)
    mean = (log_p.detach().exp() * there).sum(1) / there.sum(1)
    winner = _greatest(votes + mean / 2)  # the mean is at most 1: it decides only between equals
    voted = (said == winner[:, None]) & mask[..., None]
    return masked_softmax(torch.zeros_like(log_p[..., 0]), voted)


class Stacking(Late):
    """y = A [x_1; ..; x_M] + a, x_k the classifiers' log p_k or log odds: logistic regression on what
    classifiers say of rows they were not trained on (Wolpert 1992, "Stacked generalization").

    The training rows are cut into five folds, whole groups in one. Beside its classifier each modality has a
    copy per fold that learns from the other folds alone; A learns from the copies' answers to their own
    folds, which no gradient of A changes, and works on the classifiers' answers. A row with one modality
    gets that one's own prediction. A starts at the mean.
    """

    def __init__(
        self, widths: Mapping[str, int], outputs: int, config: HeadConfig, link: Link | None = None
    ) -> None:
        super().__init__(widths, outputs, config, link)
        self.copies = nn.ModuleDict({k: nn.Linear(w, FOLDS * outputs) for k, w in widths.items()})
        self.combine = nn.Linear(len(widths) * outputs, outputs)
        nn.init.zeros_(self.combine.bias)
        with torch.no_grad():
            self.combine.weight.copy_(torch.eye(outputs).repeat(1, len(widths)) / len(widths))

    def mixture(self, logits: list[Tensor], present: Present) -> Tensor:
        """Logits [b, C]; of those who are present, with their weight grown to that of all."""
        mask = self.masks(present)[..., None]
        stacked = torch.stack(logits, dim=1)
        said = stacked.log_softmax(-1) if self.link == "softmax" else stacked
        count = mask.sum(1).clamp_min(1)
        together = self.combine((said * mask).flatten(1) * (len(logits) / count))
        return torch.where(count == 1, (said * mask).sum(1), together)

    def parts(self, features: Features, present: Present) -> list[tuple[Tensor, Tensor]]:
        """Each classifier, each copy on the rows of the other folds, and A on rows with several modalities.

        ``features`` must hold ``group`` int64 [b], the rows' group numbers.
        """
        fold = fold_of(features["group"])
        parts: list[tuple[Tensor, Tensor]] = []
        unseen: list[Tensor] = []
        for k in self.modalities:
            parts.append((self.single(features, present, k), present[k]))
            z = torch.where(present[k][:, None], self.standard[k](features[k]), 0.0)
            copies = self.copies[k](z).unflatten(1, (FOLDS, -1))  # [b, folds, C]
            parts += [(copies[:, f], present[k] & (fold != f)) for f in range(FOLDS)]
            own = copies.detach()[torch.arange(len(fold), device=fold.device), fold]
            unseen.append(torch.where(present[k][:, None], own, 0.0))
        parts.append((self.mixture(unseen, present), self.masks(present).sum(1) > 1))
        return parts


def fold_of(groups: Tensor) -> Tensor:
    """Fold int64 [b] of group numbers int64 [b], by a hash: neighbours may be alike."""
    return (groups * 0x9E3779B1).bitwise_right_shift(16).remainder(FOLDS)
