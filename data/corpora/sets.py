"""The icon sets of a tier, read one at a time from the packages."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from .emoji import EmojiTable
from .iconify import IconSet, parse_set
from .packages import read_json, read_json_members
from .pins import FULL, LEFT_OUT, REDRAWS, Tier

__all__ = ["families", "read_emoji", "read_sets", "why_left_out"]

_DOCUMENTS = ("icons.json", "info.json", "chars.json", "metadata.json")


def read_emoji(archive: Path) -> EmojiTable:
    """The emoji of the ``emojibase-data`` package, with English labels and tags."""
    return EmojiTable(*read_json(archive, "en/data.json", "en/messages.json", "en/shortcodes/emojibase.json"))


def read_sets(tier: Tier, archives: Sequence[Path], left_out: dict[str, str]) -> Iterator[IconSet]:
    """Every set of the tier that is used; those that are not are noted in ``left_out`` with the reason."""
    for package, archive in zip(tier.packages, archives, strict=True):
        if package.name == FULL.name:
            for _, document in read_json_members(archive, "json"):
                prefix, info = str(document["prefix"]), document["info"]
                if reason := why_left_out(prefix, info):
                    left_out[prefix] = reason
                else:
                    yield parse_set(document, info, document.get("chars", {}), document)
        else:
            yield parse_set(*read_json(archive, *_DOCUMENTS))


def why_left_out(prefix: str, info: Mapping[str, Any]) -> str | None:
    """The reason why a set of the full tier is not used; None for one that is."""
    spdx = str(info.get("license", {}).get("spdx", ""))
    if prefix in LEFT_OUT:
        return LEFT_OUT[prefix]
    if info.get("category") == "Logos":
        return "brand logos"
    if "-NC" in spdx or not spdx:
        return f"licence {spdx or 'not stated'}"
    return None


def families(sets: Sequence[IconSet]) -> dict[str, str]:
    """Family of each set by prefix: the set whose artwork it repeats, else the shortest prefix among the
    sets of its author."""
    by_author: dict[str, list[str]] = {}
    for icon_set in sets:
        if icon_set.prefix not in REDRAWS:
            by_author.setdefault(icon_set.author or icon_set.prefix, []).append(icon_set.prefix)
    out = dict(REDRAWS)
    for prefixes in by_author.values():
        first = min(prefixes, key=lambda prefix: (len(prefix), prefix))
        out |= dict.fromkeys(prefixes, first)
    return {icon_set.prefix: out[icon_set.prefix] for icon_set in sets}
