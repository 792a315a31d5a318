"""Single pieces of the icon corpus: Iconify's format, names, words, splits and mismatches."""

import io
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from diptych.data.corpora.captions import Segmenter, base_name, label_caption, name_caption, stem, words
from diptych.data.corpora.emoji import EmojiTable, plain_code
from diptych.data.corpora.iconify import INK, parse_set
from diptych.data.corpora.naming import keep_icons, name_icons, sized_name
from diptych.data.corpora.render import hash_24, render
from diptych.data.corpora.sets import families
from diptych.data.corpora.splits import Drawing, SplitRules, split_drawings
from diptych.data.corpora.tasks import conflict, derange

from . import icon_packages

ARROW = (
    '<path d="M10 40h40V20l40 30-40 30V60H10z" fill="currentColor"/><rect width="20" height="10" fill="red"/>'
)


def parse(documents: dict[str, Any]) -> Any:
    return parse_set(*(documents[f"{name}.json"] for name in ("icons", "info", "chars", "metadata")))


def pixels(svg: str, size: int = 100) -> NDArray[np.int64]:
    picture = render(svg, size)
    assert picture is not None
    return np.asarray(Image.open(io.BytesIO(picture.png)), dtype=np.int64)


def drawn(aliases: dict[str, Any], **icon: Any) -> dict[str, NDArray[np.int64]]:
    """Pixels by name of a set with the icon ``arrow`` and its aliases."""
    arrow = {"arrow": {"body": ARROW, **icon}}
    parsed = parse(icon_packages.icon_set("set", {}, icons=arrow, aliases=aliases))
    return {icon.name: pixels(icon.svg) for icon in parsed.icons}


@pytest.mark.parametrize(
    ("change", "truth"),
    [
        ({"hFlip": True}, lambda a: a[:, ::-1]),
        ({"vFlip": True}, lambda a: a[::-1]),
        ({"rotate": 1}, lambda a: np.rot90(a, -1)),
        ({"rotate": 2}, lambda a: np.rot90(a, 2)),
        ({"rotate": 3, "hFlip": True}, lambda a: np.rot90(a[:, ::-1], -3)),
    ],
)
def test_turned_and_flipped_aliases_are_drawn_so(change: dict[str, Any], truth: Any) -> None:
    images = drawn({"other": {"parent": "arrow", **change}})
    assert np.abs(images["other"] - truth(images["arrow"])).mean() < 0.5


def test_changes_of_an_alias_of_an_alias_add_up() -> None:
    chain = {"back": {"parent": "there", "hFlip": True}, "there": {"parent": "arrow", "hFlip": True}}
    images = drawn(chain)
    assert (images["back"] == images["arrow"]).all()
    images = drawn({"twice": {"parent": "once", "rotate": 1}, "once": {"parent": "arrow", "rotate": 1}})
    assert np.abs(images["twice"] - np.rot90(images["arrow"], 2)).mean() < 0.5


def test_names_of_an_alias_belong_to_the_drawing_that_it_shows() -> None:
    aliases = {
        "pointer": {"parent": "arrow"},
        "left": {"parent": "arrow", "hFlip": True},
        "westward": {"parent": "left"},
        "lost": {"parent": "nowhere"},
        "loop": {"parent": "loop"},
    }
    arrow = {"arrow": {"body": ARROW}}
    parsed = parse(
        icon_packages.icon_set("set", {}, icons=arrow, aliases=aliases, categories={"C": ["pointer"]})
    )
    assert {icon.name: icon.aliases for icon in parsed.icons} == {
        "arrow": ("pointer",),
        "left": ("westward",),
    }
    assert {icon.name: icon.categories for icon in parsed.icons} == {"arrow": ("C",), "left": ()}


def test_icons_that_are_not_square_are_centred_on_white() -> None:
    body = '<rect x="20" y="-10" width="100" height="50" fill="#00f"/>'
    image = drawn({}, body=body, left=20, top=-10, width=100, height=50)["arrow"]
    assert (image[30:70] == (0, 0, 255)).all()
    assert (image[:24] == 255).all()
    assert (image[76:] == 255).all()


def test_current_colour_is_ink_and_nothing_is_nothing() -> None:
    image = drawn({})["arrow"]
    assert tuple(image[50, 30]) == tuple(int(INK[i : i + 2], 16) for i in (1, 3, 5))
    assert render("<svg/>", 16) is None
    assert render("no svg", 16) is None
    start = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 9 9" width="1in" height="1in">'
    assert render(f'{start}<rect width="9" height="9" fill="#888"/></svg>', 16) is None
    # sizes in inches need the dots per inch that the renderer is given
    assert render(f'{start}<rect width="1mm" height="5" fill="#888"/></svg>', 16) is not None


def test_the_coarse_hash_sees_copies_and_tells_others_apart() -> None:
    base = np.full((64, 64, 3), 200, dtype=np.uint8)
    base[10:40, 10:40] = 40
    nearly = base.copy()
    nearly[0, 0] += 3
    other = base.copy()
    other[10:40, 40:50] = 40
    hashes = [hash_24(Image.fromarray(a)) for a in (base, nearly, other)]
    assert hashes[0] == hashes[1] != hashes[2]


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("wolves", "wolve"), ("dogs", "dog"), ("dog", "dog"), ("cherries", "cherry"), ("boxes", "box"),
        ("glass", "glass"), ("glasses", "glass"), ("bus", "bus"), ("iris", "iris"), ("torches", "torch"),
        ("gas", "gas"), ("cacti", "cacti"),
    ],
)  # fmt: skip
def test_plurals_share_their_stem(word: str, expected: str) -> None:
    assert stem(word) == expected


def test_captions_read_like_captions() -> None:
    assert name_caption("chess-king-filled") == "chess king filled"
    assert label_caption("flag: Fiji") == "flag fiji"
    assert label_caption("Japanese “free of charge” button") == "japanese free of charge button"
    assert label_caption("family: man, woman, boy") == "family man woman boy"
    assert words("Côte d’Ivoire & Fiji") == ["cote", "divoire", "and", "fiji"]
    assert words("☃") == []


def test_only_numbers_of_further_drawings_are_taken_off() -> None:
    siblings = frozenset({"digit-zero", "digit-one", "cake-one", "cake"})
    assert base_name("cake-one", siblings, "words") == "cake"
    assert base_name("digit-one", siblings, "words") == "digit-one"
    assert base_name("selfie-2", siblings, "digits") == "selfie"
    assert base_name("dice-2", siblings, None) == "dice-2"
    assert base_name("route-66", siblings, "digits") == "route-66"


def test_names_without_spaces_are_cut_into_known_words() -> None:
    segmenter = Segmenter(["speaker with sound wave", "sound", "a cat", "wave"])
    assert segmenter.cut("speakerwith3soundwaves") is None
    assert segmenter.cut("speakerwith3soundwave") == ["speaker", "with", "3", "sound", "wave"]
    assert segmenter.cut("acat") == ["a", "cat"]
    assert segmenter.cut("") == []
    assert Segmenter([]).cut("cat") is None


def test_sizes_are_told_from_styles() -> None:
    suffixes = ("20-filled", "20-regular", "24", "outline")
    assert sized_name("home-20-filled", suffixes) == ("home", 20, "filled")
    assert sized_name("home-20-regular", suffixes) == ("home", 20, "")
    assert sized_name("home-24", suffixes) == ("home", 24, "")
    assert sized_name("home-outline", suffixes) == ("home-outline", None, "")
    assert sized_name("route-66", suffixes) == ("route-66", None, "")


def test_of_several_sizes_the_largest_is_kept() -> None:
    names = ["home-16", "home-24", "gear-16", "home-24-filled", "star"]
    documents = icon_packages.line_set("sizes", names, suffixes={"16": "", "24": "", "24-filled": ""})
    dropped: Counter[str] = Counter()
    table = table_of_labels()
    parsed = parse(documents)
    parsed.icons = keep_icons(parsed, table, dropped)
    named = name_icons([parsed], table, Counter())
    assert [one.caption for one in named] == ["gear", "home", "home filled", "star"]
    assert dropped["a smaller size of another icon"] == 1


def table_of_labels() -> EmojiTable:
    files = icon_packages.emojibase()
    return EmojiTable(files["en/data.json"], files["en/messages.json"], files["en/shortcodes/emojibase.json"])


def test_names_written_without_spaces_find_their_emoji() -> None:
    bodies = {name.replace(" ", ""): icon_packages.drawing(name) for name in icon_packages.NAMES[:9]}
    fox = parse(icon_packages.icon_set("fxemoji", {**bodies, "greykettle": ARROW, "zzz": ARROW}))
    others = parse(icon_packages.emoji_set("noto", chars=True))
    dropped: Counter[str] = Counter()
    named = {
        n.icon.name: n
        for n in name_icons([fox, others], table_of_labels(), dropped)
        if n.icon.prefix == "fxemoji"
    }
    assert named["appletree"].caption == "apple tree"
    assert named["appletree"].emoji is not None
    assert named["greykettle"].caption == "grey kettle"
    assert named["greykettle"].emoji is None
    assert "zzz" not in named
    assert dropped["a name that cannot be cut into words"] == 1


def test_flags_named_by_country_are_called_by_the_country() -> None:
    flag = {"hexcode": "1F1EB-1F1F7", "label": "flag: France", "tags": ["FR"], "group": 3, "subgroup": 3}
    files = icon_packages.emojibase()
    table = EmojiTable([*files["en/data.json"], flag], files["en/messages.json"], {})
    flags = parse(icon_packages.line_set("circle-flags", ["fr", "fr-4x3", "zz", "rainbow"]))
    others = parse(icon_packages.line_set("lines", ["fr"]))
    named = name_icons([flags, others], table, Counter())
    assert [one.caption for one in named] == ["flag france", "flag france", "rainbow", "zz", "fr"]
    assert named[0].emoji is not None
    assert named[0].emoji.code == "1f1eb-1f1f7"


def test_code_points_compare_without_presentation_selectors() -> None:
    assert plain_code("2764-FE0F-200D-1F525") == "2764-200d-1f525"


def test_sets_of_an_author_and_redraws_are_one_family() -> None:
    def of(prefix: str, author: str) -> Any:
        return parse(icon_packages.icon_set(prefix, {}, author=author))

    found = families(
        [
            of("solar-bold", "Ann"),
            of("solar", "Ann"),
            of("noto-v1", "Google"),
            of("noto", "Google"),
            of("la", "Icons8"),
        ]
    )
    assert found == {"solar-bold": "solar", "solar": "solar", "noto-v1": "noto", "noto": "noto", "la": "fa"}


# ---- splits and mismatches, on random drawings

WORDS = [
    f"{a}{b}" for a in ("king", "moon", "star", "tree", "lake") for b in ("dom", "light", "fish", "house")
]
texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=3).map(" ".join)


@st.composite
def drawings(draw: st.DrawFn) -> list[Drawing]:
    out: list[Drawing] = []
    for number in range(draw(st.integers(0, 40))):
        family = draw(st.sampled_from(["a", "b", "c", "openmoji", "icon-park"]))
        emoji = draw(st.sampled_from(["", "1f600", "1f601", "1f602"]))
        names, tags = draw(st.lists(texts, max_size=2)), draw(st.lists(texts, max_size=2))
        look = draw(st.sampled_from([*"pqrs", str(number)]))
        out.append(
            Drawing(
                f"{family}_{number}",
                family,
                family,
                draw(texts),
                tuple(names),
                tuple(tags),
                (),
                emoji,
                "",
                "",
                "MIT",
                b"",
                look,
            )
        )
    return out


EXAMPLES = settings(max_examples=50, deadline=None)
RULES = SplitRules(frozenset({"openmoji", "icon-park"}), frozenset({"c"}), 0.2, 0.3, (2, 30), "salt")


@EXAMPLES
@given(drawings(), st.randoms())
def test_splits_do_not_depend_on_the_order(content: list[Drawing], random: Any) -> None:
    first = split_drawings(content, RULES)
    shuffled = content.copy()
    random.shuffle(shuffled)
    second = split_drawings(shuffled, RULES)
    assert first.words == second.words
    for name, members in first.by_name.items():
        assert {d.key: d for d in members} == {d.key: d for d in second.by_name[name]}


@EXAMPLES
@given(drawings())
def test_nothing_leaks_between_splits(content: list[Drawing]) -> None:
    splits = split_drawings(content, RULES)
    train, val = splits.by_name["train"], splits.by_name["val"]
    vendor, word = splits.by_name["test_vendor"], splits.by_name["test_word"]
    total = sum(map(len, splits.by_name.values())) + splits.dropped.total()
    assert total == len(content)
    assert {d.family for d in train} <= {"a", "b"}
    assert {d.family for d in vendor} <= {"openmoji", "icon-park"}
    held = set(splits.words)
    for drawing in (*train, *val, *vendor):
        for text in (drawing.caption, *drawing.names, *drawing.tags):
            assert not held & set(text.split())
            assert text not in {d.caption for d in word}
        assert not drawing.emoji or drawing.emoji not in {d.emoji for d in word}
    assert not {d.caption for d in train} & {d.caption for d in val if d.family != "c"}
    assert not {d.hash_24 for d in train} & {d.hash_24 for d in (*val, *vendor, *word)}


@EXAMPLES
@given(drawings())
def test_mismatches_use_every_picture_and_caption_once_and_are_false(content: list[Drawing]) -> None:
    pairs = derange(content)
    pictures, captions = [a.key for a, _ in pairs], [b.key for _, b in pairs]
    assert sorted(pictures) == sorted(captions)
    assert len(set(pictures)) == len(pictures)
    for picture, other in pairs:
        assert not conflict(picture, other)
        assert other.caption not in (picture.caption, *picture.names)
        assert not picture.emoji or picture.emoji != other.emoji
        assert not set(other.caption.split()) <= set(picture.caption.split())


@EXAMPLES
@given(drawings())
def test_all_take_part_where_a_full_exchange_exists(content: list[Drawing]) -> None:
    """Against brute force: whoever is left out cannot be added by a plain exchange with another left out."""
    taking_part = {a.key for a, _ in derange(content)}
    left = [d for d in content if d.key not in taking_part]
    assert all(conflict(a, b) or conflict(b, a) for i, a in enumerate(left) for b in left[i + 1 :])
