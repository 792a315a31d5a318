"""What a file of the Open Clip Art Library says of itself: title, author and licence, and whether it may be
drawn."""

import html
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from xml.etree import ElementTree

from .captions import words

__all__ = ["Clipart", "is_drawing", "read_clipart"]

ROOT = PurePosixPath("usr/share/openclipart/svg")
_DC, _RDF = "{http://purl.org/dc/elements/1.1/}", "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
# an entity may stand for a namespace, as Illustrator writes, and for no markup or other entity
_ENTITY = re.compile(r"<!ENTITY\s(?!\s*[\w.:-]+\s+(\"[^\"<&%]*\"|'[^'<&%]*')\s*>)")
# resvg would read a picture from the local disk
_OUTSIDE = re.compile(r"<(?:[\w.-]+:)?(?:image|feImage)\b(?=[^>]*\bhref\s*=\s*[\"'](?!\s*(?:data:|#)))")
_COLLECTION = re.compile(r"clipart by [^-]+ - ", re.IGNORECASE)


@dataclass(frozen=True)
class Clipart:
    """A drawing before it is drawn. ``folder``: the library's category."""

    key: str
    folder: str
    title: str
    author: str
    svg: str = field(repr=False)


def read_clipart(
    members: Iterable[tuple[str, bytes]], titles_only: frozenset[str], dropped: Counter[str]
) -> list[Clipart]:
    """Those of the files (path, bytes) that have title, author and the licence "public domain", in the order
    of their keys. Of folders in ``titles_only`` the SVG is not kept. What is left out is counted in
    ``dropped``."""
    out: list[Clipart] = []
    for path, data in members:
        inside = PurePosixPath(path).relative_to(ROOT)
        svg = data.decode("utf-8", "replace").lstrip("\ufeff")
        if reason := _unfit(svg):
            dropped[reason] += 1
            continue
        said = _metadata(svg)
        if said is None:
            dropped["no title in Latin letters, no author or not in the public domain"] += 1
            continue
        key, folder = str(inside.with_suffix("")).replace(".", "_"), inside.parts[0]
        out.append(Clipart(key, folder, *said, "" if folder in titles_only else svg))
    return sorted(out, key=lambda one: one.key)


def is_drawing(path: str) -> bool:
    """Whether a file of the package is a drawing in a category."""
    inside = PurePosixPath(path)
    return inside.suffix == ".svg" and inside.is_relative_to(ROOT) and len(inside.parts) > len(ROOT.parts) + 1


def _unfit(svg: str) -> str | None:
    """Why an SVG is not to be parsed, if so."""
    if _ENTITY.search(svg):
        return "entities that hold markup"
    if _OUTSIDE.search(svg):
        return "shows a file of its author's disk"
    return None


def _metadata(svg: str) -> tuple[str, str] | None:
    """(title, author) of a drawing in the public domain; None if one is missing or says nothing."""
    try:
        root = ElementTree.fromstring(svg)
    except (ElementTree.ParseError, ValueError):
        return None
    work = next((e for e in root.iter() if e.tag.endswith("}Work")), None)
    if work is None:
        return None
    licences = [e.get(_RDF + "resource", "") for e in work if e.tag.endswith("}license")]
    creator = work.find(_DC + "creator")
    title = _COLLECTION.sub("", _mended(work.findtext(_DC + "title") or ""))
    author = _mended(creator.findtext(f".//{_DC}title") or "") if creator is not None else ""
    author = re.sub(r"\s*[\[<(][^\])>]*[\])>]", "", author)  # an address
    title = " ".join(title.replace("_", " ").split())
    if not any(uri.lower().rstrip("/").endswith("publicdomain") for uri in licences):
        return None
    if not words(title) or not words(author) or words(title) == words(author):
        return None
    return title, " ".join(words(author))


def _mended(text: str) -> str:
    """Text without what the library's upload form did to it: entities escaped twice, UTF-8 read as Latin-1
    ("L&Atilde;&copy;zard" was "Lézard")."""
    text = html.unescape(html.unescape(text))
    with suppress(UnicodeError):
        text = text.encode("latin-1").decode("utf-8")
    return " ".join(text.split())
