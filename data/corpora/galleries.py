"""The galleries: fixed lists of held-out pictures that every evaluation on the corpus uses."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from ...configs.errors import UserError
from .pins import RENDERER
from .splits import Splits

__all__ = ["check_galleries", "gallery_hash", "make_galleries"]

Galleries = dict[str, dict[str, Any]]


def gallery_hash(keys: Sequence[str]) -> str:
    """Sha256 of the ids, one per line, in their order."""
    return hashlib.sha256("\n".join(keys).encode()).hexdigest()


def make_galleries(splits: Splits) -> Galleries:
    """``{name: {"split", "keys", "sha256"}}``, keys sorted; galleries without pictures are left out.

    ``openmoji_no_people``: OpenMoji's Unicode emoji outside the group people-body. ``openmoji``: all of
    OpenMoji, its own additions to Unicode included. ``icon_park``: line icons of user interfaces.
    ``test_word``: everyone's drawings of the concepts with held-out words.
    """
    vendor, word = splits.by_name["test_vendor"], splits.by_name["test_word"]
    openmoji = [d for d in vendor if d.vendor == "openmoji"]
    chosen = {
        "openmoji_no_people": ("test_vendor", [d for d in openmoji if d.emoji and d.group != "people-body"]),
        "openmoji": ("test_vendor", openmoji),
        "icon_park": ("test_vendor", [d for d in vendor if d.vendor == "icon-park"]),
        "test_word": ("test_word", word),
    }
    out: Galleries = {}
    for name, (split, drawings) in chosen.items():
        if drawings:
            keys = sorted(drawing.key for drawing in drawings)
            out[name] = {"split": split, "keys": keys, "sha256": gallery_hash(keys)}
    return out


def check_galleries(galleries: Galleries, expected: Mapping[str, str]) -> None:
    """UserError unless every gallery in ``expected`` holds the ids whose hash stands there."""
    for name, sha256 in expected.items():
        found = galleries.get(name, {"sha256": "missing", "keys": []})
        if found["sha256"] != sha256:
            raise UserError(
                f"gallery {name} has {len(found['keys'])} pictures with the hash {found['sha256'][:12]}, "
                f"expected {sha256[:12]}: scores would not compare; `pip install {RENDERER}`, with which the "
                "galleries were made, and fetch again"
            )
