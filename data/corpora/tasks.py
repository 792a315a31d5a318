"""Labelled tasks from the corpus: tables of references to its pictures, for fine-tuning.

``match``: does this caption belong to this picture? Every picture and every caption stands once in a match
and once in a mismatch with a near neighbour (same vendor, same subgroup), so a model that sees one modality
alone is at 50 % by construction. ``category``: the group and subgroup of an emoji, on concepts that the
training rows do not have.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from .captions import words
from .splits import Drawing, Splits, share_of

__all__ = ["category_rows", "conflict", "derange", "match_rows", "write_tasks"]

CLUSTER = 16
"""Drawings without a subgroup are matched against this many neighbours in the order of their captions."""
TEST_VENDOR = "openmoji"
MIN_CLASS_ROWS = 8
Row = dict[str, Any]


@dataclass(frozen=True)
class _Texts:
    """What a drawing is called, as sets of words."""

    emoji: str
    caption: frozenset[str]
    called: frozenset[frozenset[str]]

    @staticmethod
    def of(drawing: Drawing) -> "_Texts":
        caption = frozenset(words(drawing.caption))
        return _Texts(
            drawing.emoji, caption, frozenset({caption, *(frozenset(words(name)) for name in drawing.names)})
        )

    def conflicts(self, other: "_Texts") -> bool:
        return (
            (self.emoji != "" and self.emoji == other.emoji)
            or self.caption <= other.caption
            or other.caption <= self.caption
            or not self.called.isdisjoint(other.called)
        )


def conflict(a: Drawing, b: Drawing) -> bool:
    """Whether the caption of ``b`` might also be true of ``a``: the same emoji or name, a shared alternative
    name, or one caption within the other ("cat" and "cat face")."""
    return _Texts.of(a).conflicts(_Texts.of(b))


def derange(drawings: Sequence[Drawing]) -> list[tuple[Drawing, Drawing]]:
    """Pairs (picture, other's caption) without a conflict, in which each drawing that takes part stands
    once on either side. Drawings for which there is no partner are left out.

    Kuhn's augmenting paths; candidates are tried in the order of a hash, so the result is fixed but
    unordered.
    """
    members = sorted(drawings, key=lambda d: _digest(d.key))
    texts = {d.key: _Texts.of(d) for d in members}
    while True:
        n, called = len(members), [texts[d.key] for d in members]
        # the next in the hashed circle first: mostly a plain rotation, repaired where it conflicts
        options = [
            [j % n for j in range(i + 1, i + n) if not called[i].conflicts(called[j % n])] for i in range(n)
        ]
        taker: dict[int, int] = {}

        def place(
            i: int, seen: set[int], options: list[list[int]] = options, taker: dict[int, int] = taker
        ) -> bool:
            for j in options[i]:
                if j not in seen:
                    seen.add(j)
                    if j not in taker or place(taker[j], seen):
                        taker[j] = i
                        return True
            return False

        stuck = {i for i in range(n) if not place(i, set())}
        if not stuck:
            return [(members[i], members[j]) for j, i in sorted(taker.items(), key=lambda pair: pair[1])]
        members = [member for i, member in enumerate(members) if i not in stuck]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _clusters(drawings: Sequence[Drawing]) -> list[list[Drawing]]:
    """Near neighbours: per vendor the emoji of a subgroup, or others whose captions stand together in the
    alphabet and in the set's own category."""
    by_name: dict[tuple[str, str, str], list[Drawing]] = defaultdict(list)
    for d in drawings:
        kind = (
            ("subgroup", d.subgroup) if d.subgroup else ("category", d.categories[0] if d.categories else "")
        )
        by_name[d.vendor, *kind].append(d)
    out: list[list[Drawing]] = []
    for (_, kind, _), members in sorted(by_name.items()):
        if kind == "subgroup":
            out.append(members)
            continue
        members = sorted(members, key=lambda d: (d.caption, d.key))
        parts = max(1, round(len(members) / CLUSTER))
        cuts = [round(i * len(members) / parts) for i in range(parts + 1)]
        out.extend(members[a:b] for a, b in pairwise(cuts))
    return out


def _row(drawing: Drawing, folder: str, text: str, target: Any, split: str, suffix: str = "") -> Row:
    return {
        "id": drawing.key + suffix,
        "image": f"../{folder}#{drawing.key}",
        "text": text,
        "target": target,
        "group": concept(drawing),
        "split": split,
    }


def concept(drawing: Drawing) -> str:
    """What a drawing shows, the same for every vendor: its emoji's code points, else its caption."""
    return drawing.emoji or drawing.caption


def match_rows(splits: Splits) -> list[Row]:
    """Rows of ``match``, target 1 for a match. Train: pictures of ``train``; val: of ``val`` (a vendor and
    concepts that pretraining has not seen, like the test); test: the emoji of the held-out emoji vendor."""
    parts = {
        "train": ("train", splits.by_name["train"]),
        "val": ("val", splits.by_name["val"]),
        "test": (
            "test_vendor",
            [d for d in splits.by_name["test_vendor"] if d.vendor == TEST_VENDOR and d.emoji],
        ),
    }
    rows: list[Row] = []
    for split, (folder, drawings) in parts.items():
        for cluster in _clusters(drawings):
            for picture, other in derange(cluster):
                rows.append(_row(picture, folder, picture.caption, 1, split, ":match"))
                rows.append(_row(picture, folder, other.caption, 0, split, ":mismatch"))
    return rows


def category_rows(splits: Splits) -> list[Row]:
    """Rows of ``category``: ``target`` is the emoji's group, ``subgroup`` its subgroup, the text its
    caption.

    Concepts are dealt to train, val and test by hash (60, 10, 30 %): a caption of the test stands in no
    training row. Train and val are drawn by the training vendors, the test by the held-out one. Subgroups
    with too few training rows are left out.
    """
    rows: list[Row] = []
    for folder in ("train", "test_vendor"):
        for d in splits.by_name[folder]:
            share = share_of(concept(d), "diptych category")
            split = "train" if share < 0.6 else "val" if share < 0.7 else "test"
            held_out = folder == "test_vendor"
            if d.emoji and (split == "test") == held_out and (not held_out or d.vendor == TEST_VENDOR):
                rows.append({**_row(d, folder, d.caption, d.group, split), "subgroup": d.subgroup})
    counts = Counter(row["subgroup"] for row in rows if row["split"] == "train")
    return [row for row in rows if counts[row["subgroup"]] >= MIN_CLASS_ROWS]


def write_tasks(folder: Path, splits: Splits) -> dict[str, Counter[str]]:
    """Write ``match.parquet`` and ``category.parquet``, rows in the order of a hash; rows per split."""
    folder.mkdir(parents=True)
    counts: dict[str, Counter[str]] = {}
    for name, rows in (("match", match_rows(splits)), ("category", category_rows(splits))):
        rows.sort(key=lambda row: _digest(row["id"]))
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet", compression="zstd")
        counts[name] = Counter(row["split"] for row in rows)
    return counts
