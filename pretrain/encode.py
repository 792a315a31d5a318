"""Features of whole shard sets, and the quick retrieval score that training prints."""

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from open_clip.model import CustomTextCLIP
from torch import Tensor, nn

from ..data.eval_batches import eval_batches
from ..data.shards import ShardSet
from ..data.text import Tokenizer
from .model import ContrastiveModel, LoadedModel
from .retrieval import retrieval_scores, unique_captions
from .statistics import Ints

__all__ = ["Encoded", "encode_captions", "encode_images", "evaluating", "quick_retrieval"]

ImageEncoder = Callable[[Tensor], Tensor]
TextEncoder = Callable[[Sequence[str]], Tensor]


@dataclass(frozen=True)
class Encoded:
    """Images of one shard set in its order: features float32 [n, D] and what stands beside each image."""

    features: Tensor
    captions: list[str]
    metas: list[dict[str, Any]]
    keys: list[str]
    sample_ids: Ints

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, rows: Sequence[int] | Ints) -> "Encoded":
        """The given rows, in the given order."""
        index = [int(row) for row in rows]
        return Encoded(
            self.features[index],
            [self.captions[i] for i in index],
            [self.metas[i] for i in index],
            [self.keys[i] for i in index],
            self.sample_ids[index],
        )


def encode_images(
    encode: ImageEncoder,
    shards: ShardSet,
    *,
    image_size: int,
    batch_size: int = 256,
    sample_ids: Any = None,
    advance: Callable[[int], None] | None = None,
) -> Encoded:
    """Encode all samples of a shard set, or ``sample_ids``, in order; ``advance`` is told of each batch's
    size."""
    features: list[Tensor] = []
    captions: list[str] = []
    metas: list[dict[str, Any]] = []
    keys: list[str] = []
    ids: list[Ints] = []
    for batch in eval_batches(shards, image_size=image_size, batch_size=batch_size, sample_ids=sample_ids):
        features.append(encode(batch.image).float().cpu())
        captions += batch.captions
        metas += batch.metas
        keys += batch.keys
        ids.append(np.asarray(batch.sample_ids, dtype=np.int64))
        if advance is not None:
            advance(len(batch.keys))
    stacked = torch.cat(features) if features else torch.zeros(0, 0)
    return Encoded(stacked, captions, metas, keys, np.concatenate([np.zeros(0, np.int64), *ids]))


def encode_captions(encode: TextEncoder, captions: Sequence[str]) -> dict[str, Tensor]:
    """Normalised features of each distinct caption string."""
    distinct = list(dict.fromkeys(captions))
    return dict(zip(distinct, encode(distinct), strict=True)) if distinct else {}


@contextmanager
def evaluating(model: nn.Module) -> Generator[None]:
    """Eval mode inside; afterwards every submodule is in the mode it was in (frozen ones stay frozen)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def quick_retrieval(
    model: Any,
    shards: ShardSet,
    tokenizer: Tokenizer,
    image_size: int,
    device: str | torch.device,
    *,
    max_images: int = 2000,
    batch_size: int = 256,
    look: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """Retrieval on held-out shards while training: ``{"val/image_to_text_R@1": ..,
    "val/image_to_text_R@1_chance": ..}`` for R@1, R@5, R@10 both ways.

    ``model``: a ``ContrastiveModel`` (also inside DDP), an open_clip model or a ``LoadedModel``. At most
    ``max_images`` images, evenly spaced and the same every time; fp32, no gradients, no random numbers, and
    no collective calls: one rank may do it alone. ``look`` is called at every batch, and may raise. Raises
    ValueError if the features are not finite.
    """
    if isinstance(model, LoadedModel):
        model = model.model
    module: nn.Module = getattr(model, "module", model)
    if isinstance(module, ContrastiveModel):
        root = module
    else:  # one of open_clip's models, whatever wraps it
        root = ContrastiveModel(cast(CustomTextCLIP, module)).to(device)
    n = len(shards)
    chosen = np.unique(np.linspace(0, n - 1, min(n, max_images)).round().astype(np.int64))

    def encode_text(captions: Sequence[str]) -> Tensor:
        parts: list[Tensor] = []
        for start in range(0, len(captions), 1024):
            look()
            token_ids, seq_lens = tokenizer.pack(captions[start : start + 1024])
            parts.append(root.encode_text(token_ids.to(device), seq_lens.to(device)).float().cpu())
        return torch.cat(parts)

    with evaluating(root), torch.inference_mode(), torch.autocast(torch.device(device).type, enabled=False):
        images = encode_images(
            root.encode_image,
            shards,
            image_size=image_size,
            batch_size=batch_size,
            sample_ids=chosen,
            advance=lambda _: look(),
        )
        ids, captions = unique_captions(images.captions)
        scores = retrieval_scores(images.features, encode_text(captions), ids, samples=1)
    out: dict[str, float] = {}
    for direction in ("image_to_text", "text_to_image"):
        for name, got in scores[direction].items():
            out[f"val/{direction}_{name}"] = got.value
            out[f"val/{direction}_{name}_chance"] = got.chance
    return out
