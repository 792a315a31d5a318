"""What a run of a retrieval task tells beside its scores: galleries, levels of chance, words, and ranks."""

from collections.abc import Mapping
from typing import Any

from ..tables.links import GALLERY, PICTURE, TEXT
from ..tasks.retrieval_metrics import WAYS, chances, galleries, search
from ..tasks.task import Floats, Ints
from .verdict import no_verdict

__all__ = ["gallery_words", "guessing", "rank_columns", "retrieval_headline"]

Json = Mapping[str, Any]


def guessing(targets: Ints) -> dict[str, Any]:
    """``chance`` of the first metric, ``chances`` of all, exact for these galleries, and the ``galleries``;
    None for what is undefined."""
    levels = {metric: value if value == value else None for metric, value in chances(targets).items()}
    return {"chance": levels["mean_recall"], "chances": levels, "galleries": galleries(targets)}


def gallery_words(result: Json) -> str:
    """How much is searched, in words."""
    found = result["galleries"]
    n = found["n"]
    texts, pictures = (f"{found[way]['size']:,.0f}" for way in WAYS)
    among = f"{pictures} pictures and {texts} texts"
    return among if n == 1 else f"{n} galleries of about {among} each"


def retrieval_headline(result: Json) -> str:
    """One sentence on the recommended head."""
    name = result["best"]
    best = result["heads"][name]["metrics"]
    score, top = best["mean_recall"], [best[f"{way}_R@1"] for way in WAYS]
    levels = [result["chances"][f"{way}_R@1"] for way in WAYS]
    if score["value"] is None:
        return f"The {name} head found nothing to search for: no test picture has a text."
    first = [f"{_percent(one['value'])} % of the" for one in top]
    between = f"{_percent(score['low'])} to {_percent(score['high'])}; chance {_percent(result['chance'])}"
    text = (
        f"The {name} head, chosen on the inner rows, ranks a right text first for {first[0]} pictures and a "
        f"right picture for {first[1]} texts (R@1; chance {' and '.join(map(_percent, levels))}), among "
        f"{gallery_words(result)}; its mean recall is {_percent(score['value'])} % ({between})"
    )
    versus = result["heads"][name].get("vs_best_single")
    if versus is None or versus["low"] is None:
        return text + "."
    verdict = "better than" if versus["low"] > 0 else "worse than" if versus["high"] < 0 else "not told from"
    gain = f"{100 * versus['diff']:+.1f} points"
    if few := no_verdict(result):
        return f"{text}, {gain} over zero-shot: {few}."
    return f"{text}, {gain} ({100 * versus['low']:+.1f} to {100 * versus['high']:+.1f}), {verdict} zero-shot."


def _percent(value: float | None) -> str:
    return "undefined" if value is None else f"{100 * value:.1f}"


def rank_columns(targets: Ints, p: Mapping[str, Floats]) -> dict[str, Any]:
    """Columns of predictions.parquet: what each row's picture and text are (equal where their content is),
    and per head and way the rank of the best match, from 1, and the average precision, in the first row of
    every query; null in other rows."""
    table: dict[str, Any] = {
        name: [f"{value & (2**64 - 1):016x}" if value else None for value in targets[:, column].tolist()]
        for name, column in (("picture", PICTURE), ("text", TEXT))
    }
    table["gallery"] = targets[:, GALLERY]
    for name, answers in p.items():
        for way, found in search(targets, answers).items():
            at = {int(row): i for i, row in enumerate(found.rows)}
            places = [at.get(i) for i in range(len(targets))]
            table[f"{name}:{way}_rank"] = [None if i is None else int(found.ranks[i]) + 1 for i in places]
            table[f"{name}:{way}_AP@R"] = [None if i is None else float(found.precision[i]) for i in places]
    return table
