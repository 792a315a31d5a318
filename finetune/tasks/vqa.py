"""Visual question answering with several people's answers per question: soft targets and the VQA accuracy.

What is predicted is one answer of a vocabulary: the answers that most training questions have. An answer's
score is the official one (Antol et al. 2015, arXiv 1505.00468): min(# that gave it / 3, 1), averaged over all
choices of all people but one. These scores are the targets, and each answer has a logit and a binary cross
entropy of its own (Teney et al. 2017, arXiv 1708.02711). An answer outside the vocabulary cannot be given:
what the best choice in it scores is told as ``ceiling``.
"""

import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...configs.errors import UserError
from .metrics import Floats, Ints, Prepare, WeightedMetric, mean_of

__all__ = ["FEWEST", "VQA", "answer_score", "answers_of", "canonical_answer", "soft_targets", "vocabulary"]

FEWEST = 4
"""Answers per question with which a score can reach 1."""
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(WORDS)}
ARTICLES = ("a", "an", "the")


def canonical_answer(text: str) -> str:
    """An answer in lower case, without articles and punctuation (but points within numbers), numbers as
    digits; in the manner of the official evaluation."""
    text = re.sub(r"(?<=\d),(?=\d)|['’]", "", str(text).lower())
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)
    words = [NUMBERS.get(word, word) for word in re.sub(r"[^\w.]+|_", " ", text).split()]
    return " ".join(word for word in words if word not in ARTICLES)


def answer_score(given: int, people: int) -> float:
    """The score of an answer that ``given`` of ``people`` gave: the mean over leaving out each of them of
    min(the others that gave it / 3, 1)."""
    without, with_it = min((given - 1) / 3, 1), min(given / 3, 1)
    return (given * without + (people - given) * with_it) / people


def answers_of(cells: Sequence[Any], separator: str | None, column: str, source: str) -> list[list[str]]:
    """The canonical answers of every row: a list, or text between separators. UserError for less than
    four."""
    made: list[list[str]] = []
    for i, cell in enumerate(cells):
        parts = cell.split(separator) if separator is not None and isinstance(cell, str) else cell
        several = parts if isinstance(parts, list | tuple) else []
        made.append([canonical_answer(part) for part in several if part is not None])
        if len(made[-1]) < FEWEST:
            raise UserError(
                f"{source}: row {i + 1}: column '{column}' holds {len(made[-1])} answers, and the VQA "
                f"accuracy needs {FEWEST} or more people's; give a list or name task.separator, or use "
                "task.type multiclass for one answer"
            )
    return made


def vocabulary(answers: Sequence[Sequence[str]], rows: Ints, *, most: int, min_rows: int) -> list[str]:
    """The answers that most questions among ``rows`` have, at least ``min_rows`` of them; of equals the first
    by name."""
    counts: Counter[str] = Counter(answer for i in map(int, rows) for answer in set(answers[i]) if answer)
    ranked = sorted(counts, key=lambda answer: (-counts[answer], answer))
    return [answer for answer in ranked[:most] if counts[answer] >= min_rows]


def soft_targets(answers: Sequence[Sequence[str]], classes: Sequence[str]) -> NDArray[np.float64]:
    """Scores float64 [n, C] of the vocabulary's answers."""
    number = {name: i for i, name in enumerate(classes)}
    targets = np.zeros((len(answers), len(classes)))
    for row, said in zip(targets, answers, strict=True):
        for answer, given in Counter(said).items():
            if answer in number:
                row[number[answer]] = answer_score(given, len(said))
    return targets


def _accuracy(targets: Floats, p: Floats) -> WeightedMetric:
    """Mean score of the most probable answer."""
    return mean_of(targets[np.arange(len(p)), p.argmax(axis=1)])


def _hits(targets: Floats, p: Floats) -> WeightedMetric:
    """Share of rows whose most probable answer somebody gave."""
    return mean_of((targets[np.arange(len(p)), p.argmax(axis=1)] > 0).astype(np.float64))


VQA: dict[str, Prepare] = {"vqa_accuracy": _accuracy, "given_by_someone": _hits}
