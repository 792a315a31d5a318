"""The report's sections of a pretraining run: headline scores, curves, retrieval, zero-shot, examples."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .charts import Series, interval_bar, line_chart
from .html import (
    Html,
    cell,
    count,
    data_uri,
    mapping,
    missing,
    number,
    percent,
    score_cell,
    table,
    text,
    tile,
)

__all__ = ["pretrain_sections", "pretrain_tiles"]

Json = Mapping[str, Any]
DIRECTIONS = (("image_to_text", "image to text"), ("text_to_image", "text to image"))
RECALL = (
    "A hit at k: the right caption is among the k best of all distinct captions of the gallery (image to "
    "text), or a picture with that caption is among the k best pictures (text to image). Below each score "
    "its 95 % interval over concepts and what guessing reaches."
)


def _size(got: Json) -> str:
    return f"{count(got.get('n_images'))} pictures, {count(got.get('n_captions'))} captions"


def pretrain_tiles(evaluation: Json) -> list[str]:
    """Headline numbers: retrieval on the first gallery and on unseen words, and the best zero-shot score."""
    tiles: list[str] = []
    retrieval = mapping(evaluation.get("retrieval"))
    shown = list(retrieval)[:1] + [name for name in list(retrieval)[1:] if name == "test_word"]
    for name in shown:
        got = mapping(retrieval[name])
        note = _size(got)
        for direction, words in DIRECTIONS[: 2 if name == shown[0] else 1]:
            score = mapping(mapping(got.get(direction)).get("R@5"))
            if score:
                tiles.append(tile(f"R@5 {words}, {name}", score, note))
    for kind, words in (("zero_shot", "zero-shot"), ("linear_probe", "linear probe")):
        named = mapping(evaluation.get(kind))
        name = next((n for n in named if n.endswith("/subgroup")), next(iter(named), None))
        if name is not None and mapping(named[name].get("accuracy")):
            note = f"{count(named[name].get('classes'))} classes, {count(named[name].get('n'))} pictures"
            tiles.append(tile(f"{words}, {name}", named[name]["accuracy"], note))
    return tiles


def pretrain_sections(folder: Path, rows: Sequence[Json], evaluation: Json) -> str:
    """Everything of one run below its headline; absent parts say how to get them."""
    command = f"diptych evaluate {folder}"
    parts = ["<h2>Training</h2>", _curves(rows), "<h2>Retrieval on held-out pictures</h2>"]
    parts.append(_retrieval(mapping(evaluation.get("retrieval"))) or missing("Not evaluated yet:", command))
    parts.append("<h2>Classes</h2>")
    zero_shot = _classification(
        mapping(evaluation.get("zero_shot")), "Zero-shot: the nearest class prompt, no label seen"
    )
    probe = _classification(
        mapping(evaluation.get("linear_probe")), "Linear probe: logistic regression on frozen image features"
    )
    parts.append(zero_shot + probe or missing("No classification scores:", command))
    parts += [f'<p class="missing">{text(note)}</p>' for note in evaluation.get("notes") or []]
    parts.append("<h2>What it finds</h2>")
    parts.append(_examples(folder, evaluation) or missing("No example pictures:", f"{command} examples=6"))
    return "".join(parts)


def _column(rows: Sequence[Json], key: str) -> tuple[list[float], list[float]]:
    pairs = [(number(r.get("samples_seen", r.get("step"))), number(r[key])) for r in rows if key in r]
    return [x for x, _ in pairs], [y for _, y in pairs]


def _curves(rows: Sequence[Json]) -> str:
    train = [r for r in rows if r.get("kind") == "train"]
    evals = [r for r in rows if r.get("kind") == "eval"]
    if not train:
        return missing("No metrics.jsonl yet:", "diptych pretrain CONFIG")
    charts = [line_chart("Loss", [Series("loss", *_column(train, "loss"))], x_name="samples seen")]
    for direction, words in DIRECTIONS:
        keys = [f"val/{direction}_R@{k}" for k in (1, 5, 10)]
        series = [
            Series(f"R@{k}", *_column(evals, key), marked=True)
            for k, key in zip((1, 5, 10), keys, strict=True)
        ]
        chance = next((number(r[keys[1] + "_chance"]) for r in evals if keys[1] + "_chance" in r), None)
        charts.append(
            line_chart(
                f"Validation recall, {words}",
                series,
                x_name="samples seen",
                reference=chance,
                reference_name="chance R@5",
                from_zero=True,
            )
        )
    for title, key, zero in (
        ("Learning rate", "lr", True),
        ("Logit scale", "logit_scale", False),
        ("Samples per second", "samples_per_s", True),
    ):
        charts.append(
            line_chart(title, [Series(title, *_column(train, key))], x_name="samples seen", from_zero=zero)
        )
    bad = sum(number(r.get("bad_samples", 0)) for r in train)
    last = train[-1]
    words = f"{count(last.get('samples_seen'))} samples in {count(number(last.get('step')) + 1)} steps"
    words += f"; last loss {number(last.get('loss')):.4f}"
    if bad == bad and bad > 0:
        words += f"; {int(bad)} damaged samples masked, named in quarantine.jsonl"
    return f'<p class="soft">{text(words)}.</p><div class="charts">{"".join(charts)}</div>'


def _retrieval(galleries: Json) -> str:
    if not galleries:
        return ""
    head = ["gallery", *(cell(f"R@{k}", words) for _, words in DIRECTIONS for k in (1, 5, 10))]
    rows = [
        [
            cell(name, _size(got)),
            *(score_cell(mapping(got.get(way)).get(f"R@{k}")) for way, _ in DIRECTIONS for k in (1, 5, 10)),
        ]
        for name, got in ((n, mapping(g)) for n, g in galleries.items())
    ]
    return f"<p>{RECALL}</p>" + table("", head, rows)


def _classification(scores: Json, caption: str) -> str:
    rows: list[list[Any]] = []
    for name, got in ((n, mapping(g)) for n, g in scores.items()):
        accuracy = mapping(got.get("accuracy"))
        levels = [number(accuracy.get(key)) for key in ("majority", "chance")]
        reference = next((level for level in levels if level == level), None)
        bar = interval_bar(*(number(accuracy.get(k)) for k in ("value", "low", "high")), reference=reference)
        rows.append(
            [
                cell(name, f"{count(got.get('n'))} pictures"),
                score_cell({k: v for k, v in accuracy.items() if k != "chance"}),
                Html(bar),
                percent(accuracy.get("majority")),
                percent(accuracy.get("chance")),
                count(got.get("classes")),
                count(got.get("prompts", got.get("n_train"))),
            ]
        )
    last = "prompts" if any("prompts" in mapping(g) for g in scores.values()) else "training pictures"
    head = ["labels", "accuracy", "interval; dashes: majority", "majority", "chance", "classes", last]
    return table(caption, head, rows)


def _examples(folder: Path, evaluation: Json) -> str:
    entries = [e for e in evaluation.get("examples") or [] if isinstance(e, dict)]
    parts: list[str] = []
    for gallery in dict.fromkeys(str(e.get("gallery", "")) for e in entries):
        mine = [e for e in entries if str(e.get("gallery", "")) == gallery]
        cards = [_image_query(folder, e) for e in mine if e.get("direction") == "image_to_text"]
        strips = [_text_query(folder, e) for e in mine if e.get("direction") == "text_to_image"]
        shown = "".join(c for c in cards + strips if c)
        if shown:
            parts.append(f'<h3>{text(gallery)}</h3><div class="examples">{shown}</div>')
    if parts:
        note = "<p>Queries chosen by a hash of their names, not by how well they went.</p>"
        return note + "".join(parts[:3])
    pictures = [data_uri(folder, name) for name in mapping(evaluation.get("pictures")).values()]
    return "".join(
        f'<img style="max-width:100%" alt="example retrievals" src="{uri}">' for uri in pictures if uri
    )


def _image_query(folder: Path, entry: Json) -> str:
    uri = data_uri(folder, entry.get("picture"))
    if uri is None:
        return ""
    query = text(entry.get("query", ""))
    items = "".join(
        f'<li class="{"good" if answer.get("hit") else ""}">{"&#10003;" if answer.get("hit") else "&#183;"} '
        f"{text(answer.get('caption', ''))}</li>"
        for answer in entry.get("top") or []
    )
    return (
        f'<div class="example"><img src="{uri}" alt="{query}"><div style="min-width:0"><ol>{items}</ol>'
        f'<div class="asked">is: {query}</div></div></div>'
    )


def _text_query(folder: Path, entry: Json) -> str:
    pictures = [(answer, data_uri(folder, answer.get("picture"))) for answer in entry.get("top") or []]
    if not any(uri for _, uri in pictures):
        return ""
    shown = "".join(
        f'<figure class="{"hit" if answer.get("hit") else ""}"><img src="{uri}" '
        f'alt="{text(answer.get("caption", ""))}" title="{text(answer.get("caption", ""))}">'
        f"{'&#10003;' if answer.get('hit') else '&nbsp;'}</figure>"
        for answer, uri in pictures
        if uri
    )
    return (
        '<div class="example strip"><div class="asked">looking for</div>'
        f"<b>{text(entry.get('query', ''))}</b>"
        f'<div class="pictures">{shown}</div></div>'
    )
