"""What the encoders still know of what they were pretrained for: a guard against forgetting.

Measured on the inner rows before and after the encoders are trained, never on test rows.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...pretrain.model import LoadedModel
from ...pretrain.retrieval import best_ranks
from ...pretrain.zero_shot import class_features
from ..config import AdaptConfig
from ..encoders.features import FeatureRows
from ..encoders.live import LiveRows, encode_rows
from ..tasks.task import Task
from .encoders import class_texts

__all__ = ["mean_retention", "retention", "told"]

KS = (1, 5, 10)


def retention(rows: LiveRows, targets: Tensor, task: Task, adapt: AdaptConfig) -> dict[str, Any] | None:
    """``measure``, ``n`` and ``value`` of the encoders on these rows; None where nothing can be measured,
    as of encoders without a common space.

    ``mean recall``: the mean of R@1, R@5 and R@10, both ways, over the n rows that have picture and text; of
    binary tasks the positive ones, as the others may be pairs that do not match. Where there are no pairs,
    ``zero-shot accuracy`` of the n pictures with the texts of their classes.
    """
    if not isinstance(rows.model, LoadedModel):
        return None
    features = encode_rows(rows, rows.modalities)  # those of the towers
    targets = targets.cpu()
    if {"image", "text"} <= set(rows.modalities):
        both = (features.index["image"] >= 0) & (features.index["text"] >= 0)
        if task.type == "binary":
            both &= targets == 1
        return _recall(features, both.nonzero()[:, 0])
    has_texts = {"binary": adapt.class_prompts is not None, "multiclass": True}
    if "image" not in rows.modalities or not has_texts.get(task.type, False):
        return None
    there = (features.index["image"] >= 0).nonzero()[:, 0]
    if len(there) == 0:
        return None
    texts = class_features(class_texts(adapt, task.classes), rows.model.encode_captions)[1]
    images = features.tables["image"][features.index["image"][there]]
    hits = (images.double() @ texts.double().T).argmax(1) == targets[there]
    return {"measure": "zero-shot accuracy", "n": len(there), "value": float(hits.double().mean())}


def _recall(features: FeatureRows, pairs: Tensor) -> dict[str, Any] | None:
    images = features.tables["image"][features.index["image"][pairs]]
    numbers, ids = features.index["text"][pairs].unique(return_inverse=True)
    if len(numbers) < 2:
        return None
    captions, every = features.tables["text"][numbers], torch.arange(len(numbers))
    ranks = [best_ranks(images, captions, ids, every), best_ranks(captions, images, every, ids)]
    value = sum(float((r < k).mean()) for r in ranks for k in KS) / (len(ranks) * len(KS))
    return {"measure": "mean recall", "n": len(pairs), "value": value}


def mean_retention(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The mean over the seeds of head.json; None where nothing was measured."""
    found = [seed["retention"] for seed in seeds if "retention" in seed]
    mean = {k: sum(one[k] for one in found) / len(found) for k in ("before", "after") if found}
    return found[0] | mean if found else None


def told(document: Mapping[str, Any]) -> str:
    """What training did to the encoders' own abilities, for the line printed of a head."""
    found = document["retention"]
    if found is None:
        return ""
    change = f"{found['before']:.3f} before, {found['after']:.3f} after"
    return f"; {found['measure']} of {found['n']} inner rows {change}"
