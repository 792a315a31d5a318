"""Which split a drawing belongs to: decided by hashes and rules alone, so it never depends on the order.

* ``test_word``: everything whose concept carries a held-out word, whoever drew it. Such a word stands in no
  caption, alternative name or tag of the other splits.
* ``test_vendor``: the artwork families that are never trained on.
* ``val``: one more family that is never trained on, and a share of the concepts of the others: a recipe
  tuned on it meets both of the situations that the tests ask about.
* ``train``: the rest, without pictures that look the same as one of the above.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from .captions import stem, words

__all__ = ["Drawing", "SplitRules", "Splits", "draw_word", "held_out_words", "share_of", "split_drawings"]


@dataclass(frozen=True)
class Drawing:
    """A rendered icon with its texts. ``family``: drawings of one artist or redraws of one artwork."""

    key: str
    vendor: str
    family: str
    caption: str
    names: tuple[str, ...]
    tags: tuple[str, ...]
    categories: tuple[str, ...]
    emoji: str
    group: str
    subgroup: str
    licence: str
    png: bytes = field(repr=False)
    hash_24: str


@dataclass(frozen=True)
class SplitRules:
    """What is held out."""

    test_families: frozenset[str]
    val_families: frozenset[str]
    val_share: float
    """Share of concepts of the training families that go into val."""
    word_share: float
    """Share of the eligible words that are held out."""
    word_pictures: tuple[int, int]
    """Words with fewer or more pictures than this are not eligible."""
    salt: str


@dataclass
class Splits:
    """Drawings by split, and what was taken out on the way."""

    by_name: dict[str, list[Drawing]]
    words: list[str]
    dropped: Counter[str]


def share_of(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text and the salt alone."""
    return int.from_bytes(hashlib.sha256(f"{salt}\0{text}".encode()).digest()[:8], "big") / 2**64


def _stems(text: str) -> set[str]:
    return {stem(word) for word in words(text)}


def held_out_words(drawings: Sequence[Drawing], rules: SplitRules) -> list[str]:
    """Stems of the held-out words, sorted: chosen by hash among those of at least four letters that stand
    in a middling number of captions, drawn by two families or more."""
    pictures: Counter[str] = Counter()
    families: dict[str, set[str]] = defaultdict(set)
    for drawing in drawings:
        for word in _stems(drawing.caption):
            pictures[word] += 1
            families[word].add(drawing.family)
    low, high = rules.word_pictures
    return sorted(
        word
        for word, count in pictures.items()
        if low <= count <= high
        and len(word) >= 4
        and word.isalpha()
        and len(families[word]) >= 2
        and draw_word(word, rules)
    )


def draw_word(word: str, rules: SplitRules) -> bool:
    """Whether the hash of an eligible word holds it out."""
    return share_of(word, rules.salt + "/word") < rules.word_share


def split_drawings(drawings: Sequence[Drawing], rules: SplitRules) -> Splits:
    """The split of every drawing; see the head of this module for the rules."""
    held = held_out_words(drawings, rules)
    is_hot = _touches(frozenset(held))
    hot_captions, hot_emoji = _hot_concepts(drawings, is_hot)
    out = Splits({name: [] for name in ("train", "val", "test_vendor", "test_word")}, held, Counter())
    for drawing in drawings:
        if drawing.caption in hot_captions or drawing.emoji in hot_emoji:
            out.by_name["test_word"].append(drawing)
            continue
        cool = replace(
            drawing,
            names=tuple(n for n in drawing.names if not is_hot(n) and n not in hot_captions),
            tags=tuple(t for t in drawing.tags if not is_hot(t) and t not in hot_captions),
        )
        if drawing.family in rules.test_families:
            out.by_name["test_vendor"].append(cool)
        elif (
            drawing.family in rules.val_families
            or share_of(drawing.caption, rules.salt + "/val") < rules.val_share
        ):
            out.by_name["val"].append(cool)
        else:
            out.by_name["train"].append(cool)
    _remove_lookalikes(out)
    return out


def _hot_concepts(drawings: Sequence[Drawing], is_hot: Callable[[str], bool]) -> tuple[set[str], set[str]]:
    """Captions and emoji of the concepts that a held-out word touches: of drawings with the word in their
    caption or another name, and of all that share a caption or an emoji with one of these."""
    captions = {d.caption for d in drawings if is_hot(d.caption) or any(map(is_hot, d.names))}
    emoji: set[str] = set()
    grown = True
    while grown:
        before = len(captions) + len(emoji)
        emoji |= {d.emoji for d in drawings if d.emoji and d.caption in captions}
        captions |= {d.caption for d in drawings if d.emoji in emoji}
        grown = len(captions) + len(emoji) > before
    return captions, emoji


def _touches(held: frozenset[str]) -> Callable[[str], bool]:
    known: dict[str, bool] = {}

    def touches(text: str) -> bool:
        if text not in known:
            known[text] = not held.isdisjoint(_stems(text))
        return known[text]

    return touches


def _hashes(drawings: Iterable[Drawing]) -> set[str]:
    return {drawing.hash_24 for drawing in drawings}


def _remove_lookalikes(splits: Splits) -> None:
    """Train gives way to every other split, val to the tests."""
    tests = _hashes(splits.by_name["test_vendor"]) | _hashes(splits.by_name["test_word"])
    for name, taken in (("val", tests), ("train", tests | _hashes(splits.by_name["val"]))):
        kept = [drawing for drawing in splits.by_name[name] if drawing.hash_24 not in taken]
        splits.dropped[f"{name}: looks like a held-out picture"] += len(splits.by_name[name]) - len(kept)
        splits.by_name[name] = kept
