"""``diptych data fetch clipart``: a labelled table from Debian's package of the Open Clip Art Library.

Each drawing has a picture, the title that its author gave it, and the folder that the library's editors put
it in: what is shown, from picture and title, is a task in which both modalities say something. Keywords,
descriptions and file names are left out, as they often hold the label.

The folder is made under a temporary name and renamed, pictures that are drawn already are taken up again.
"""

import hashlib
import json
import shutil
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ...configs.errors import UserError
from ...configs.files import cache_dir
from ..shards import ShardWriter
from .captions import words
from .clipart_svg import Clipart, is_drawing, read_clipart
from .debian import download_package, read_members
from .iconify import Icon
from .places import STAMP, put_in_place, refuse_other_things, stamp_of, told_of_space
from .render import Picture, Renderer, read_pictures, renderer_version

__all__ = ["PACKAGE", "PINNED", "fetch_clipart", "make_clipart"]

PACKAGE = "openclipart-svg"
PINNED = "989712d90d57dfa3230049f553bb43b76c30ee4d4b8c5f6e106e33f7db5cbdc5"
"""sha256 of version 1:0.18+dfsg-19, of Debian 12, from which the figures in docs/finetune/results.md come.
Other versions are taken too, as Debian serves one per release; ``corpus.json`` tells which it was."""

RECIPE = 1
"""Raised with every change of what the same package becomes."""

NO_SUBJECT = frozenset({"buttons", "logos", "shapes", "special", "unsorted"})
"""Folders that do not say what a drawing shows."""
MIN_DRAWINGS = 25  # of a category
COLLECTION = 6
"""A title on more files than this is the name of a collection, as "Lemon SVG theme", or was copied."""

Progress = Callable[[str, int, int], None]


def _silent(what: str, done: int, total: int) -> None:
    """No progress."""


@dataclass(frozen=True)
class _Drawn:
    """A drawing with its picture."""

    clipart: Clipart
    picture: Picture


def fetch_clipart(
    *,
    deb: Path | None = None,
    image_size: int = 224,
    out: Path | None = None,
    progress: Progress = _silent,
    processes: int | None = None,
) -> Path:
    """The folder of the clip art corpus, made if it is not there yet (or was made by another recipe or of
    another package).

    ``deb``: the package as a file; None fetches it with apt. ``out``: default
    ``cache_dir()/corpora/clipart``. ``progress`` is told (what, done, total). Raises UserError: no apt, no
    network, an archive that is not the package, no space, a folder of other things at ``out``.
    """
    if not 16 <= image_size <= 1024:
        raise UserError(f"image size {image_size} is not between 16 and 1024 pixels; 224 is usual")
    folder = Path(out) if out is not None else cache_dir() / "corpora" / "clipart"
    made = stamp_of(folder)
    with told_of_space(folder, "it takes 150 MB on the way"):
        if deb is None and made is not None and made == _identity(made.get("sha256", ""), image_size):
            return folder
        archive = _archive(deb, progress)
        with archive.open("rb") as file:
            identity = _identity(hashlib.file_digest(file, "sha256").hexdigest(), image_size)
        if made == identity:
            return folder
        refuse_other_things(folder, "clipart.parquet")
        return make_clipart(folder, archive, identity, progress=progress, processes=processes)


def _archive(deb: Path | None, progress: Progress) -> Path:
    """The package: the given file, the one fetched before, or a fresh one."""
    if deb is not None:
        if not deb.is_file():
            raise UserError(f"--deb {deb}: there is no such file; give Debian's {PACKAGE} as a .deb")
        return deb
    kept = cache_dir() / "debian"
    if found := sorted(kept.glob(f"{PACKAGE}_*.deb")):
        return found[-1]
    progress(f"package {PACKAGE}", 0, 1)
    return download_package(PACKAGE, kept)


def _identity(sha256: str, image_size: int) -> dict[str, Any]:
    """What the corpus is made of; two with equal identities hold the same."""
    return {"corpus": "clipart", "recipe": RECIPE, "image_size": image_size, "sha256": sha256}


def make_clipart(
    folder: Path,
    archive: Path,
    identity: Mapping[str, Any],
    *,
    progress: Progress = _silent,
    processes: int | None = None,
) -> Path:
    """Read, choose, draw and write; ``folder`` appears at the end. ``identity`` holds ``image_size``."""
    staging = folder.with_name(f".{folder.name}.partial")
    dropped: Counter[str] = Counter()
    progress("read the package", 0, 1)
    chosen = _choose(read_clipart(read_members(archive, is_drawing), NO_SUBJECT, dropped), dropped)
    drawn = _draw(chosen, staging / "pictures", int(identity["image_size"]), dropped, progress, processes)
    kept = _large_categories(_one_author_per_title(_no_copies(drawn, dropped), dropped), dropped)
    if not kept:
        raise UserError(
            f"{archive} holds no drawings with title, author and category; give Debian's {PACKAGE}"
        )
    new = staging / "corpus"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    progress("write", 0, 1)
    _write(new, sorted(kept, key=lambda d: hashlib.sha256(d.clipart.key.encode()).digest()))
    figures = _figures(identity, archive, kept, dropped)
    (new / "README.md").write_text(_card(figures), encoding="utf-8")
    (new / STAMP).write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    put_in_place(folder, new, staging)
    return folder


def _choose(found: Sequence[Clipart], dropped: Counter[str]) -> list[Clipart]:
    """Drawings with a title of their own."""
    times = Counter(" ".join(words(one.title)) for one in found)
    out: list[Clipart] = []
    for one in found:
        if one.folder in NO_SUBJECT:
            dropped["folder that names no subject"] += 1
        elif times[" ".join(words(one.title))] > COLLECTION:
            dropped["title of a whole collection"] += 1
        else:
            out.append(one)
    return out


def _draw(
    chosen: Sequence[Clipart],
    folder: Path,
    size: int,
    dropped: Counter[str],
    progress: Progress,
    processes: int | None,
) -> list[_Drawn]:
    """The pictures, one category after the other."""
    by_folder: dict[str, list[Clipart]] = defaultdict(list)
    for one in chosen:
        by_folder[one.folder].append(one)
    out: list[_Drawn] = []
    with Renderer(folder, size, square=True, processes=processes) as renderer:
        for name, members in sorted(by_folder.items()):
            icons = [Icon("clipart", one.key, (), one.svg, (), None) for one in members]
            file = renderer.draw(icons, partial(_tell, progress, name, len(icons)))
            for one, picture in zip(members, read_pictures(file), strict=True):
                if picture is None:
                    dropped["blank or not drawable"] += 1
                else:
                    out.append(_Drawn(replace(one, svg=""), picture))
    return out


def _tell(progress: Progress, name: str, total: int, done: int) -> None:
    progress(f"draw {name}", done, total)


def _no_copies(drawn: Sequence[_Drawn], dropped: Counter[str]) -> list[_Drawn]:
    """Of pictures that look the same the first by name, and none where they are of different categories."""
    same: dict[str, list[_Drawn]] = defaultdict(list)
    for one in sorted(drawn, key=lambda d: d.clipart.key):
        same[one.picture.hash_24].append(one)
    out: list[_Drawn] = []
    for members in same.values():
        clear = len({one.clipart.folder for one in members}) == 1
        out += members[:1] if clear else []
        dropped["looks like another one" if clear else "in two categories"] += len(members) - clear
    return out


def _one_author_per_title(drawn: Sequence[_Drawn], dropped: Counter[str]) -> list[_Drawn]:
    """Of a title that several authors gave, the drawings by the one with most of them, of equals the first by
    name: with authors as groups no title is in training and test."""
    authors: dict[str, Counter[str]] = defaultdict(Counter)
    for one in drawn:
        authors[_title(one)][one.clipart.author] += 1
    of = {title: min(count, key=lambda a: (-count[a], a)) for title, count in authors.items()}
    out = [one for one in drawn if of[_title(one)] == one.clipart.author]
    dropped["title that another author gave too"] += len(drawn) - len(out)
    return out


def _title(one: _Drawn) -> str:
    return " ".join(words(one.clipart.title))


def _large_categories(drawn: Sequence[_Drawn], dropped: Counter[str]) -> list[_Drawn]:
    counts = Counter(one.clipart.folder for one in drawn)
    out = [one for one in drawn if counts[one.clipart.folder] >= MIN_DRAWINGS]
    dropped[f"category of fewer than {MIN_DRAWINGS}"] += len(drawn) - len(out)
    return out


def _write(folder: Path, drawn: Sequence[_Drawn]) -> None:
    """Shards of the pictures, and the table."""
    rows: list[dict[str, str]] = []
    with ShardWriter(folder / "pictures") as writer:
        for one in drawn:
            c = one.clipart
            writer.write(c.key, one.picture.png, "png", c.title, {"category": c.folder, "author": c.author})
            rows.append(
                {
                    "id": c.key,
                    "image": f"pictures#{c.key}",
                    "title": c.title,
                    "category": c.folder,
                    "author": c.author,
                }
            )
    pq.write_table(pa.Table.from_pylist(rows), folder / "clipart.parquet", compression="zstd")


def _figures(
    identity: Mapping[str, Any], archive: Path, kept: Sequence[_Drawn], dropped: Counter[str]
) -> dict[str, Any]:
    """``corpus.json``."""
    return {
        "made_of": dict(identity),
        "package": archive.name,
        "pinned": identity["sha256"] == PINNED,
        "renderer": renderer_version(),
        "drawings": len(kept),
        "titles": len({_title(one) for one in kept}),
        "authors": len({one.clipart.author for one in kept}),
        "categories": dict(sorted(Counter(one.clipart.folder for one in kept).items())),
        "dropped": dict(sorted(dropped.items())),
    }


def _card(figures: Mapping[str, Any]) -> str:
    """The data card."""
    lines = [
        f"# clipart: {figures['drawings']:,} drawings of {len(figures['categories'])} categories",
        "",
        f"From `{figures['package']}` of Debian (sha256 {figures['made_of']['sha256']}), the Open Clip Art "
        f"Library 0.18: {figures['titles']:,} titles, {figures['authors']:,} authors, in the public domain "
        f"as each file says. Drawn with {figures['renderer']}, {figures['made_of']['image_size']} pixels "
        "square on white. Written by `diptych data fetch clipart`.",
        "",
        "`clipart.parquet`: `id` (path in the package), `image` (a sample of `pictures/`, shards), `title` "
        "(as its author gave it), `category` (the library's folder), `author` (groups for splits). Keywords, "
        "descriptions and file names are left out: they hold the label. A title stands with one author only, "
        "and no two pictures look the same at 24 pixels.",
        "",
        "Labels are a few editors' choice of one folder and noisy: a smiling sun may be weather, people or "
        "sign. Titles are in several languages, and a few were copied from another drawing.",
        "",
        "| category | drawings |",
        "| --- | --- |",
        *(f"| {name} | {count:,} |" for name, count in figures["categories"].items()),
        "",
        "| left out | files |",
        "| --- | --- |",
        *(f"| {why} | {count:,} |" for why, count in figures["dropped"].items() if count),
    ]
    return "\n".join(lines) + "\n"
