"""Matching: does this text go with this picture? The table holds pairs that match; the others are made.

A derangement gives every picture of some rows the text of another row that does not belong together with it.
Every picture and every text then stands in one row that matches and in one that does not: classes are
balanced, and either modality alone knows nothing, whatever the table holds. Validation and test rows get
fixed ones, keyed by the seed of folds, repeat and fold; their pictures and texts are all of the same part. In
training each batch is deranged anew, in the order that the head's seed gives, so negatives change from epoch
to epoch and cost no work of the encoders. Hard ones are drawn by the similarity of the embeddings in the
batch, for every picture a text and for every text a picture, as ALBEF does (Li et al. 2021, arXiv
2107.07651); with them a picture or text may stand in more rows of the one kind than of the other.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ...configs.errors import UserError
from ..config import FinetuneConfig
from ..splits.checks import Planned
from ..tables.manifest import Rows, Splits
from ..tasks.metrics import Ints
from .training import Training

__all__ = ["MatchTraining", "derangements", "with_negatives"]

TEMPERATURE = 0.07  # of the similarities that hard negatives are drawn by: CLIP's at its start


def derangements(groups: Ints, count: int, random: np.random.Generator) -> list[Ints]:
    """``count`` permutations of rows of groups int64 [n], none of which keeps a row in its group and no two
    of which agree anywhere; fewer where there are no more.

    Rows are laid out by group in a random order and turned by a random number of places, at least the size of
    the largest group and at most n less that.
    """
    n = len(groups)
    if n == 0:
        return []
    _, number, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    largest = int(sizes.max())
    shuffled = random.permutation(n)
    place = random.permutation(len(sizes))[number[shuffled]]
    order = shuffled[np.argsort(place, kind="stable")]
    shifts = random.permutation(np.arange(largest, n - largest + 1))[:count]
    made: list[Ints] = []
    for shift in shifts:
        permutation = np.empty(n, dtype=np.int64)
        permutation[order] = np.roll(order, -int(shift))
        made.append(permutation)
    return made


def with_negatives(
    config: FinetuneConfig, rows: Rows, parts: Sequence[Planned]
) -> tuple[Rows, list[Planned]]:
    """Rows and parts of a matching task with the pairs that do not match behind the table's own; of other
    tasks as they are.

    A made row has the id ``A + B``, picture, group and weight of row A, text of row B. Raises UserError for
    inner or test rows of which too many belong together.
    """
    task = config.task
    if task.type != "matching":
        return rows, list(parts)
    number = np.unique(rows.groups, return_inverse=True)[1]
    pictures: list[Ints] = [np.arange(len(rows))]
    texts: list[Ints] = [np.arange(len(rows))]
    size = len(rows)
    made: list[Planned] = []
    for place, (fold, splits) in enumerate(parts):
        ends: list[Ints] = []
        for which, part in enumerate((splits.inner, splits.test)):
            seed = config.eval.cv.seed if config.eval.cv is not None else 0
            random = np.random.default_rng([seed, place, which])
            found = derangements(number[part], task.negatives, random)
            if len(part) and len(found) < task.negatives:
                raise UserError(
                    f"{rows.source}: {task.negatives} texts that do not match cannot be found for each of "
                    f"the {len(part)} {('inner', 'test')[which]} rows, as too many of them belong together; "
                    "lower task.negatives or add rows"
                )
            pictures += [part] * len(found)
            texts += [part[permutation] for permutation in found]
            ends.append(np.arange(size, size + len(part) * len(found)))
            size += len(part) * len(found)
        more = Splits(
            splits.train, *(np.append(a, b) for a, b in zip((splits.inner, splits.test), ends, strict=True))
        )
        made.append((fold, more))
    return _paired(rows, np.concatenate(pictures), np.concatenate(texts)), made


def _paired(rows: Rows, pictures: Ints, texts: Ints) -> Rows:
    """Rows with the picture of one row and the text of another."""
    taken, n = rows.take(pictures), len(rows)
    ids = [
        rows.ids[a] if i < n else f"{rows.ids[a]} + {rows.ids[b]}"
        for i, (a, b) in enumerate(zip(pictures, texts, strict=True))
    ]
    targets = [1] * n + [0] * (len(pictures) - n)
    cells = taken.cells | {"text": [rows.cells["text"][b] for b in texts]}
    return replace(taken, ids=ids, cells=cells, targets=targets)


class MatchTraining(Training):
    """The loop of ``Training`` on pairs that match, each batch with as many that do not."""

    def loss(
        self,
        features: dict[str, Tensor],
        present: dict[str, Tensor],
        targets: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """The loss of a batch's pairs and of those made of them, the same weight to both kinds."""
        pictures, texts = self._negatives(features)
        n = len(targets)
        picture_rows = torch.cat([torch.arange(n), pictures]).to(targets.device)
        text_rows = torch.cat([torch.arange(n), texts]).to(targets.device)
        kinds = torch.cat([torch.ones(n), torch.zeros(len(pictures))]).long().to(targets.device)
        shown = {k: v[text_rows if k.startswith("text") else picture_rows] for k, v in features.items()}
        seen = {k: v[text_rows if k == "text" else picture_rows] for k, v in present.items()}
        own = torch.ones(n) if weights is None else weights.float().cpu()
        other = own[pictures] * (n / max(1, len(pictures)))
        counts = (torch.cat([own, other]) * ((n + len(pictures)) / (2 * n))).to(targets.device)
        return super().loss(shown, seen, kinds, counts)

    def _negatives(self, features: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Rows of pictures and of texts that do not belong together, int64 [m] each, on the CPU."""
        groups = features["group"].cpu()
        if self.task.negatives == "hard" and {"image", "text"} <= features.keys():
            return _hard(features, groups)
        seed = int(torch.randint(2**62, (), generator=self.order))
        found = derangements(groups.numpy(), 1, np.random.default_rng(seed))
        if not found:  # more than half of the batch belong together: those that can be paired are
            return _rest(groups, torch.Generator().manual_seed(seed))
        return torch.arange(len(groups)), torch.from_numpy(found[0])


def _hard(features: dict[str, Tensor], groups: Tensor) -> tuple[Tensor, Tensor]:
    """For each picture a text, and for each text a picture, drawn by their similarity."""
    with torch.no_grad():
        similar = (features["image"].float() @ features["text"].float().T).cpu() / TEMPERATURE
    other = groups[:, None] != groups
    chance = torch.where(other, (similar - similar.max()).exp().clamp_min(1e-30), 0.0)
    able = torch.arange(len(groups))[other.any(1)]
    texts = torch.multinomial(chance[able], 1)[:, 0] if len(able) else able
    pictures = torch.multinomial(chance.T[able], 1)[:, 0] if len(able) else able
    return torch.cat([able, pictures]), torch.cat([texts, able])


def _rest(groups: Tensor, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """A random row of another group for each row that has one."""
    other = (groups[:, None] != groups).float()
    able = torch.arange(len(groups))[other.any(1)]
    drawn = torch.multinomial(other[able], 1, generator=random)[:, 0] if len(able) else able
    return able, drawn
