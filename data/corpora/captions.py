"""Captions from the names that people gave to drawings."""

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from .emoji import Emoji, slug

__all__ = ["Segmenter", "base_name", "caption_of", "label_caption", "name_caption", "stem", "words"]

_NUMBERS = {"words": "one|two|three|four|five|six|seven|eight|nine|ten", "digits": "[1-9]"}


def words(text: str) -> list[str]:
    """Lower-case words and numbers of a caption or a name."""
    return slug(text).split("-") if slug(text) else []


def stem(word: str) -> str:
    """The word without an English plural ending, so that a held-out word is held out in both numbers."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("ches", "shes", "xes", "sses")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word


def name_caption(name: str) -> str:
    """An icon name as a caption: "chess-king-filled" becomes "chess king filled"."""
    return " ".join(part for part in name.replace("_", "-").split("-") if part)


def label_caption(label: str) -> str:
    """A CLDR label as a caption: lower case, no quotes or colons ("flag: Fiji" becomes "flag fiji")."""
    return " ".join(re.sub(r"[“”\"():,.!⊛]", " ", label.lower().replace("’", "'")).split())


def base_name(name: str, siblings: frozenset[str], numbering: str | None) -> str:
    """The name without the number of a further drawing of the same thing, in sets that number their
    drawings in words ("rabbit-two") or in digits ("selfie-2"). Numbers that count from zero mean something
    and stay."""
    if numbering is None or not (match := re.fullmatch(rf"(.+[a-z])-({_NUMBERS[numbering]})", name)):
        return name
    base = match[1]
    return name if {f"{base}-zero", f"{base}-0"} & siblings else base


def caption_of(emoji: Emoji | None, own: Sequence[str]) -> tuple[str, list[str]]:
    """The caption of a drawing and its other names, without repeats.

    An emoji is called by its CLDR label; its other names are the set's own (``own``: name, then aliases, as
    captions) and the short names that chat programs use. Anything else is called by its own name.
    """
    if emoji is None:
        return own[0], _others(own[0], own[1:])
    caption = label_caption(emoji.label)
    return caption, _others(caption, [*own, *filter(_readable, emoji.names)])


def _readable(name: str) -> bool:
    """Whether every word of a short name could be said: no "family wwgg"."""
    return all(len(word) < 3 or word.isdigit() or re.search(r"[aeiouy]", word) for word in words(name))


def _others(caption: str, names: Iterable[str]) -> list[str]:
    """Names that are neither the caption nor a slip of a script ("flag for flag japan")."""
    return [
        name
        for name in dict.fromkeys(names)
        if name and words(name) != words(caption) and not name.startswith("flag for flag ")
    ]


class Segmenter:
    """Cuts names written without spaces ("speakerwith1soundwave") into words seen in other sets."""

    def __init__(self, texts: Iterable[str]) -> None:
        counts = Counter(word for text in texts for word in words(text))
        total = sum(counts.values())
        self._cost = {
            word: math.log(total / n) for word, n in counts.items() if len(word) > 1 or word in "ax"
        }
        self._longest = max(map(len, self._cost), default=0)

    def cut(self, name: str) -> list[str] | None:
        """The likeliest words that make up ``name`` exactly; None if there are none."""
        best: list[tuple[float, Sequence[str]] | None] = [(0.0, ())]
        for end in range(1, len(name) + 1):
            options: list[tuple[float, Sequence[str]]] = []
            for start in range(max(0, end - self._longest), end):
                word, before = name[start:end], best[start]
                if before is None:
                    continue
                cost = self._cost.get(word, 12.0 if word.isdigit() else math.inf)
                if cost < math.inf:
                    options.append((before[0] + cost, (*before[1], word)))
            best.append(min(options) if options else None)
        return list(best[-1][1]) if best[-1] else None
