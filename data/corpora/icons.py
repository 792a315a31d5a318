"""``diptych data fetch icons``: from npm packages of icons to a corpus of shards, galleries and labelled
tasks.

Fetch and verify the packages, read the sets, draw each once, name, split, write. All of it goes into a
folder of a temporary name that is renamed at the end, so a corpus is there whole or not at all; packages
and pictures that are done already are taken up again by the next try.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ...configs.files import cache_dir
from ..shards import ShardWriter
from .card import CardFacts, data_card
from .emoji import EmojiTable
from .galleries import check_galleries, make_galleries
from .iconify import IconSet
from .naming import NamedIcon, keep_icons, name_icons
from .packages import fetch_packages, read_text
from .pins import EMOJIBASE, RECIPE, TIERS, Tier
from .places import STAMP, put_in_place, refuse_other_things, stamp_of, told_of_space
from .render import Picture, Renderer, read_pictures, renderer_version
from .sets import families, read_emoji, read_sets
from .splits import Drawing, split_drawings
from .tasks import write_tasks

__all__ = ["fetch_icons", "make_corpus"]

SAMPLES_PER_SHARD = 1000
Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    """No progress."""


def fetch_icons(
    *, tier: str = "demo", image_size: int = 64, out: Path | None = None, progress: Progress = _silent
) -> Path:
    """The folder of the icon corpus, made if it is not there yet (or was made by another recipe).

    ``tier``: "demo" (11 sets, some 26 thousand pictures) or "full" (200 sets and more). ``out``: default
    ``cache_dir()/corpora/icons-TIER``. ``progress`` is told (what, done, total). Raises UserError: unknown
    tier, no npm client, no network, wrong checksum, no space, a folder of other things at ``out``.
    """
    if tier not in TIERS:
        raise UserError(f"there is no tier '{tier}'; choose one of {', '.join(TIERS)}")
    if not 16 <= image_size <= 1024:
        raise UserError(f"image size {image_size} is not between 16 and 1024 pixels; 64 is usual")
    chosen = TIERS[tier]
    folder = Path(out) if out is not None else cache_dir() / "corpora" / f"icons-{tier}"
    identity = _identity(chosen, image_size)
    with told_of_space(folder, "the demo takes 150 MB on the way"):
        if stamp_of(folder) == identity:
            return folder
        refuse_other_things(folder, "galleries.json")
        archives = fetch_packages((*chosen.packages, EMOJIBASE), progress=progress)
        left_out: dict[str, str] = {}
        table = read_emoji(archives[-1])
        sets = read_sets(chosen, archives[:-1], left_out)
        licence = read_text(archives[-1], "LICENSE")
        return make_corpus(folder, chosen, sets, table, identity, left_out, licence, progress=progress)


def make_corpus(
    folder: Path,
    tier: Tier,
    sets: Iterable[IconSet],
    table: EmojiTable,
    identity: Mapping[str, Any],
    left_out: Mapping[str, str],
    emojibase_licence: str = "",
    *,
    progress: Progress = _silent,
    processes: int | None = None,
) -> Path:
    """Draw, name, split and write ``sets``; ``folder`` appears at the end. ``identity`` says what it is
    made of and holds ``image_size``; a folder with the same identity is not made again."""
    size = int(identity["image_size"])
    staging = folder.with_name(f".{folder.name}.partial")
    dropped: Counter[str] = Counter()
    drawn_sets, files = _draw(sets, table, staging / "pictures", size, dropped, progress, processes)
    family = families(drawn_sets)
    drawings = _drawings(name_icons(drawn_sets, table, dropped), files, drawn_sets, family, dropped)
    splits = split_drawings(drawings, tier.rules)
    galleries = make_galleries(splits)
    if size == 64:
        check_galleries(galleries, tier.galleries)

    new = staging / "corpus"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for number, (name, members) in enumerate(splits.by_name.items()):
        progress(f"write {name}", number, len(splits.by_name))
        _write_split(new / name, members)
    tasks = write_tasks(new / "tasks", splits)
    (new / "galleries.json").write_text(json.dumps(galleries, indent=1) + "\n", encoding="utf-8")
    facts = CardFacts(
        tier,
        size,
        renderer_version(),
        drawn_sets,
        family,
        left_out,
        splits,
        galleries,
        tasks,
        dropped,
        emojibase_licence,
    )
    (new / "README.md").write_text(data_card(facts), encoding="utf-8")
    (new / STAMP).write_text(json.dumps(_figures(identity, facts), indent=1) + "\n", encoding="utf-8")
    put_in_place(folder, new, staging)
    return folder


def _identity(tier: Tier, image_size: int) -> dict[str, Any]:
    """What the corpus is made of; two with equal identities hold the same."""
    return {
        "corpus": "icons",
        "tier": tier.name,
        "recipe": RECIPE,
        "image_size": image_size,
        "packages": {package.spec: package.integrity for package in (*tier.packages, EMOJIBASE)},
    }


def _figures(identity: Mapping[str, Any], facts: CardFacts) -> dict[str, Any]:
    """``corpus.json``: the identity and the card's numbers for programs."""
    return {
        "made_of": identity,
        "renderer": facts.renderer,
        "splits": {
            name: {
                "samples": len(drawings),
                "vendors": dict(sorted(Counter(d.vendor for d in drawings).items())),
            }
            for name, drawings in facts.splits.by_name.items()
        },
        "galleries": {name: len(gallery["keys"]) for name, gallery in facts.galleries.items()},
        "tasks": {name: dict(sorted(counts.items())) for name, counts in facts.tasks.items()},
        "dropped": dict(sorted((facts.dropped + facts.splits.dropped).items())),
        "held_out_words": facts.splits.words,
        "families": dict(sorted(facts.family.items())),
        "left_out": dict(sorted(facts.left_out.items())),
    }


def _draw(
    sets: Iterable[IconSet],
    table: EmojiTable,
    folder: Path,
    size: int,
    dropped: Counter[str],
    progress: Progress,
    processes: int | None,
) -> tuple[list[IconSet], list[Path]]:
    """Draw what is kept of each set; the sets without their SVG, and a file of pictures for each."""
    out: list[IconSet] = []
    files: list[Path] = []
    with Renderer(folder, size, processes=processes) as renderer:
        for icon_set in sets:
            icons = keep_icons(icon_set, table, dropped)
            files.append(renderer.draw(icons, partial(_tell, progress, icon_set.prefix, len(icons))))
            # the SVG documents of the full tier take a gigabyte and are not needed any more
            out.append(replace(icon_set, icons=[replace(icon, svg="") for icon in icons]))
    return out, files


def _tell(progress: Progress, prefix: str, total: int, done: int) -> None:
    progress(f"draw {prefix}", done, total)


def _drawings(
    named: Sequence[NamedIcon],
    files: Sequence[Path],
    sets: Sequence[IconSet],
    family: Mapping[str, str],
    dropped: Counter[str],
) -> list[Drawing]:
    """Names and pictures together. Of equal pictures in a family the one with the shortest caption stays, and
    takes over what the others are called."""
    pictures: dict[tuple[str, str], Picture | None] = {}
    for icon_set, path in zip(sets, files, strict=True):
        for icon, picture in zip(icon_set.icons, read_pictures(path), strict=True):
            pictures[icon.prefix, icon.name] = picture
    kept: dict[tuple[str, str], Drawing] = {}
    for one in sorted(named, key=lambda n: (n.icon.prefix, len(n.caption.split()), n.icon.name)):
        prefix = one.icon.prefix
        picture = pictures[prefix, one.icon.name]
        if picture is None:
            dropped["blank or not drawable"] += 1
            continue
        place = family[prefix], picture.pixels
        if (twin := kept.get(place)) is not None:
            dropped["the same pixels as another icon of its family"] += 1
            names = dict.fromkeys((*twin.names, one.caption, *one.names))
            kept[place] = replace(twin, names=tuple(name for name in names if name != twin.caption))
            continue
        emoji = one.emoji
        kept[place] = Drawing(
            key=f"{prefix}_{one.icon.name}",
            vendor=prefix,
            family=family[prefix],
            caption=one.caption,
            names=one.names,
            tags=tuple(tag.lower().replace("’", "'") for tag in emoji.tags) if emoji else (),
            categories=one.icon.categories,
            emoji=emoji.code if emoji else "",
            group=emoji.group if emoji else "",
            subgroup=emoji.subgroup if emoji else "",
            licence=one.licence,
            png=picture.png,
            hash_24=picture.hash_24,
        )
    return list(kept.values())


def _write_split(folder: Path, drawings: Sequence[Drawing]) -> None:
    """One split as shards, in the order of a hash, so that every shard holds some of all vendors."""
    with ShardWriter(folder, samples_per_shard=SAMPLES_PER_SHARD) as writer:
        for d in sorted(drawings, key=lambda d: hashlib.sha256(d.key.encode()).digest()):
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
