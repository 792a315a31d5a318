"""Which emoji a drawing shows, and what people call it: labels, tags, groups from emojibase (Unicode
CLDR)."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .iconify import Icon, IconSet

__all__ = ["Emoji", "EmojiTable", "plain_code", "slug"]

_MODIFIERS = {"1f3fb", "1f3fc", "1f3fd", "1f3fe", "1f3ff"}


@dataclass(frozen=True)
class Emoji:
    """One emoji without skin tone: its code points, CLDR label and tags, short names, group and subgroup."""

    code: str
    label: str
    tags: tuple[str, ...]
    names: tuple[str, ...]
    group: str
    subgroup: str


def plain_code(code: str) -> str:
    """Code points in lower case without presentation selectors: "1F9D1-200D-2764-FE0F" and its short form are
    one."""
    return "-".join(part for part in code.lower().split("-") if part not in ("fe0f", "fe0e"))


def slug(text: str) -> str:
    """A label the way icon names are written: "Côte d'Ivoire" becomes "cote-d-ivoire"."""
    ascii_text = unicodedata.normalize("NFKD", text.replace("&", " and ")).encode("ascii", "ignore").decode()
    return "-".join(re.findall(r"[a-z0-9]+", ascii_text.lower().replace("'", "").replace("#", "hash")))


class EmojiTable:
    """All emoji of emojibase, found by code or by the names that icon sets use."""

    def __init__(
        self, data: Sequence[Mapping[str, Any]], messages: Mapping[str, Any], shortcodes: Mapping[str, Any]
    ):
        groups = {entry["order"]: entry["key"] for entry in messages["groups"]}
        subgroups = {entry["order"]: entry["key"] for entry in messages["subgroups"]}
        self.by_code: dict[str, Emoji] = {}
        self.skin_toned: set[str] = set()
        for entry in data:
            if "group" not in entry or groups[entry["group"]] == "component":
                continue
            code = plain_code(entry["hexcode"])
            short = shortcodes.get(entry["hexcode"], [])
            names = [short] if isinstance(short, str) else list(short)
            self.by_code[code] = Emoji(
                code,
                str(entry["label"]),
                tuple(map(str, entry.get("tags", ()))),
                tuple(name.replace("_", " ") for name in names),
                groups[entry["group"]],
                subgroups[entry["subgroup"]],
            )
            self.skin_toned.update(plain_code(skin["hexcode"]) for skin in entry.get("skins", ()))
        self._names: dict[str, str] = {}

    def learn_names(self, sets: Iterable[IconSet]) -> None:
        """Let names find their emoji: CLDR labels first, then the names that sets with code points use (the
        commonest code of a name), then short names, then all of these written without hyphens."""
        votes: dict[str, Counter[str]] = {}
        for icon_set in sets:
            for icon in icon_set.icons:
                if icon.code is not None and (emoji := self.by_code.get(plain_code(icon.code))):
                    for name in (icon.name, *icon.aliases):
                        votes.setdefault(name, Counter())[emoji.code] += 1
        self._names = {slug(emoji.label): code for code, emoji in self.by_code.items()}
        for name, counted in sorted(votes.items()):
            self._names.setdefault(name, min(counted, key=lambda code: (-counted[code], code)))
        for code, emoji in self.by_code.items():
            for name in emoji.names:
                self._names.setdefault(slug(name), code)
        for name, code in sorted(self._names.items()):
            self._names.setdefault(name.replace("-", ""), code)

    def is_skin_toned(self, icon: Icon, siblings: frozenset[str]) -> bool:
        """Whether the drawing repeats another one in another skin colour."""
        code = plain_code(icon.code) if icon.code else ""
        shade = re.fullmatch(r"(.+?)-(medium-light|medium-dark|light|medium|dark)", icon.name)
        if shade and not code and shade[1] in siblings:
            return True
        return (
            code in self.skin_toned
            or bool(_MODIFIERS & set(code.split("-")))
            or bool(re.search(r"skin-tone|-tone-?\d|skintone", icon.name))
        )

    def flag(self, country: str) -> Emoji | None:
        """The flag of a country by its two letters (ISO 3166), "fr"."""
        return self.by_code.get("-".join(f"{0x1F1E6 + ord(letter) - ord('a'):x}" for letter in country))

    def find(self, icon: Icon) -> Emoji | None:
        """The emoji that the drawing shows: by its code if it has one, else by its names."""
        if icon.code is not None:
            return self.by_code.get(plain_code(icon.code))
        for name in (icon.name, *icon.aliases):
            for variant in _spellings(name):
                if variant in self._names:
                    return self.by_code[self._names[variant]]
        return None


def _spellings(name: str) -> Iterable[str]:
    yield name
    if match := re.fullmatch(r"(.*[a-z])-\d{1,2}", name):  # second drawings: "selfie-2"
        yield match[1]
    for start in ("flag-for-flag-", "flag-for-"):
        if name.startswith(start):
            yield "flag-" + name.removeprefix(start)
    yield name.replace("-", "")
