"""Zero-shot classification: an image gets the class whose prompts suit it best.

For a corpus with class labels the prompts of a class are the names of its members in the *training* split,
never captions of the test images. (Bare category names are poor prompts for small models: "food-vegetable" is
no caption that anyone wrote.) For other data, a file of classes and prompts.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from ..configs.errors import UserError
from ..configs.load import StrictModel
from .encode import TextEncoder, encode_captions
from .retrieval import canonical_caption, top_k
from .statistics import Ints, score

__all__ = [
    "ZeroShotConfig",
    "class_features",
    "class_name_prompts",
    "member_prompts",
    "most_probable",
    "read_classes",
    "zero_shot_scores",
]

Prompts = dict[str, list[str]]
_ELEMENTS = 1 << 21  # probabilities held at once: 16 MiB


class ZeroShotConfig(StrictModel):
    """Which labels are predicted from text alone."""

    enabled: bool = True
    galleries: tuple[str, ...] = ("openmoji_no_people", "openmoji", "test_word")
    """Galleries to classify; names that the data does not have are passed over. Ignored if ``classes`` is
    set."""
    targets: tuple[str, ...] = ("group", "subgroup")
    """JSON fields of the samples that hold a class name; samples without one are left out."""
    ensemble: Literal["probability", "embedding"] = "probability"
    """How the training captions of a class become one answer. ``probability``: each is an answer of its own,
    and a class has the summed probability of its captions. ``embedding``: the class is the mean of their
    features, CLIP's way, which suits a few paraphrases but dilutes members that differ. Classes of your own
    file are always means."""
    bare_names: bool = True
    """Report the class names themselves as prompts, apart."""
    classes: str | None = None
    """A YAML or JSON file ``{class: prompt or [prompts]}`` for your own classes, used on every gallery."""
    label: str = "label"
    """With ``classes``: the JSON field that holds the class name."""


def member_prompts(captions: Sequence[str], labels: Sequence[str]) -> Prompts:
    """Distinct captions of each class's members, classes and captions sorted; empty labels are left out."""
    members: dict[str, dict[str, str]] = {}
    for caption, label in zip(captions, labels, strict=True):
        if label:
            members.setdefault(label, {}).setdefault(canonical_caption(caption), caption)
    return {label: [texts[key] for key in sorted(texts)] for label, texts in sorted(members.items())}


def class_name_prompts(labels: Sequence[str]) -> Prompts:
    """The class names as their own prompts: "food-vegetable" becomes "food vegetable"."""
    names = sorted({label for label in labels if label})
    return {name: [" ".join(name.replace("-", " ").replace("_", " ").split())] for name in names}


def read_classes(path: str | Path) -> Prompts:
    """Classes and prompts of a YAML or JSON file; UserError if it is not ``{class: prompt or [prompts]}``."""
    path = Path(path)
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(
            f"zero_shot.classes: {path} cannot be read: {' '.join(str(error).split())}"
        ) from error
    if not isinstance(data, dict) or len(data) < 2:
        raise UserError(f"zero_shot.classes: {path} must map at least two class names to prompts")
    prompts: Prompts = {}
    for name, given in data.items():
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t for t in texts):
            raise UserError(
                f"zero_shot.classes: {path}: class '{name}' needs a prompt or a list of prompts, "
                f"not {given!r}"
            )
        prompts[str(name)] = texts
    return prompts


def class_features(prompts: Mapping[str, Sequence[str]], encode: TextEncoder) -> tuple[list[str], Tensor]:
    """Class names and their features float32 [C, D]: normalised means of normalised prompt features."""
    known = encode_captions(encode, [text for texts in prompts.values() for text in texts])
    rows = [torch.stack([known[text] for text in texts]).mean(0) for texts in prompts.values()]
    return list(prompts), F.normalize(torch.stack(rows).float(), dim=-1)


def most_probable(
    image_features: Tensor, prompts: Mapping[str, Sequence[str]], encode: TextEncoder, logit_scale: float
) -> Ints:
    """Number of the class, in the order of ``prompts``, whose prompts have the largest summed probability
    under the softmax of ``logit_scale`` times cosine over all prompts; int64 [n] for images [n, D].

    Ensembling in probability space (Radford et al., 2021, section 3.1.4 weighs it against embeddings).
    """
    known = encode_captions(encode, [text for texts in prompts.values() for text in texts])
    owner = torch.tensor([i for i, texts in enumerate(prompts.values()) for _ in texts])
    features = torch.stack([known[text] for texts in prompts.values() for text in texts]).double()
    answers: list[Tensor] = []
    for part in image_features.double().split(max(1, _ELEMENTS // len(features))):
        probability = (logit_scale * part @ features.T).softmax(1)
        summed = probability.new_zeros(len(part), len(prompts)).index_add_(1, owner, probability)
        answers.append(summed.argmax(1))
    return torch.cat(answers).numpy()


def zero_shot_scores(
    image_features: Tensor,
    labels: Sequence[str],
    prompts: Mapping[str, Sequence[str]],
    encode: TextEncoder,
    *,
    logit_scale: float | None = None,
    concepts: Any = None,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Accuracy of the nearest class for images [n, D] with ``labels`` [n], all of which have prompts; with a
    ``logit_scale``, of the most probable one.

    Chance is 1 / classes; majority is the share of the commonest class among the images, the best that a
    constant answer can reach. Returns ``{"accuracy": Score, "classes": C, "n": n, "prompts": number}``.
    """
    names = list(prompts)
    missing = set(labels) - set(names)
    assert not missing, f"classes without prompts: {sorted(missing)[:3]}"
    if logit_scale is None:
        predicted = top_k(image_features, class_features(prompts, encode)[1], 1)[1][:, 0]
    else:
        predicted = most_probable(image_features, prompts, encode, logit_scale)
    truth = np.array([names.index(label) for label in labels], dtype=np.int64)
    majority = Counter(labels).most_common(1)[0][1] / len(labels)
    return {
        "accuracy": score(
            predicted == truth, concepts, chance=1 / len(names), majority=majority, samples=samples, seed=seed
        ),
        "classes": len(names),
        "n": len(labels),
        "prompts": sum(len(texts) for texts in prompts.values()),
    }
