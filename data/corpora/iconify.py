"""Icon sets in Iconify's JSON: icons, aliases and transformations turned into stand-alone SVG documents.

The format: https://iconify.design/docs/types/iconify-json.html
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["INK", "Icon", "IconSet", "parse_set"]

INK = "#222222"
"""What ``currentColor`` becomes; the picture's ground is white."""

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Icon:
    """One drawing of a set: its own name, its other names, its SVG document."""

    prefix: str
    name: str
    aliases: tuple[str, ...]
    svg: str
    categories: tuple[str, ...]
    code: str | None
    """Emoji code points as the set itself states them ("1f469-200d-1f9b0"), if it does."""


@dataclass
class IconSet:
    """A parsed set. ``hidden`` counts the drawings that its maker has withdrawn and that are left out."""

    prefix: str
    title: str
    author: str
    author_url: str
    licence: str
    licence_url: str
    suffixes: tuple[str, ...] = ()
    """Endings of names that the set uses for sizes and styles: "20-filled"."""
    icons: list[Icon] = field(default_factory=list[Icon])
    hidden: int = 0


def parse_set(icons: Json, info: Json, chars: Json, metadata: Json) -> IconSet:
    """A set from its four documents. Withdrawn icons and unresolvable aliases are left out.

    An alias that only renames adds a name to its icon; one that turns or flips is a drawing of its own.
    """
    prefix = str(icons["prefix"])
    author, licence = info.get("author", {}), info.get("license", {})
    out = IconSet(
        prefix,
        str(info.get("name", prefix)),
        str(author.get("name", "")),
        str(author.get("url", "")),
        str(licence.get("spdx") or licence.get("title", "")),
        str(licence.get("url", "")),
        tuple(sorted(map(str, metadata.get("suffixes", {})))),
    )
    resolved = {name: _resolve(icons, name) for name in (*icons["icons"], *icons.get("aliases", {}))}
    parent = {name: data["target"] for name, data in resolved.items() if data is not None}
    names: dict[str, list[str]] = {}
    for name, target in parent.items():
        names.setdefault(target, []).append(name)
    categories: dict[str, list[str]] = {}
    for category, members in metadata.get("categories", {}).items():
        for member in members:
            categories.setdefault(parent.get(member, member), []).append(str(category))
    codes: dict[str, str] = {}
    for code, name in chars.items():
        codes.setdefault(parent.get(name, name), str(code))
    for name in sorted(names):
        data = resolved[name]
        assert data is not None
        if data.get("hidden"):
            out.hidden += 1
            continue
        aliases = tuple(sorted(set(names[name]) - {name}))
        kept = tuple(sorted(categories.get(name, ())))
        out.icons.append(Icon(prefix, name, aliases, _svg(icons, data), kept, codes.get(name)))
    return out


def _resolve(icons: Json, name: str) -> dict[str, Any] | None:
    """The icon's own data under ``name``, with the alias chain's transformations added up and ``target``, the
    name of the drawing it shows: an icon's, or the alias's own where it turns or flips."""
    chain: list[tuple[str, Json]] = []
    at = name
    while at not in icons["icons"]:
        alias = icons.get("aliases", {}).get(at)
        if alias is None or len(chain) > 8:
            return None
        chain.append((at, alias))
        at = str(alias["parent"])
    data: dict[str, Any] = dict(icons["icons"][at]) | {"target": at}
    for own, alias in reversed(chain):
        moved = False
        for flip in ("hFlip", "vFlip"):
            if alias.get(flip):
                data[flip] = not data.get(flip, False)
                moved = True
        if alias.get("rotate"):
            data["rotate"] = (int(data.get("rotate", 0)) + int(alias["rotate"])) % 4
            moved = True
        for key in ("left", "top", "width", "height"):
            if key in alias and alias[key] != data.get(key):
                data[key] = alias[key]
                moved = True
        if "hidden" in alias and moved:
            data["hidden"] = alias["hidden"]
        if moved:
            data["target"] = own
    return data


def _svg(icons: Json, data: Json) -> str:
    """The drawing as a square SVG document, centred, ``currentColor`` made visible."""
    left, top = float(data.get("left", icons.get("left", 0))), float(data.get("top", icons.get("top", 0)))
    width = float(data.get("width", icons.get("width", 16)))
    height = float(data.get("height", icons.get("height", 16)))
    body = str(data["body"]).replace("currentColor", INK)
    centre_x, centre_y = left + width / 2, top + height / 2
    moves: list[str] = []
    if turns := int(data.get("rotate", 0)) % 4:
        moves.append(f"rotate({90 * turns} {centre_x:g} {centre_y:g})")
    if data.get("hFlip"):
        moves.append(f"translate({2 * centre_x:g} 0) scale(-1 1)")
    if data.get("vFlip"):
        moves.append(f"translate(0 {2 * centre_y:g}) scale(1 -1)")
    if moves:
        body = f'<g transform="{" ".join(moves)}">{body}</g>'
    side = max(width, height)  # a quarter turn about the centre stays inside the square
    box = f"{centre_x - side / 2:g} {centre_y - side / 2:g} {side:g} {side:g}"
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{side:g}" height="{side:g}" viewBox="{box}" color="{INK}">{body}</svg>'
    )
