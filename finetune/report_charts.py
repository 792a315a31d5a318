"""Charts of the report, drawn as inline SVG: no library, no script, colours from the page's CSS variables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

__all__ = ["Series", "interval_bar", "line_chart", "nice_ticks", "short_number"]

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 34
POINTS = 240  # more are averaged in bins: a curve of 460 pixels shows no more


@dataclass(frozen=True)
class Series:
    """One line: its name and its points; ``marked`` draws each point, with its numbers as a tooltip."""

    name: str
    xs: list[float] = field(default_factory=list[float])
    ys: list[float] = field(default_factory=list[float])
    marked: bool = False


def short_number(value: float) -> str:
    """A number in few characters: 12.4k, 0.0312, 3e-05."""
    if not math.isfinite(value):
        return "n/a"
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= limit:
            return f"{value / limit:.3g}{suffix}"
    if size and size < 1e-3:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:.3g}"


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from the first below or at ``low`` to the first above or at ``high``, about ``count``
    steps."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _finite(series: Series) -> Series:
    pairs = [
        (x, y) for x, y in zip(series.xs, series.ys, strict=True) if math.isfinite(x) and math.isfinite(y)
    ]
    if len(pairs) > POINTS:
        size = math.ceil(len(pairs) / POINTS)
        bins = [pairs[i : i + size] for i in range(0, len(pairs), size)]
        pairs = [(sum(x for x, _ in b) / len(b), sum(y for _, y in b) / len(b)) for b in bins]
    return Series(series.name, [x for x, _ in pairs], [y for _, y in pairs], series.marked)


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    reference: float | None = None,
    reference_name: str = "chance",
    from_zero: bool = False,
) -> str:
    """A titled figure with up to four lines over one x axis; empty text if no series has two finite points.

    ``reference`` draws a dashed level, such as chance. Values that are not finite are left out.
    """
    lines = [s for s in map(_finite, series) if len(s.xs) > 1][:4]
    if not lines:
        return ""
    ys = [y for s in lines for y in s.ys] + ([reference] if reference is not None else [])
    y_ticks = nice_ticks(0.0 if from_zero else min(ys), max(ys))
    x_low, x_high = min(s.xs[0] for s in lines), max(max(s.xs) for s in lines)
    x_ticks = [t for t in nice_ticks(x_low, x_high) if x_low <= t <= x_high]
    x_span, y_span = (x_high - x_low) or 1.0, y_ticks[-1] - y_ticks[0]

    def x_at(x: float) -> float:
        return LEFT + (x - x_low) / x_span * (WIDTH - LEFT - RIGHT)

    def y_at(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y_ticks[0]) / y_span * (HEIGHT - TOP - BOTTOM)

    parts: list[str] = []
    for tick in y_ticks:
        y = y_at(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{short_number(tick)}</text>'
        )
    for tick in x_ticks:
        parts.append(
            f'<text class="tick" x="{x_at(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">'
            f"{short_number(tick)}</text>"
        )
    parts.append(
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">{escape(x_name)}</text>'
    )
    if reference is not None:
        y = y_at(reference)
        parts.append(f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
    for number, line in enumerate(lines, 1):
        path = " ".join(f"{x_at(x):.1f},{y_at(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
        parts.append(f'<polyline class="line s{number}" points="{path}"/>')
        if line.marked:
            parts += [
                f'<circle class="dot s{number}" cx="{x_at(x):.1f}" cy="{y_at(y):.1f}" r="3.5"><title>'
                f"{escape(line.name)}: {short_number(y)} at {short_number(x)} "
                f"{escape(x_name)}</title></circle>"
                for x, y in zip(line.xs, line.ys, strict=True)
            ]
    names = [
        f'<span class="key s{i}">{escape(s.name)}</span>' for i, s in enumerate(lines, 1) if len(lines) > 1
    ]
    if reference is not None:
        names.append(f'<span class="key dashed">{escape(reference_name)}</span>')
    last = "; ".join(f"{s.name} ends at {short_number(s.ys[-1])}" for s in lines)
    return (
        f'<figure class="chart"><figcaption>{escape(title)}'
        f'<span class="keys">{"".join(names)}</span></figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{title}: {last}")}">'
        f"{''.join(parts)}</svg></figure>"
    )


def interval_bar(
    value: float,
    low: float,
    high: float,
    *,
    reference: float | None = None,
    limits: tuple[float, float] = (0, 1),
) -> str:
    """A dot with its interval on a scale from ``limits[0]`` to ``limits[1]``; a tick marks ``reference``."""
    width, height = 180, 22

    def x_at(x: float) -> float:
        share = (x - limits[0]) / ((limits[1] - limits[0]) or 1.0)
        return 4 + min(1.0, max(0.0, share)) * (width - 8)

    if not all(map(math.isfinite, (value, low, high))):
        return ""
    label = f"{value:.3f}, interval {low:.3f} to {high:.3f}"
    mark = ""
    if reference is not None and math.isfinite(reference):
        x = x_at(reference)
        mark = f'<line class="reference" x1="{x:.1f}" x2="{x:.1f}" y1="1" y2="{height - 1}"/>'
        label += f", reference {reference:.3f}"
    middle = height / 2
    return (
        f'<svg class="interval" viewBox="0 0 {width} {height}" role="img" aria-label="{label}">'
        f'<line class="scale" x1="4" x2="{width - 4}" y1="{middle}" y2="{middle}"/>{mark}'
        f'<line class="whisker" x1="{x_at(low):.1f}" x2="{x_at(high):.1f}" y1="{middle}" y2="{middle}"/>'
        f'<circle class="dot s1" cx="{x_at(value):.1f}" cy="{middle}" r="4.5"/></svg>'
    )
