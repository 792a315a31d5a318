"""The data card: what is in a corpus, where it comes from, who drew it, under which licence, and what it is
not."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .galleries import Galleries
from .iconify import IconSet
from .pins import EMOJIBASE, Tier
from .splits import Splits

__all__ = ["CardFacts", "data_card"]

SPLITS = ("train", "val", "test_vendor", "test_word")


@dataclass(frozen=True)
class CardFacts:
    """What a fetch knows about the corpus that it made."""

    tier: Tier
    image_size: int
    renderer: str
    sets: Sequence[IconSet]
    family: Mapping[str, str]
    left_out: Mapping[str, str]
    splits: Splits
    galleries: Galleries
    tasks: Mapping[str, Counter[str]]
    dropped: Counter[str]
    emojibase_licence: str


def data_card(facts: CardFacts) -> str:
    """The card as Markdown."""
    sections = (_head, _contents, _splits, _galleries, _tasks, _dropped, _limits, _sources, _licences)
    return "\n".join(line for section in sections for line in (*section(facts), ""))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines]


def _head(facts: CardFacts) -> list[str]:
    count = sum(len(drawings) for drawings in facts.splits.by_name.values())
    captions = {d.caption for drawings in facts.splits.by_name.values() for d in drawings}
    return [
        f"# icons-{facts.tier.name}: {count:,} icons and emoji with captions",
        "",
        f"Drawings of {len(facts.sets)} icon sets, rendered at {facts.image_size} x {facts.image_size} "
        f"pixels on white with {facts.renderer}, named and tagged by people: {len(captions):,} different "
        "captions. Written by `diptych data fetch icons`; the same packages and renderer give the same "
        "bytes.",
    ]


def _contents(facts: CardFacts) -> list[str]:
    return [
        "## What is here",
        "",
        "`train`, `val`, `test_vendor`, `test_word`: folders of shards (tar, PNG + caption + JSON). "
        "`galleries.json`: fixed lists of held-out pictures. `tasks/`: labelled tables for fine-tuning. "
        "`corpus.json`: this page in figures.",
        "",
        "The caption of an emoji is its label in Unicode's CLDR; of any other icon, the name that its maker "
        "gave it. The JSON holds `vendor` (the set), `family` (sets of one artist or of one artwork), "
        "`names` (other names), `tags`, `categories` (the set's own), `emoji` (code points), `group` and "
        "`subgroup` (Unicode's), `licence` (SPDX).",
    ]


def _splits(facts: CardFacts) -> list[str]:
    vendors: dict[str, Counter[str]] = {}
    for name, drawings in facts.splits.by_name.items():
        for drawing in drawings:
            vendors.setdefault(drawing.vendor, Counter())[name] += 1
    rows = [
        [v, facts.family[v], *(vendors[v][s] for s in SPLITS), vendors[v].total()] for v in sorted(vendors)
    ]
    totals = [len(facts.splits.by_name[s]) for s in SPLITS]
    rules = facts.tier.rules
    return [
        "## Splits",
        "",
        *_table(["vendor", "family", *SPLITS, "all"], [*rows, ["all", "", *totals, sum(totals)]]),
        "",
        f"* `test_vendor`: families never trained on ({', '.join(sorted(rules.test_families))}): seen "
        "concepts, unseen drawings.",
        f"* `test_word`: concepts with one of {len(facts.splits.words)} held-out words in their caption or "
        "another name, whoever drew them. In the other splits these words stand in no caption, other name "
        "or tag (stems are compared: plurals count; words inside compounds written as one do not).",
        f"* `val`, for tuning: the family {', '.join(sorted(rules.val_families))}, never trained on, and "
        f"{100 * rules.val_share:g} % of the other concepts. Filter by `vendor` to see the two apart.",
        "* `train`: the rest, without pictures that at 24 x 24 pixels look like one in another split.",
        "",
        "Everything is decided by hashes of names, so it does not depend on the order or on the machine. "
        "Held-out words: " + ", ".join(facts.splits.words) + ".",
    ]


def _galleries(facts: CardFacts) -> list[str]:
    captions = {d.key: d.caption for drawings in facts.splits.by_name.values() for d in drawings}
    rows = [
        [name, g["split"], len(g["keys"]), len({captions[k] for k in g["keys"]}), g["sha256"]]
        for name, g in facts.galleries.items()
    ]
    return [
        "## Galleries",
        "",
        *_table(["gallery", "split", "pictures", "captions", "sha256 of the ids"], rows),
        "",
        "`openmoji_no_people`: Unicode emoji outside people-body. `openmoji`: all of OpenMoji with its own "
        "additions. `icon_park`: user-interface icons of a vendor with its own vocabulary. `test_word`: see "
        "above.",
    ]


def _tasks(facts: CardFacts) -> list[str]:
    rows = [[name, *(counts[s] for s in ("train", "val", "test"))] for name, counts in facts.tasks.items()]
    return [
        "## Labelled tasks",
        "",
        *_table(["table", "train rows", "val rows", "test rows"], rows),
        "",
        "`match.parquet`: does this caption belong to this picture? Every picture and every caption stands "
        "once in a match and once in a mismatch within its vendor and subgroup (for icons that are no emoji: "
        "its category and place in the alphabet), so one modality alone is at 50 % by construction. The "
        "labels are made, not given by people.",
        "",
        "`category.parquet`: the emoji's group (`target`) and `subgroup`. The test's concepts are in no "
        "training row.",
        "",
        "Train rows are drawn by training vendors, test rows by OpenMoji; `group` is the concept.",
    ]


def _dropped(facts: CardFacts) -> list[str]:
    counts = facts.dropped + facts.splits.dropped
    lines = ["## Left out", "", *_table(["what", "icons"], sorted(counts.items()))]
    if facts.left_out:
        lines += ["", *_table(["set", "why"], sorted(facts.left_out.items()))]
    return lines


def _limits(_: CardFacts) -> list[str]:
    return [
        "## What it is not",
        "",
        "Icons, emoji and symbols, not photographs; captions are names of two or three words in English, not "
        "sentences. Nothing that is measured here says how a model would do on COCO or ImageNet. Emoji show "
        "people, flags and faiths the way their vendors and Unicode chose to; skin colours other than the "
        "default are left out. Some icons show logos, which are their owners' trademarks. Alternative names "
        "and tags are loose, and an icon may show what another caption says too: retrieval scores count such "
        "answers as misses.",
    ]


def _sources(facts: CardFacts) -> list[str]:
    rows = [[p.name, p.version, p.integrity[:23] + "..."] for p in (*facts.tier.packages, EMOJIBASE)]
    return [
        "## Sources",
        "",
        "npm packages, checked against their sha512:",
        "",
        *_table(["package", "version", "sha512"], rows),
    ]


def _licences(facts: CardFacts) -> list[str]:
    rows = [
        [s.prefix, f"{s.title}, by {_link(s.author, s.author_url)}", _link(s.licence, s.licence_url)]
        for s in sorted(facts.sets, key=lambda s: s.prefix)
    ]
    return [
        "## Licences",
        "",
        "Each drawing stays under the licence of its set (field `licence` of every sample). Changes made "
        "here: rendered to pixels on white, `currentColor` drawn dark. Who passes pictures on names the "
        "author and the licence as below (CC-BY, CC-BY-SA, Apache-2.0, MIT and others ask for it), keeps "
        "pictures under CC-BY-SA and GPL licences under the same licence, and looks into the licence itself: "
        "this table is a summary.",
        "",
        *_table(["set", "title and author", "licence"], rows),
        "",
        "Labels, tags and groups of emoji: emojibase-data, from Unicode's CLDR. Its licence:",
        "",
        "```",
        facts.emojibase_licence.strip(),
        "```",
    ]


def _link(text: str, url: str) -> str:
    return f"[{text}]({url})" if url else text
