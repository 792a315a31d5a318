"""Heads on rows whose modalities are hidden in several ways; each row's features are computed once."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..fusion.head import Features, Present, masked_softmax
from ..fusion.operators import Gated, Head, Late, WeightedSum
from ..fusion.ordinal import Ordinal
from ..fusion.pooling import Pooled
from .fit import Source
from .training import eval_chunks

__all__ = ["Shown", "has_weights", "logits_under", "weights_of"]

Shown = Mapping[str, NDArray[np.bool_]]
"""Bool [n] per modality: rows in which it may be seen. A modality without an entry may be seen in all."""


@torch.no_grad()
def logits_under(head: Head, rows: Source, shown: Sequence[Shown], *, batch_size: int) -> list[Tensor]:
    """Logits float32 [n, C] for every entry of ``shown``, on the CPU, in eval mode.

    What is hidden is told by presence alone: heads read nothing of a slot that is not present.
    """
    head.eval()
    parts: list[list[Tensor]] = [[] for _ in shown]
    for chunk in eval_chunks(head, len(rows), batch_size):
        features, present = rows.batch(chunk, tokens=head.reads_tokens)
        for found, seen in zip(parts, shown, strict=True):
            found.append(head(features, _hidden(present, seen, chunk)).float().cpu())
    return [torch.cat(found) for found in parts]


def _hidden(present: Present, shown: Shown, chunk: Tensor) -> dict[str, Tensor]:
    numbers = chunk.numpy()
    return {
        k: mask & torch.from_numpy(shown[k][numbers]).to(mask.device) if k in shown else mask
        for k, mask in present.items()
    }


def has_weights(head: Head) -> bool:
    """Whether a head weighs its modalities; see ``weights_of``."""
    if isinstance(head, Ordinal | Pooled):
        return has_weights(head.inner)
    return isinstance(head, Gated | WeightedSum) or (isinstance(head, Late) and head.learned)


@torch.no_grad()
def weights_of(head: Head, rows: Source, *, batch_size: int) -> NDArray[np.float64]:
    """Weights [n, M] of the head's modalities, 0 where one is missing, else summing to 1: gates (their mean
    over hidden units) of ``gated``, weights of ``weighted_sum`` and of ``late`` with learned ones. Only for
    heads that have some."""
    head.eval()
    chunks = torch.arange(len(rows)).split(batch_size)
    return torch.cat([_weights(head, *rows.batch(chunk)).double().cpu() for chunk in chunks]).numpy()


def _weights(head: Head, features: Features, present: Present) -> Tensor:
    if isinstance(head, Ordinal):
        return _weights(head.inner, features, present)
    if isinstance(head, Pooled):
        return _weights(head.inner, head.pooled(features, present), present)
    if isinstance(head, Gated):
        return head.gates(head.filled(features, present), present).mean(2)
    if isinstance(head, WeightedSum):
        return head.weights(present)
    assert isinstance(head, Late)
    mask = head.masks(present)
    return masked_softmax(head.scores.expand(mask.shape), mask)
