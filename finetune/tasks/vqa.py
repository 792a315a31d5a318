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
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""What the official evaluation takes away: no apostrophes, which make possessives, no colons of times."""
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't
needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've
something'll that's there'd there'd've there're there's they'd they'd've they'll they're they've 'twas wasn't
we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll
who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've
you'll you're you've
"""
"""The words of the official table; each is meant where one of its apostrophes is left out."""
WHOLE = {
    word[:i] + word[i + 1 :]: word
    for word in CONTRACTIONS.split()
    for i, letter in enumerate(word)
    if letter == "'"
}


def canonical_answer(text: str) -> str:
    """An answer as the official evaluation compares it (https://visualqa.org/evaluation): in lower case,
    number words as digits, without articles and points but those of decimals, contractions with their
    apostrophes, and a space for punctuation. A mark that stands beside a space somewhere, and all where a
    comma divides digits, are taken away without a space, as its program does."""
    text = " ".join(str(text).lower().replace("’", "'").split())
    joined = re.search(r"\d,\d", text) is not None
    marks = {c: "" if joined or f"{c} " in text or f" {c}" in text else " " for c in PUNCTUATION}
    text = re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(marks)))
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join(WHOLE.get(word, word) for word in words if word not in ARTICLES)


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
