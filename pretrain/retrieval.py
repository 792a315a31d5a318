"""Image-text retrieval: recall at k as a hit rate, both ways, with exact chance levels and grouped intervals.

A gallery is a list of images and the list of its *unique* captions. Image to text: a hit if the image's own
caption is among the k best captions. Text to image: a hit if any image with that caption is among the k best
images (the R@k of CLIP and CLIP_benchmark; the information-retrieval recall, the share of the relevant items
found, is another number).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.text import canonical_caption
from .statistics import Floats, Ints, Score, bootstrap_means

__all__ = [
    "Positives",
    "best_ranks",
    "hit_chance",
    "ranks_among",
    "retrieval_scores",
    "top_k",
    "unique_captions",
]

Positives = Callable[[slice], Tensor]
"""Some queries to their positives, bool [q, g]."""

KS = (1, 5, 10)
_ELEMENTS = 1 << 20  # similarities held at once: 8 MiB in fp64


def unique_captions(captions: Sequence[str]) -> tuple[Ints, list[str]]:
    """Number of each caption's unique caption, int64 [n], and the unique captions in order of appearance."""
    numbers: dict[str, int] = {}
    ids = np.fromiter(
        (numbers.setdefault(canonical_caption(c), len(numbers)) for c in captions), np.int64, len(captions)
    )
    firsts = np.unique(ids, return_index=True)[1]
    return ids, [captions[int(i)] for i in firsts]


def _similarities(queries: Tensor, gallery: Tensor) -> Tensor:
    """Cosines fp64 [q, g], rounded to 1e-6: what float32 features cannot tell apart ties."""
    return (queries @ gallery.T).round(decimals=6)


def _checked(features: Any, name: str) -> Tensor:
    """Features as fp64 on the CPU; NaN would rank first everywhere and look like a perfect score."""
    tensor = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} hold NaN or infinite values; the checkpoint has diverged")
    return tensor


def best_ranks(queries: Any, gallery: Any, query_labels: Any, gallery_labels: Any) -> Ints:
    """Rank (from 0) of each query's best positive in the whole gallery, int64 [q].

    queries [q, D] and gallery [g, D] are normalised features; a gallery item is a positive if its label
    equals the query's. See ``ranks_among``.
    """
    q_labels, g_labels = torch.as_tensor(query_labels), torch.as_tensor(gallery_labels)
    return ranks_among(queries, gallery, lambda part: q_labels[part, None] == g_labels)


def ranks_among(queries: Any, gallery: Any, positives: Positives) -> Ints:
    """Rank (from 0) of each query's best positive in the whole gallery, int64 [q]; every query has one.

    Ties go to the lower gallery position, so a collapsed model scores as chance, not as perfect. Works in
    chunks and never holds q x g similarities.
    """
    query, items = _checked(queries, "queries"), _checked(gallery, "gallery")
    n = len(items)
    position = torch.arange(n)
    ranks = torch.empty(len(query), dtype=torch.int64)  # filled in place: small tensors kept between large
    # ones would pin the heap, 2 GB of it at 26,000 x 12,000
    step = max(1, _ELEMENTS // max(1, n))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        similar = _similarities(query[part], items)
        positive = positives(part)
        assert bool(positive.any(1).all()), "a query has no positive in the gallery"
        best = similar.masked_fill(~positive, -math.inf).amax(1, keepdim=True)
        tied = similar == best
        where = torch.where(tied & positive, position, n).amin(1, keepdim=True)
        ranks[part] = (similar > best).sum(1) + (tied & (position < where)).sum(1)
    return ranks.numpy()


def top_k(queries: Any, gallery: Any, k: int) -> tuple[Floats, Ints]:
    """The k best gallery items of each query, best first: cosines float64, positions int64, [q, k] each."""
    query, items = _checked(queries, "queries"), _checked(gallery, "gallery")
    k = min(k, len(items))
    values = torch.empty(len(query), k, dtype=torch.float64)
    indices = torch.empty(len(query), k, dtype=torch.int64)
    step = max(1, _ELEMENTS // max(1, len(items)))
    for start in range(0, len(query), step):
        part = slice(start, start + step)
        similar, index = _similarities(query[part], items).sort(dim=1, descending=True, stable=True)
        values[part], indices[part] = similar[:, :k], index[:, :k]
    return values.numpy(), indices.numpy()


def hit_chance(n: int, positives: Any, k: int) -> Floats:
    """Probability that a random order of n items has one of the query's m positives among its first k.

    1 - C(n - m, k) / C(n, k), exact to rounding, for each entry m of ``positives``: float64, same shape.
    """
    m = np.asarray(positives, dtype=np.int64)
    miss = np.ones(m.shape)
    for j in range(min(k, n)):  # item j+1 misses too: n - m - j of the n - j items left
        miss *= np.maximum(n - m - j, 0) / (n - j)
    return 1 - miss


def _direction(
    queries: Any, gallery: Any, q_labels: Ints, g_labels: Ints, groups: Any, samples: int, seed: int
) -> dict[str, Score]:
    ranks = best_ranks(queries, gallery, q_labels, g_labels)
    hits = ranks[:, None] < np.array(KS)
    intervals = bootstrap_means(hits, groups, samples=samples, seed=seed)
    counts = np.bincount(g_labels, minlength=int(q_labels.max()) + 1)[q_labels]
    return {
        f"R@{k}": Score(i.value, i.low, i.high, float(hit_chance(len(g_labels), counts, k).mean()))
        for k, i in zip(KS, intervals, strict=True)
    }


def retrieval_scores(
    image_features: Any,
    text_features: Any,
    caption_ids: Ints,
    *,
    concepts: Any = None,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """R@1, R@5 and R@10 both ways.

    image_features [n, D]; text_features [c, D], one row per unique caption; caption_ids int64 [n], each
    image's caption (see ``unique_captions``); concepts [n], labels of what belongs together in the bootstrap
    (default: the caption). A caption of images of several concepts counts to that of its first image.

    Returns ``{"image_to_text": {"R@1": Score, ..}, "text_to_image": {..}, "n_images": n, "n_captions": c}``.
    """
    n_captions = len(text_features)
    labels = np.asarray(caption_ids, dtype=np.int64)
    assert len(image_features) == len(labels)
    assert n_captions == int(labels.max(initial=-1)) + 1
    every = np.arange(n_captions, dtype=np.int64)
    groups = labels if concepts is None else np.asarray(concepts)
    first = np.unique(labels, return_index=True)[1]
    return {
        "image_to_text": _direction(image_features, text_features, labels, every, groups, samples, seed),
        "text_to_image": _direction(
            text_features, image_features, every, labels, groups[first], samples, seed
        ),
        "n_images": len(labels),
        "n_captions": n_captions,
    }
