"""The report's most confident errors: pictures, texts, what was said, and which parts it rested on."""

import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ...configs.errors import UserError
from ...data.decode import DecodeError, eval_image
from ..encoders.columns import read_states
from ..explain.relevance import Member, Relevance, relevance_of, shares
from ..predictor import Predictor
from ..runs.saved import read_json
from ..tables.cells import BrokenPicture, Picture, PictureReader
from ..tables.manifest import Rows
from .html import encoded, missing, text
from .predictions import Predictions, Unreadable

__all__ = ["Mistake", "error_section", "mistakes"]

SHOWN = 8
SIDE = 176
"""Pixels of a shown picture."""
LETTERS = 400
"""Of a shown text."""
MOST_BYTES = 60_000
"""Of one picture in the page; a larger one is made coarser."""
ABOUT = (
    "The errors that the head was surest of, among rows that it was not trained on. Over the picture and "
    "under the words: where the answer was read (attention times its gradient, rolled out over the layers; "
    "Chefer et al. 2021), each scaled to its own greatest value. It shows what was looked at, not why."
)


@dataclass(frozen=True)
class Mistake:
    """``row``: number among the predictions; ``explained``: the class that relevance is told of."""

    row: int
    truth: str
    said: str
    surely: str
    explained: int | None


def mistakes(found: Predictions, head: str, most: int = SHOWN) -> list[Mistake]:
    """The most confident errors of a head, of the first repeat, the surest first: by the probability of what
    was said; ordinal: first by the distance in ranks; multilabel: by the label that is furthest off, one per
    row; regression: the greatest residuals."""
    p, task, truth = found.p[head], found.task, found.targets
    rows = np.arange(len(p)) if found.repeat is None else np.flatnonzero(found.repeat == found.repeat.min())
    if task.type == "regression":
        residual = p[rows, 0] - truth[rows]
        order = rows[np.argsort(-np.abs(residual), kind="stable")][:most]
        return [
            Mistake(int(i), f"{truth[i]:.4g}", f"{p[i, 0]:.4g}", f"residual {p[i, 0] - truth[i]:+.4g}", None)
            for i in order
            if p[i, 0] != truth[i]
        ]
    if task.type == "multilabel":
        off = np.where((found.decided(head) == 1) != (truth == 1), np.abs(p - truth), 0.0)[rows]
        label = off.argmax(1)
        order = np.argsort(-off.max(1), kind="stable")[:most]
        return [_of_label(found, head, int(rows[j]), int(label[j])) for j in order if off[j].max() > 0]
    said = task.predicted(found.decided(head))
    wrong = rows[said[rows] != truth[rows]]
    sure = p[wrong, said[wrong]]
    if task.type == "ordinal":
        sure = sure + np.abs(said[wrong] - truth[wrong])
    order = wrong[np.argsort(-sure, kind="stable")][:most]
    return [
        Mistake(
            int(i),
            task.classes[truth[i]],
            task.classes[said[i]],
            f"probability {p[i, said[i]]:.3f}",
            int(said[i]),
        )
        for i in order
    ]


def _of_label(found: Predictions, head: str, i: int, c: int) -> Mistake:
    p, task = found.p[head], found.task
    names = [", ".join(task.classes[j] for j in np.flatnonzero(row)) or "no label" for row in
             (found.targets[i] == 1, found.decided(head)[i] == 1)]  # fmt: skip
    what = "is there" if found.targets[i, c] == 1 else "is not there"
    return Mistake(i, names[0], names[1], f"{task.classes[c]} {what}: probability {p[i, c]:.3f}", c)


def error_section(
    folder: Path, found: Predictions, head: str, table: tuple[Rows, Mapping[str, int]] | str
) -> str:
    """The errors as cards. ``table``: the rows with the numbers of the tested ids, or why there are none."""
    chosen = mistakes(found, head)
    title = f"<h3>Most confident errors of {text(head)}</h3>"
    if not chosen:
        return f'{title}<p class="soft">There is no error among the tested rows.</p>'
    parts = [title, f'<p class="soft">{text(ABOUT)}</p>']
    if isinstance(table, str):
        parts.append(missing(f"Without pictures and texts: {table}.", "diptych report"))
        cards = [_card(found, one, None, None, "", None) for one in chosen]
        return "".join(parts) + f'<div class="errors">{"".join(cards)}</div>'
    rows, number = table
    places = [number.get(found.ids[one.row]) for one in chosen]
    cards, notes = _cards(folder, found, head, rows, chosen, places)
    parts += [f'<p class="missing">{text(note)}</p>' for note in notes]
    return "".join(parts) + f'<div class="errors">{"".join(cards)}</div>'


def _cards(
    folder: Path,
    found: Predictions,
    head: str,
    rows: Rows,
    chosen: Sequence[Mistake],
    places: Sequence[int | None],
) -> tuple[list[str], list[str]]:
    """A card per error, and what cannot be told, a line each. ``places``: the rows' numbers in the table."""
    told, notes = list[Relevance | None]([None] * len(chosen)), list[str]()
    predictor, reader, pictures = None, PictureReader(), dict[int, Any]()
    try:
        predictor = Predictor.load(folder, head=None if found.fold is not None else head)
        predictor.model(predictor.encoders[0])
    except UserError as error:
        predictor = None
        notes.append(f"Without pictures and relevance: {error}.")
    if predictor is not None:
        for i in dict.fromkeys(place for place in places if place is not None):
            pictures[i] = _seen(rows.cells.get("image", [None] * len(rows))[i], predictor, reader)
        seen = [i is not None and not isinstance(pictures[i], str) for i in places]
        told, notes = _relevance(folder, predictor, found, head, rows, chosen, places, seen)
    cards: list[str] = []
    for one, i, relevance in zip(chosen, places, told, strict=True):
        words = None if i is None or "text" not in rows.cells else rows.cells["text"][i]
        picture = None if i is None else pictures.get(i)
        gone = "" if i is not None else "The table has no such row any more."
        cards.append(_card(found, one, picture, words, gone, relevance))
    return cards, notes


def _seen(
    pictures: tuple[Picture, ...] | None, predictor: Predictor, reader: PictureReader
) -> bytes | str | None:
    """The row's first picture as the encoders see it, so that patches lie where they were read, but sharper,
    as a JPEG; None where there is none, or why it cannot be shown."""
    if pictures is None:
        return None
    model = predictor.model(predictor.encoders[0])
    preprocess = dict(model.config["preprocess_cfg"] or {})
    if preprocess.get("resize"):  # before a crop of the side that the encoders read
        preprocess["resize"] = round(preprocess["resize"] * SIDE / model.image_size)
    names = ("resize_mode", "interpolation", "fill_color", "resize")
    known = {k: preprocess[k] for k in names if k in preprocess}
    try:
        pixels = eval_image(reader.read(pictures[0]), SIDE, max_pixels=predictor.max_pixels, **known)
    except (BrokenPicture, DecodeError, UserError) as error:
        return f"The picture cannot be shown: {' '.join(str(error).split())[:120]}."
    image = Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy(), mode="RGB")
    for quality in (85, 60, 30):
        buffer = io.BytesIO()
        image.save(buffer, format="JPEG", quality=quality)
        if buffer.tell() <= MOST_BYTES:
            break
    return buffer.getvalue()


def _relevance(
    folder: Path,
    predictor: Predictor,
    found: Predictions,
    head: str,
    rows: Rows,
    chosen: Sequence[Mistake],
    places: Sequence[int | None],
    seen: Sequence[bool],
) -> tuple[list[Relevance | None], list[str]]:
    """Relevance of each error by the head that made it (None: it cannot be had), and why in a line each."""
    told: list[Relevance | None] = [None] * len(chosen)
    notes: dict[str, None] = {}
    by_fold: dict[int | None, list[int]] = defaultdict(list)
    for j, (one, whole) in enumerate(zip(chosen, seen, strict=True)):
        if whole:
            by_fold[None if found.fold is None else int(found.fold[one.row])].append(j)
    try:
        for fold, which in by_fold.items():
            members = _members(folder, predictor, found, head, fold)
            numbers = np.array([places[j] for j in which], dtype=np.int64)
            classes = [chosen[j].explained for j in which]
            got = relevance_of(
                members,
                found.task,
                rows.take(numbers),
                None if None in classes else np.array(classes, dtype=np.int64),
                max_pixels=predictor.max_pixels,
            )
            for j, one in zip(which, got, strict=True):
                told[j] = one
                notes |= {f"No relevance of the {k}: {why}.": None for k, why in one.without.items()}
    except (UserError, Unreadable) as error:
        notes[f"No relevance: {error}."] = None
    return told, list(notes)


def _members(
    folder: Path, predictor: Predictor, found: Predictions, head: str, fold: int | None
) -> list[Member]:
    """The models that made a fold's answers."""
    if fold is None or found.repeat is None:
        saved, places, states = predictor.saved, predictor.encoders, predictor.states
    else:
        place = folder / "folds" / f"repeat_{int(found.repeat.min())}" / f"fold_{fold}" / "heads" / head
        document = read_json(place / "head.json")
        if document.get("adapt", {}).get("method") != "linear_probe":
            raise Unreadable("the encoders that were trained in the folds are not kept")
        saved = predictor.read_fold(place)
        places, states = [folder / "encoder"] * len(saved), read_states(document.get("columns", {}))
    return [Member(one, predictor.model(path), states) for one, path in zip(saved, places, strict=True)]


def _card(
    found: Predictions,
    one: Mistake,
    picture: bytes | str | None,
    words: str | None,
    gone: str,
    relevance: Relevance | None,
) -> str:
    """One error. ``picture``: a JPEG, or why there is none."""
    parts: list[str] = []
    if isinstance(picture, bytes):
        shown = f'<img alt="" src="{encoded(picture, "image/jpeg")}">'
        parts.append(f'<div class="view">{shown}</div>')
        if relevance is not None and relevance.image is not None:
            heat = f'<img class="heat" alt="relevance" src="{encoded(_heat(relevance.image), "image/png")}">'
            parts.append(f'<div class="view">{shown}{heat}</div>')
    views = f'<div class="views">{"".join(parts)}</div>' if parts else ""
    lines = [f'<p class="said"><b>{text(one.said)}</b> <span>{text(one.surely)}</span></p>']
    lines.append(f"<p>truth: <b>{text(one.truth)}</b></p>")
    if words is not None:
        lines.append(f'<p class="words">{_words(words, relevance)}</p>')
    lines += [
        f'<p class="soft">{text(note)}</p>' for note in (gone, picture) if note and isinstance(note, str)
    ]
    fold = "" if found.fold is None else f", fold {int(found.fold[one.row])}"
    lines.append(f'<p class="soft">row {text(found.ids[one.row])}{fold}</p>')
    return f'<div class="error">{views}<div class="what">{"".join(lines)}</div></div>'


def _words(words: str, relevance: Relevance | None) -> str:
    """The text, its words shaded where their relevance is known."""
    if relevance is None or not relevance.text:
        return text(words if len(words) <= LETTERS else words[: LETTERS - 1] + "\u2026")
    shade = shares([r for _, r in relevance.text])
    made: list[str] = []
    length = 0
    for (word, _), a in zip(relevance.text, shade, strict=True):
        length += len(word) + 1
        if length > LETTERS:
            made.append("\u2026")
            break
        made.append(f'<span class="word" style="--a:{0.75 * a:.2f}">{text(word)}</span>')
    return " ".join(made)


def _heat(relevance: Any) -> bytes:
    """A transparent PNG of patches, from nothing over yellow to red."""
    share = shares(relevance.ravel()).reshape(relevance.shape)
    pixels = np.zeros((*share.shape, 4), dtype=np.uint8)
    pixels[..., 0] = 235
    pixels[..., 1] = (200 * (1 - share)).round()
    pixels[..., 3] = (190 * share).round()
    buffer = io.BytesIO()
    Image.fromarray(pixels, mode="RGBA").save(buffer, format="PNG")
    return buffer.getvalue()
