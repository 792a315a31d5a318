"""Heads of retrieval tasks: a vector of the picture and one of the text, to be compared.

``zero_shot`` takes the encoders' vectors as they are. ``similarity`` adds a linear change per modality,
z' = (z + W z) / |z + W z| with W = 0 at the start, and a temperature that starts at the encoders' own, so
before any step it is zero-shot.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...pretrain.model import LoadedModel
from .head import Features, Head, Present

__all__ = ["Vectors", "start_vectors"]

MAX_LOG_SCALE = math.log(100)  # as CLIP's


class Vectors(Head):
    """A vector of the picture and one of the text [b, 2 D]; see ``vectors``. ``project``: with a linear
    change of each and a temperature that are learned."""

    log_scale: Tensor

    def __init__(self, widths: Mapping[str, int], *, project: bool) -> None:
        super().__init__({})
        assert set(widths) == {"image", "text"}
        assert len(set(widths.values())) == 1, "cosines need vectors of one width"
        self.modalities = ("image", "text")
        self.change = nn.ModuleDict()
        log_scale = torch.tensor(math.log(1 / 0.07))
        if project:
            self.log_scale = nn.Parameter(log_scale)
            for k in self.modalities:
                change = nn.Linear(widths[k], widths[k], bias=False)
                nn.init.zeros_(change.weight)
                self.change[k] = change
        else:
            self.register_buffer("log_scale", log_scale)

    def fit_standard(self, features: Features, present: Present) -> None:
        """Nothing: vectors are compared as they are."""

    def forward(self, features: Features, present: Present) -> Tensor:
        """Logits [b, 2 D]; zeros where a modality is missing."""
        half = (self.log_scale.clamp(max=MAX_LOG_SCALE) / 2).exp()
        made: list[Tensor] = []
        for k in self.modalities:
            z = torch.where(present[k][:, None], features[k], 0.0)
            if k in self.change:
                z = F.normalize(z + self.change[k](z), dim=1)
            made.append(half * z)
        return torch.cat(made, dim=1)


def start_vectors(module: nn.Module, model: LoadedModel) -> None:
    """Give a new head of vectors the encoders' own temperature; other heads are left alone."""
    if isinstance(module, Vectors):
        with torch.no_grad():
            module.log_scale.fill_(min(math.log(model.logit_scale), MAX_LOG_SCALE))
