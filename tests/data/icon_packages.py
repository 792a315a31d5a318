"""Small npm packages of icons, drawn on the spot: every trap of the real ones, none of their bulk."""

import base64
import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from diptych.data.corpora import icons, naming
from diptych.data.corpora.pins import EMOJI_SETS, TIERS, Package, Tier
from diptych.data.corpora.splits import SplitRules

NAMES = [
    "apple tree",
    "garden apple",
    "grey wolf",
    "snow wolf",
    "rolling river",
    "river stone",
    "paper lantern",
    "lantern fish",
    "silver spoon",
    "spoon rest",
    "green valley",
    "valley road",
    "candle light",
    "candle maker",
    "copper kettle",
    "kettle drum",
    "wooden ladder",
    "ladder truck",
    "velvet curtain",
    "curtain call",
    "marble statue",
    "statue garden",
    "golden arrow",
    "arrow head",
    "winter jacket",
    "jacket pocket",
    "carrot cake",
    "carrot patch",
    "dragon fly",
    "dragon boat",
    "castle gate",
    "castle wall",
    "harbour crane",
    "crane bird",
    "desert camel",
    "camel race",
    "forest mushroom",
    "mushroom soup",
    "bridge tower",
    "tower clock",
]
"""Labels of the emoji; every second one in group animals-nature, the others in objects, four in
people-body."""
PEOPLE = {"candle maker", "crane bird", "camel race", "statue garden"}
GROUPS = ("smileys-emotion", "people-body", "animals-nature", "objects")

Files = Mapping[str, Any]


def code(label: str) -> str:
    return f"{0x1F400 + NAMES.index(label):x}"


def slug(label: str) -> str:
    return label.replace(" ", "-")


def drawing(seed: str) -> str:
    """An SVG body of 100 x 100 units that depends on ``seed``."""
    digest = hashlib.sha256(seed.encode()).digest()
    shapes: list[str] = []
    for i in range(0, 24, 6):
        x, y, w, h, hue, kind = digest[i : i + 6]
        fill = f"hsl({hue * 360 // 256} 80% 40%)"
        if kind % 2:
            shapes.append(f'<circle cx="{x % 80 + 10}" cy="{y % 80 + 10}" r="{w % 20 + 8}" fill="{fill}"/>')
        else:
            box = f'x="{x % 70}" y="{y % 70}" width="{w % 40 + 10}" height="{h % 40 + 10}"'
            shapes.append(f'<rect {box} fill="{fill}"/>')
    return "".join(shapes)


def icon_set(
    prefix: str, bodies: Mapping[str, str], *, author: str | None = None, spdx: str = "MIT", **documents: Any
) -> dict[str, Any]:
    """The four documents of a set; ``documents`` adds aliases, chars, categories, suffixes, or extra
    icons."""
    icons: dict[str, Any] = {name: {"body": body} for name, body in bodies.items()}
    icons |= documents.get("icons", {})
    info = {
        "prefix": prefix,
        "name": f"Set {prefix}",
        "author": {"name": author or f"Maker of {prefix}", "url": f"https://example.org/{prefix}"},
        "license": {"title": spdx, "spdx": spdx, "url": f"https://example.org/{prefix}/licence"},
    }
    return {
        "icons.json": {
            "prefix": prefix,
            "icons": icons,
            "aliases": documents.get("aliases", {}),
            "width": 100,
            "height": 100,
        },
        "info.json": info,
        "chars.json": documents.get("chars", {}),
        "metadata.json": {
            "categories": documents.get("categories", {}),
            "suffixes": documents.get("suffixes", {}),
        },
    }


def emoji_set(prefix: str, *, chars: bool, spdx: str = "MIT", artwork: str | None = None) -> dict[str, Any]:
    """All of ``NAMES`` as drawn by ``prefix``, one of them in another skin colour, one withdrawn, one
    blank."""
    bodies = {slug(name): drawing(f"{artwork or prefix} {name}") for name in NAMES}
    toned = {"candle-maker-dark-skin-tone": {"body": drawing(prefix + " dark")}}
    hidden = {"old-apple": {"body": drawing(prefix + " old"), "hidden": True}}
    nothing = {"empty-room": {"body": '<rect width="100" height="100" fill="#fff"/>'}}
    return icon_set(
        prefix,
        bodies,
        spdx=spdx,
        icons={**toned, **hidden, **nothing},
        aliases={f"{slug(NAMES[3])}-alias": {"parent": slug(NAMES[3])}},
        chars={code(name): slug(name) for name in NAMES} if chars else {},
        categories={"Things": [slug(name) for name in NAMES]},
    )


def line_set(
    prefix: str, names: list[str], *, artwork: str | None = None, **documents: Any
) -> dict[str, Any]:
    """A set of user-interface icons without code points."""
    bodies = {name: drawing(f"{artwork or prefix} {name}") for name in names}
    return icon_set(prefix, bodies, spdx="Apache-2.0", **documents)


def emojibase() -> dict[str, Any]:
    entries: list[dict[str, Any]] = []
    for number, name in enumerate(NAMES):
        group = 1 if name in PEOPLE else 2 + number % 2
        first, second = name.split()
        entry = {
            "label": f"{first.title()}: {second}" if number == 0 else name,
            "hexcode": code(name).upper(),
            "tags": [first, f"{second}s"],
            "group": group,
            "subgroup": group,
            "order": number,
        }
        if name == "candle maker":
            entry["skins"] = [{"hexcode": f"{code(name).upper()}-1F3FF"}]
        entries.append(entry)
    keys = [{"key": key, "order": order} for order, key in enumerate(GROUPS)]
    return {
        "en/data.json": entries,
        "en/messages.json": {"groups": keys, "subgroups": [{**k, "key": k["key"] + "-all"} for k in keys]},
        "en/shortcodes/emojibase.json": {code(n).upper(): n.replace(" ", "_") + "_short" for n in NAMES},
        "LICENSE": "Licence of the labels",
    }


def archive(files: Files) -> bytes:
    """An npm archive: ``files`` under ``package/``, JSON for what is no text."""
    buffer = io.BytesIO()
    with (
        gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as tar,
    ):
        for name, content in files.items():
            data = (content if isinstance(content, str) else json.dumps(content)).encode()
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def integrity(data: bytes) -> str:
    return "sha512-" + base64.b64encode(hashlib.sha512(data).digest()).decode()


def store(cache: Path, name: str, files: Files) -> Package:
    """Put an archive where fetched ones lie, and pin it."""
    data = archive(files)
    package = Package(name, "1.0.0", integrity(data))
    (cache / "npm").mkdir(parents=True, exist_ok=True)
    (cache / "npm" / package.filename).write_bytes(data)
    return package


INTERFACE = [
    f"{what}-{how}" for what in ("home", "folder", "window", "cloud") for how in ("add", "lock", "open")
]


def demo_sets() -> list[dict[str, Any]]:
    twin = drawing("a twin")
    return [
        emoji_set("alpha", chars=True, spdx="CC-BY-4.0"),
        emoji_set("noto", chars=True),
        emoji_set("noto-v1", chars=False, artwork="old noto"),
        emoji_set("streamline-emojis", chars=False),
        {**emoji_set("openmoji", chars=True, spdx="CC-BY-SA-4.0")},
        line_set("icon-park", [*(f"{n}-one" for n in INTERFACE), "chair-two", *INTERFACE[:4]]),
        line_set(
            "lines",
            [*INTERFACE, "kettle-off", "wolf-outline"],
            icons={"twin-brother": {"body": twin}, "twin-of-many-names": {"body": twin}},
            aliases={
                "house-add": {"parent": "home-add"},
                "home-mirrored": {"parent": "home-lock", "hFlip": True},
            },
        ),
        line_set("copycat", ["stolen"], icons={"stolen": {"body": drawing("icon-park chair-two")}}),
    ]


RULES = SplitRules(
    test_families=frozenset({"openmoji", "icon-park"}),
    val_families=frozenset({"streamline-emojis"}),
    val_share=0.1,
    word_share=0.15,
    word_pictures=(3, 40),
    salt="test",
)


def small_tier(cache: Path) -> tuple[Tier, Package]:
    """A demo tier of small packages, stored in ``cache``, and the package of emoji labels."""
    packages = tuple(store(cache, f"@iconify-json/{s['info.json']['prefix']}", s) for s in demo_sets())
    return Tier("demo", packages, RULES, {}), store(cache, "emojibase-data", emojibase())


def use_small_packages(patch: pytest.MonkeyPatch, cache: Path, **changes: Any) -> Tier:
    tier, labels = small_tier(cache)
    tier = Tier(**{**vars(tier), **changes})
    patch.setenv("DIPTYCH_CACHE", str(cache))
    patch.setitem(TIERS, "demo", tier)
    patch.setattr(icons, "EMOJIBASE", labels)
    patch.setattr(naming, "EMOJI_SETS", EMOJI_SETS | {"alpha"})
    return tier
