"""The encoders tuned as they were pretrained: rows against texts of their classes (FLYP, Goyal et al. 2022,
arXiv 2212.00638).

In a batch of rows of classes y each row draws one of its class's texts, t. For each modality k that the head
reads, the loss is CLIP's symmetric InfoNCE between the rows' embeddings z_k and the embeddings of t, both by
the encoders in training; the losses of the modalities are averaged. So a picture meets the texts of the
classes, and a row's own text meets them too: picture and text of a row are not contrasted with each other.
Every row and text of one class match (the target is uniform over them): as negatives, texts of one class
that differ would push its rows apart. The temperature stays as it was.

Epochs are judged by zero-shot classification of the inner rows: softmax over classes of the scaled cosine of
a row (the mean over its modalities) and the mean of the class's texts.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ...pretrain import distributed
from ...pretrain.contrastive import contrastive_loss
from ...pretrain.model import LoadedModel
from ...pretrain.zero_shot import Prompts
from ..config import ENCODED
from ..encoders.live import encode_split
from ..fusion.operators import Head
from .training import Training

__all__ = ["ClassContrast", "ClassTexts"]


class ClassTexts(Head):
    """Logits of classes by the cosine with their texts; it has no parameters of its own."""

    def __init__(
        self,
        model: LoadedModel,
        prompts: Prompts,
        modalities: tuple[str, ...],
        outputs: int,
        *,
        together: bool = False,
    ) -> None:
        """``together``: see ``LiveRows``."""
        super().__init__({})
        self.together = together
        self.modalities = tuple(k for k in modalities if k in ENCODED)  # others have no texts beside them
        self.model, self.outputs = model, outputs
        self.texts = [text for texts in prompts.values() for text in texts]
        self.counts = torch.tensor([len(texts) for texts in prompts.values()])
        self.first = F.pad(self.counts.cumsum(0), (1, 0))[:-1]
        self._vectors: Tensor | None = None

    def train(self, mode: bool = True) -> "ClassTexts":
        """Forget the classes' vectors: the encoders may have moved."""
        self._vectors = None
        return super().train(mode)

    def encode(self, numbers: Tensor) -> Tensor:
        """Normalised features [n, D] of texts by number, with gradients where those are enabled."""
        distinct, back = numbers.unique(return_inverse=True)
        texts = [self.texts[i] for i in distinct.tolist()]
        root, pack = self.model.model, self.model.tokenizer.pack
        empty = torch.zeros(0, self.model.embed_dim, device=self.model.device)
        features = encode_split(lambda part: root.encode_text(*pack(part)), texts, empty, self.together)
        return features[back.to(self.model.device)]

    def draw(self, targets: Tensor) -> Tensor:
        """Number of a random text of each row's class, int64 [n] on the CPU."""
        count = self.counts[targets.cpu()]
        return self.first[targets.cpu()] + (torch.rand(len(count)) * count).long().clamp(max=count - 1)

    def vectors(self) -> Tensor:
        """Normalised means of the classes' texts [C, D]."""
        if self._vectors is None:
            features = self.encode(torch.arange(len(self.texts)))
            owner = torch.arange(len(self.counts)).repeat_interleave(self.counts).to(features.device)
            sums = features.new_zeros(len(self.counts), features.shape[1]).index_add(0, owner, features)
            self._vectors = F.normalize(sums, dim=-1)
        return self._vectors

    def forward(self, features: dict[str, Tensor], present: dict[str, Tensor]) -> Tensor:
        """Logits [b, C], or for binary tasks [b, 1], of normalised features; in eval mode. A row of which the
        encoders see nothing is as near to every class."""
        count = self.masks(present).float().sum(1, keepdim=True).clamp_min(1)
        z = sum(features[k] * present[k][:, None] for k in self.modalities) / count
        logits = self.model.logit_scale * z @ self.vectors().T
        return logits if self.outputs > 1 else logits[:, 1:] - logits[:, :1]


class ClassContrast(Training):
    """The loop of ``Training`` with the loss above."""

    head: ClassTexts

    def loss(
        self,
        features: dict[str, Tensor],
        present: dict[str, Tensor],
        targets: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Mean over the modalities of the contrastive loss of a batch."""
        texts = self.head.encode(self.head.draw(targets))
        losses = [
            contrastive_loss(
                features[k],
                texts,
                torch.tensor(self.head.model.logit_scale),
                valid=present[k],
                caption_hash=targets,
                weight=weights,
                duplicates="positives",
                label_smoothing=self.adapt.label_smoothing,
                group=distributed.alone(),  # this process has the whole batch
            )
            for k in self.head.modalities
            if bool(present[k].any())
        ]
        return torch.stack(losses).mean() if losses else 0.0 * texts.sum()
