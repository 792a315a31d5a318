"""What each fusion head can and cannot learn, on synthetic tasks whose answer is known."""

from dataclasses import replace

import pytest
import torch

from diptych.finetune.adapt.fit import Part
from diptych.finetune.encoders.features import FeatureRows

from .heads import ALL, LATE, SINGLES, accuracy, evidence, learned, parity

FIXED = ["weighted_sum equal", "weighted_sum given"]
CANNOT = [*SINGLES, "similarity", "concat linear", "weighted_sum", *FIXED, *LATE]
HALF = ["gated by modality"]
"""One gate for a whole modality, linear in both, gets three of the four cases at best."""
CAN = [name for name in ALL if name not in (*CANNOT, *HALF)]
LEARNERS = [name for name in ALL if name not in (*SINGLES, "similarity") and "layer" not in name]
"""Heads that see more than whether the two agree, each on tokens with its default layers."""


@pytest.mark.parametrize("name", ALL)
def test_agreement_of_two_signs_is_learned_by_heads_that_compare_and_by_no_other(name: str) -> None:
    head = learned(name, parity(1200, 1), parity(300, 2), modality_dropout=0.05, epochs=12)
    got = accuracy(head, parity(2000, 3))
    if name in CAN:
        assert got > 0.95
    else:
        assert got < (0.8 if name in HALF else 0.56)


def parts(*, image: float, text: float) -> list[Part]:
    signal = {"image": image, "text": text}
    return [evidence(n, seed, signal=signal) for n, seed in ((800, 1), (300, 2), (2000, 3))]


@pytest.fixture(scope="module")
def redundant() -> tuple[list[Part], float]:
    """Both modalities carry the label; the better single one's accuracy."""
    made = parts(image=1.0, text=1.0)
    return made, max(accuracy(learned(k, made[0], made[1]), made[2]) for k in SINGLES)


@pytest.fixture(scope="module")
def one_sided() -> tuple[list[Part], float]:
    """Only the picture carries the label; its accuracy."""
    made = parts(image=1.0, text=0.0)
    assert accuracy(learned("text with a hidden layer", made[0], made[1]), made[2]) < 0.56
    return made, accuracy(learned("image", made[0], made[1]), made[2])


@pytest.mark.parametrize("name", LEARNERS)
def test_two_witnesses_of_one_fact_are_worth_no_less_than_the_better(
    redundant: tuple[list[Part], float], name: str
) -> None:
    made, single = redundant
    assert 0.9 < single < 0.98
    assert accuracy(learned(name, made[0], made[1]), made[2]) > single + 0.01


@pytest.mark.parametrize("name", LEARNERS)
def test_a_modality_of_noise_does_not_hide_the_other(one_sided: tuple[list[Part], float], name: str) -> None:
    made, single = one_sided
    loss = single - accuracy(learned(name, made[0], made[1]), made[2])
    if name in FIXED:  # what is given cannot be unlearned
        assert 0.02 < loss < 0.12
    else:
        assert loss < 0.02


AMONG_THREE = [
    "concat",
    "concat with interactions",
    "gated",
    "bilinear",
    "bilinear full",
    "merged",
    "cross",
    "joint",
]


@pytest.mark.parametrize("name", [*AMONG_THREE, "bottleneck", "late"])
def test_agreement_with_a_third_modality_of_another_width_is_learned_too(name: str) -> None:
    made = [third(part) for part in (parity(1200, 1), parity(300, 2), parity(2000, 3))]
    got = accuracy(learned(name, made[0], made[1], modality_dropout=0.0), made[2])
    assert got < 0.56 if name == "late" else got > 0.95


def third(part: Part) -> Part:
    """What the text said is said by a third modality of half the width, which has no tokens; the text says
    nothing."""
    assert isinstance(part.rows, FeatureRows)
    tables, index = dict(part.rows.tables), dict(part.rows.index)
    random = torch.Generator().manual_seed(len(part.targets))
    mix = torch.randn(16, 8, generator=torch.Generator().manual_seed(8)) / 8**0.5
    tables["audio"], index["audio"] = tables["text"] @ mix, index["text"]
    for k in ("text", "text_tokens"):
        tables[k] = 0.2 * torch.randn(tables[k].shape, generator=random)
    return Part(replace(part.rows, tables=tables, index=index), part.targets)
