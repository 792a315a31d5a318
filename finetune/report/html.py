"""Small HTML pieces of the report. Everything that comes from a file is escaped here and nowhere trusted."""

import base64
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

__all__ = [
    "cell",
    "data_uri",
    "details",
    "encoded",
    "mapping",
    "missing",
    "number",
    "percent",
    "plain",
    "score_cell",
    "table",
    "text",
    "tile",
]

MAX_PICTURE_BYTES = 4 << 20
SIGNATURES = {b"\x89PNG\r\n\x1a\n": "image/png", b"\xff\xd8\xff": "image/jpeg"}


class Html(str):
    """Text that is HTML already; plain ``str`` is escaped wherever it goes into the page."""

    __slots__ = ()


def text(value: Any) -> str:
    """Escaped text of anything, unless it is ``Html``."""
    return value if isinstance(value, Html) else escape(str(value))


def number(value: Any) -> float:
    """A float of what should be one; NaN for anything else."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def mapping(value: Any) -> dict[str, Any]:
    """A mapping as it is; an empty one for anything else."""
    return value if isinstance(value, dict) else {}


def count(value: Any) -> str:
    """A count with thousands marked; a question mark for what is no number."""
    found = number(value)
    return f"{int(found):,}" if math.isfinite(found) else "?"


def percent(value: Any) -> str:
    """A share as percent with one decimal (two below 1 %); a dash for what is no number."""
    share = 100 * number(value)
    if not math.isfinite(share):
        return "-"
    return f"{share:.2f} %" if 0 < abs(share) < 1 else f"{share:.1f} %"


def plain(value: Any) -> str:
    """A number that is no share, with four digits; a dash for what is no number."""
    found = number(value)
    return f"{found:.4g}" if math.isfinite(found) else "-"


def interval(score: Any, *, share: bool = True) -> str:
    """The interval of a score dict, as percents or as the numbers they are."""
    low, high = number(score.get("low")), number(score.get("high"))
    if not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{100 * low:.1f} to {100 * high:.1f}" if share else f"{plain(low)} to {plain(high)}"


def score_cell(score: Any, *, share: bool = True) -> Html:
    """Table cell of a score dict: value, interval and chance below each other."""
    if not isinstance(score, dict):
        return Html("-")
    shown = percent if share else plain
    parts = [shown(score.get("value"))]
    if between := interval(score, share=share):
        parts.append(f"<small>{between}</small>")
    if "chance" in score:
        parts.append(f"<small>chance {shown(score['chance'])}</small>")
    return Html("".join(parts))


def cell(value: Any, small: str = "") -> Html:
    """A value with a second line under it."""
    return Html(text(value) + (f"<small>{text(small)}</small>" if small else ""))


def table(
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[Any]],
    *,
    left: int = 1,
    best: int | None = None,
) -> str:
    """A table; the first ``left`` columns stand left, row ``best`` is tinted."""
    if not rows:
        return ""

    def row(values: Sequence[Any], number: int) -> str:
        cells: list[str] = []
        for i, value in enumerate(values):
            tag, kind = ("th", ' scope="row"') if i == 0 else ("td", "")
            cells.append(f"<{tag}{kind}{' class=left' if i < left else ''}>{text(value)}</{tag}>")
        return f"<tr{' class=best' if number == best else ''}>{''.join(cells)}</tr>"

    titles = "".join(
        f'<th scope="col"{" class=left" if i < left else ""}>{text(name)}</th>' for i, name in enumerate(head)
    )
    body = "".join(row(values, i) for i, values in enumerate(rows))
    title = f"<caption>{text(caption)}</caption>" if caption else ""
    inner = f"{title}<thead><tr>{titles}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="scroll"><table>{inner}</table></div>'


def tile(name: str, score: Any, note: str = "", *, share: bool = True) -> str:
    """A headline number with its interval and chance."""
    shown, between = percent if share else plain, interval(score, share=share)
    lines = [f"95 % interval {between}"] if between else []
    levels = [f"{word} {shown(score[word])}" for word in ("chance", "majority") if word in score]
    if levels:
        lines.append(", ".join(levels))
    if note:
        lines.append(note)
    below = "".join(f"<span>{text(line)}</span>" for line in lines)
    value = shown(score.get("value"))
    return f'<div class="tile"><span class="name">{text(name)}</span><b>{value}</b>{below}</div>'


def missing(what: str, how: str) -> str:
    """The one line that stands where a part is absent."""
    return f'<p class="missing">{text(what)} <code>{text(how)}</code></p>'


def details(summary: str, content: str) -> str:
    """A folded block of preformatted text."""
    return (
        f"<details><summary>{text(summary)}</summary><pre>{text(content)}</pre></details>" if content else ""
    )


def encoded(data: bytes, kind: str) -> str:
    """Bytes of a media type as a data URI."""
    return f"data:{kind};base64,{base64.b64encode(data).decode('ascii')}"


def data_uri(folder: Path, name: Any) -> str | None:
    """A picture of a run folder as a data URI; None if it is absent, outside of the folder, too big or no
    picture."""
    if not isinstance(name, str) or not name:
        return None
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        return None
    if path.stat().st_size > MAX_PICTURE_BYTES:
        return None
    data = path.read_bytes()
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            return encoded(data, kind)
    return None
