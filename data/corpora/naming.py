"""From sets to drawings that have a caption: which icons are kept and what they are called."""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from .captions import Segmenter, base_name, caption_of, name_caption
from .emoji import Emoji, EmojiTable
from .iconify import Icon, IconSet
from .pins import EMOJI_SETS, FLAG_SETS, NUMBERED_DRAWINGS

__all__ = ["NamedIcon", "keep_icons", "name_icons"]


@dataclass(frozen=True)
class NamedIcon:
    """An icon of the corpus before it is drawn."""

    icon: Icon
    emoji: Emoji | None
    caption: str
    names: tuple[str, ...]
    licence: str


def keep_icons(icon_set: IconSet, table: EmojiTable, dropped: Counter[str]) -> list[Icon]:
    """The icons of a set that are worth drawing: not withdrawn, not an emoji in another skin colour, not the
    smaller size of another one. What is left out is counted in ``dropped``."""
    dropped["withdrawn by its maker"] += icon_set.hidden
    siblings = frozenset(icon.name for icon in icon_set.icons)
    largest: dict[tuple[str, str], int] = {}
    for icon in icon_set.icons:
        base, size, style = sized_name(icon.name, icon_set.suffixes)
        if size is not None:
            largest[base, style] = max(size, largest.get((base, style), 0))
    kept: list[Icon] = []
    for icon in icon_set.icons:
        base, size, style = sized_name(icon.name, icon_set.suffixes)
        if icon_set.prefix in EMOJI_SETS and table.is_skin_toned(icon, siblings):
            dropped["an emoji in another skin colour"] += 1
        elif size is not None and size < largest[base, style]:
            dropped["a smaller size of another icon"] += 1
        else:
            kept.append(icon)
    return kept


def sized_name(name: str, suffixes: Sequence[str]) -> tuple[str, int | None, str]:
    """(base, size, style) of a name in a set that draws everything at several sizes: "home-20-filled" is
    ("home", 20, "filled"). ``size`` is None where the name states none."""
    for suffix in suffixes:
        if (match := re.fullmatch(r"(\d+)(?:-(.+))?", suffix)) and name.endswith(f"-{suffix}"):
            style = match[2] or ""
            return name.removesuffix(f"-{suffix}"), int(match[1]), "" if style == "regular" else style
    return name, None, ""


def name_icons(sets: Sequence[IconSet], table: EmojiTable, dropped: Counter[str]) -> list[NamedIcon]:
    """Captions and other names for all icons, sorted by set and name. Names written without spaces are cut
    into words that the other sets use; icons whose names resist are left out and counted."""
    table.learn_names(icon_set for icon_set in sets if icon_set.prefix in EMOJI_SETS)
    spaced = {s.prefix for s in sets if sum("-" in icon.name for icon in s.icons) * 10 > len(s.icons)}
    segmenter = Segmenter(
        name_caption(name)
        for icon_set in sets
        if icon_set.prefix in spaced
        for icon in icon_set.icons
        for name in (icon.name, *icon.aliases)
    )
    out: list[NamedIcon] = []
    for icon_set in sets:
        siblings = frozenset(icon.name for icon in icon_set.icons)
        is_emoji_set = icon_set.prefix in EMOJI_SETS
        for icon in icon_set.icons:
            emoji = _shown(icon, table)
            own: list[str] = []
            for name in (icon.name, *icon.aliases):
                if icon_set.prefix in spaced or not is_emoji_set:
                    own.append(_own_caption(name, icon_set, siblings))
                elif cut := segmenter.cut(name):
                    own.append(" ".join(cut))
            if not own and emoji is None:
                dropped["a name that cannot be cut into words"] += 1
                continue
            caption, names = caption_of(emoji, own)
            out.append(NamedIcon(icon, emoji, caption, tuple(names), icon_set.licence))
    return sorted(out, key=lambda named: (named.icon.prefix, named.icon.name))


def _shown(icon: Icon, table: EmojiTable) -> Emoji | None:
    """The emoji that an icon shows, where its set draws emoji or the flags of countries."""
    if icon.prefix in EMOJI_SETS:
        return table.find(icon)
    if icon.prefix in FLAG_SETS and (match := re.fullmatch(r"([a-z]{2})(-[1-9]x[1-9])?", icon.name)):
        return table.flag(match[1])
    return None


def _own_caption(name: str, icon_set: IconSet, siblings: frozenset[str]) -> str:
    base, _, style = sized_name(name, icon_set.suffixes)
    text = f"{base}-{style}" if style else base
    return name_caption(base_name(text, siblings, NUMBERED_DRAWINGS.get(icon_set.prefix)))
