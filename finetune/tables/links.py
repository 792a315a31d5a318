"""Tasks of pairs: which pictures and texts are the same, which belong together, and in groups that hold both.

A row of such a table is a pair that matches. What a row holds is told by content: pictures by the sha256 of
their bytes, texts by their canonical words, whatever they are called. Numbers are hashes of 64 bits, so they
depend on the content alone and not on which other rows there are.
"""

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from ...configs.errors import UserError
from ...data.canonical import canonical_caption
from ..config import LabelledDataConfig, TaskConfig
from .cells import BrokenPicture, Picture, PictureReader
from .manifest import Rows, is_missing

__all__ = ["GALLERY", "KEY", "MISSING", "PICTURE", "TEXT", "components", "linked"]

Ints = NDArray[np.int64]
PICTURE, TEXT, KEY, GALLERY = range(4)
"""Columns of the targets of a retrieval task, int64 [n, 4]: the row's picture, its text, what its picture
and text match (the value of the target column, else the row itself), and where it is searched (a fold)."""
MISSING = 0


def components(*columns: Ints) -> Ints:
    """Rows [n] that are joined, also over other rows, by an equal number in some column: a number each from 0
    on, int64 [n]. ``MISSING`` joins nothing."""
    n = len(columns[0])
    rows: list[Ints] = []
    nodes: list[Ints] = []
    size = n
    for column in columns:
        there = np.flatnonzero(column != MISSING)
        names, number = np.unique(column[there], return_inverse=True)
        rows.append(there)
        nodes.append(number + size)
        size += len(names)
    edges = np.concatenate(rows), np.concatenate(nodes)
    graph = coo_matrix((np.ones(len(edges[0]), dtype=np.int8), edges), shape=(size, size))
    return connected_components(graph, directed=False)[1][:n].astype(np.int64)


def linked(rows: Rows, task: TaskConfig, data: LabelledDataConfig) -> Rows:
    """Rows of a task of pairs, ready for it: ``targets`` are the columns above (matching: 1, as every row
    matches), and rows that share a group, a picture, a text or what they match are one group.

    Rows of other tasks are returned as they are. Raises UserError for a pair of a matching task that is none,
    and where rows that belong together stand in several splits, which ``data`` may allow.
    """
    if not task.of_pairs:
        return rows
    n = len(rows)
    found = np.zeros((n, 4), dtype=np.int64)
    found[:, PICTURE] = _pictures([cell and cell[0] for cell in rows.cells["image"]])
    found[:, TEXT] = [
        MISSING if text is None else _number("text", canonical_caption(text)) for text in rows.cells["text"]
    ]
    cells = rows.targets or [None] * n
    found[:, KEY] = [
        _number("row", rows.ids[i]) if is_missing(cell) else _number("value", str(cell).strip())
        for i, cell in enumerate(cells)
    ]
    groups = np.unique(rows.groups, return_inverse=True)[1] + 1
    of = components(groups, found[:, PICTURE], found[:, TEXT], found[:, KEY])
    first = np.unique(of, return_index=True)[1]
    _check_splits(rows, of, data)
    rows = replace(rows, groups=[rows.groups[first[c]] for c in of])
    if task.type == "retrieval":
        return replace(rows, targets=list(found))
    for i in np.flatnonzero((found[:, PICTURE] == MISSING) | (found[:, TEXT] == MISSING))[:1]:
        lacks = "image" if found[i, PICTURE] == MISSING else "text"
        raise UserError(
            f"{rows.source}: row {i + 1} has no {lacks}; a pair of a matching task needs both: fill the cell "
            "or remove the row"
        )
    return replace(rows, targets=[1] * n)


def _check_splits(rows: Rows, groups: Ints, data: LabelledDataConfig) -> None:
    if not rows.splits or data.group_across_splits == "allow":
        return
    seen: dict[int, int] = {}
    for i, group in enumerate(groups.tolist()):
        first = seen.setdefault(group, i)
        if rows.splits[first] != rows.splits[i]:
            raise UserError(
                f"{rows.source}: rows {first + 1} and {i + 1} belong together, by a picture, a text, a group "
                f"or what they match, and stand in splits {rows.splits[first]} and {rows.splits[i]}; put "
                "such rows into one split, or set data.group_across_splits=allow if the splits differ in "
                "something else"
            )


def _pictures(pictures: Any) -> Ints:
    """The number of every row's picture, int64 [n]. One that cannot be read is told apart by its place: that
    it is broken is told when it is encoded."""
    reader, known = PictureReader(), dict[Picture, int]()
    for picture in pictures:
        if picture is not None and picture not in known:
            try:
                known[picture] = _number("picture", reader.fingerprint(picture))
            except BrokenPicture:
                known[picture] = _number("broken", str(picture))
    return np.array([MISSING if one is None else known[one] for one in pictures], dtype=np.int64)


def _number(kind: str, content: str) -> int:
    digest = hashlib.blake2b(f"{kind}\0{content}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1
