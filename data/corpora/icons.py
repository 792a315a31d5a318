"""``diptych data fetch icons``: from npm packages of icons to a corpus of shards, galleries and labelled tasks."""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...configs.files import cache_dir
from ..shards import ShardWriter
from .captions import Segmenter, base_name, caption_of, name_caption
from .emoji import Emoji, EmojiTable
from .iconify import Icon, IconSet, parse_set
from .packages import fetch_packages, read_json
from .pins import DEMO, EMOJIBASE, NUMBERED_DRAWINGS, REDRAWS, RULES
from .render import render_all
from .splits import Drawing, Splits, split_drawings

Progress = Callable[[str, int, int], None]


@dataclass
class Plan:
    """An icon that will be drawn."""

    icon: Icon
    emoji: Emoji | None
    caption: str
    names: list[str]
    licence: str


def read_table(archive: Path) -> EmojiTable:
    return EmojiTable(*read_json(archive, "en/data.json", "en/messages.json", "en/shortcodes/emojibase.json"))


def plan_icons(sets: Sequence[IconSet], table: EmojiTable, dropped: Counter[str]) -> list[Plan]:
    table.learn_names(icon_set for icon_set in sets if icon_set.kind == "Emoji")
    found: list[tuple[IconSet, Icon, Emoji | None]] = []
    for icon_set in sets:
        is_emoji = icon_set.kind == "Emoji"
        dropped["withdrawn by its maker"] += icon_set.hidden
        siblings = frozenset(icon.name for icon in icon_set.icons)
        for icon in icon_set.icons:
            if is_emoji and table.is_skin_toned(icon, siblings):
                dropped["repeats an emoji in another skin colour"] += 1
            else:
                found.append((icon_set, icon, table.find(icon) if is_emoji else None))
    spaced = {s.prefix for s in sets if sum("-" in icon.name for icon in s.icons) > len(s.icons) / 10}
    segmenter = Segmenter(
        name_caption(name)
        for s, icon, _ in found
        if s.prefix in spaced
        for name in (icon.name, *icon.aliases)
    )
    numbered = {s.prefix: frozenset(icon.name for icon in s.icons) for s in sets}
    plans: list[Plan] = []
    for icon_set, icon, emoji in found:
        own: list[str] = []
        for name in (icon.name, *icon.aliases):
            if icon_set.prefix in spaced:
                base = base_name(name, numbered[icon_set.prefix], NUMBERED_DRAWINGS.get(icon_set.prefix))
                own.append(name_caption(base))
            elif cut := segmenter.cut(name):
                own.append(" ".join(cut))
        if not own and emoji is None:
            dropped["name cannot be cut into words"] += 1
        else:
            plans.append(Plan(icon, emoji, *caption_of(emoji, own), icon_set.licence))
    return plans


def to_drawings(
    plans: Sequence[Plan], size: int, dropped: Counter[str], progress: Progress | None
) -> list[Drawing]:
    plans = sorted(plans, key=lambda plan: (plan.icon.prefix, plan.icon.name))
    pictures = render_all([plan.icon.svg for plan in plans], size, progress=progress)
    seen: dict[tuple[str, str], int] = {}
    out: list[Drawing] = []
    for plan, picture in zip(plans, pictures, strict=True):
        if picture is None:
            dropped["blank or not drawable"] += 1
            continue
        family = REDRAWS.get(plan.icon.prefix, plan.icon.prefix)
        twin = (family, picture.pixels)
        if twin in seen:
            dropped["same pixels as another of its family"] += 1
            continue
        seen[twin] = len(out)
        emoji = plan.emoji
        out.append(
            Drawing(
                key=f"{plan.icon.prefix}_{plan.icon.name}",
                vendor=plan.icon.prefix,
                family=family,
                caption=plan.caption,
                names=tuple(plan.names),
                tags=emoji.tags if emoji else (),
                categories=plan.icon.categories,
                emoji=emoji.code if emoji else "",
                group=emoji.group if emoji else "",
                subgroup=emoji.subgroup if emoji else "",
                licence=plan.licence,
                png=picture.png,
                hash_24=picture.hash_24,
            )
        )
    return out


def write_split(folder: Path, drawings: Sequence[Drawing]) -> None:
    order = sorted(drawings, key=lambda drawing: hashlib.sha256(drawing.key.encode()).digest())
    with ShardWriter(folder, samples_per_shard=1000) as writer:
        for d in order:
            meta: dict[str, Any] = {
                "vendor": d.vendor,
                "family": d.family,
                "names": list(d.names),
                "tags": list(d.tags),
                "categories": list(d.categories),
                "emoji": d.emoji,
                "group": d.group,
                "subgroup": d.subgroup,
                "licence": d.licence,
            }
            writer.write(d.key, d.png, "png", d.caption, meta)


def galleries(splits: Splits) -> dict[str, dict[str, Any]]:
    vendor, word = splits.by_name["test_vendor"], splits.by_name["test_word"]
    chosen = {
        "openmoji_no_people": (
            "test_vendor",
            [d for d in vendor if d.vendor == "openmoji" and d.emoji and d.group != "people-body"],
        ),
        "openmoji": ("test_vendor", [d for d in vendor if d.vendor == "openmoji"]),
        "icon_park": ("test_vendor", [d for d in vendor if d.vendor == "icon-park"]),
        "test_word": ("test_word", word),
    }
    out: dict[str, dict[str, Any]] = {}
    for name, (split, drawings) in chosen.items():
        keys = sorted(d.key for d in drawings)
        out[name] = {
            "split": split,
            "keys": keys,
            "sha256": hashlib.sha256("\n".join(keys).encode()).hexdigest(),
        }
    return out


def fetch_icons(*, tier="demo", image_size=64, out=None, progress=None):
    paths = fetch_packages((*DEMO, EMOJIBASE), progress=progress)
    names = ("icons.json", "info.json", "chars.json", "metadata.json")
    sets = [parse_set(*read_json(path, *names)) for path in paths[:-1]]
    dropped = Counter()
    plans = plan_icons(sets, read_table(paths[-1]), dropped)
    drawings = to_drawings(plans, image_size, dropped, progress)
    splits = split_drawings(drawings, RULES)
    out = Path(out) if out else cache_dir() / "corpora" / f"icons-{tier}"
    staging = out.with_name(f".{out.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    for name, members in splits.by_name.items():
        write_split(staging / name, members)
    (staging / "galleries.json").write_text(json.dumps(galleries(splits), indent=1))
    shutil.rmtree(out, ignore_errors=True)
    staging.rename(out)
    return out, splits, dropped
