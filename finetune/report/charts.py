"""Charts of the report, drawn as inline SVG: no library, no script, colours from the page's CSS variables."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape

__all__ = ["Series", "interval_bar", "line_chart", "nice_ticks", "scatter_chart", "short_number"]

WIDTH, HEIGHT = 460, 230
LEFT, RIGHT, TOP, BOTTOM = 48, 14, 12, 34
POINTS = 240  # more are averaged in bins: a curve of 460 pixels shows no more
LINES = 6  # colours that the style sheet has


@dataclass(frozen=True)
class Series:
    """One line: its name and its points; ``marked`` draws each point, with its numbers as a tooltip;
    ``dashed`` draws it as the reference lines are."""

    name: str
    xs: list[float] = field(default_factory=list[float])
    ys: list[float] = field(default_factory=list[float])
    marked: bool = False
    dashed: bool = False

    @property
    def last(self) -> str:
        """Where it ends, in words."""
        return f"{self.name} ends at {short_number(self.ys[-1])}"


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
    return replace(series, xs=[x for x, _ in pairs], ys=[y for _, y in pairs])


@dataclass(frozen=True)
class _Frame:
    """Where numbers stand in a figure, with its grid and ticks."""

    x_ticks: list[float]
    y_ticks: list[float]
    x_limits: tuple[float, float]

    @classmethod
    def around(cls, xs: Sequence[float], ys: Sequence[float]) -> "_Frame":
        """A frame that holds all of these numbers; y ends on ticks, x on its numbers."""
        low, high = min(xs), max(xs)
        x_ticks = [t for t in nice_ticks(low, high) if low <= t <= high]
        return cls(x_ticks, nice_ticks(min(ys), max(ys)), (low, high))

    def x(self, value: float) -> float:
        low, high = self.x_limits
        return LEFT + (value - low) / ((high - low) or 1.0) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        low, high = self.y_ticks[0], self.y_ticks[-1]
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - TOP - BOTTOM)

    def level(self, kind: str, value: float) -> str:
        """A line across the figure."""
        y = self.y(value)
        return f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'

    def parts(self, x_name: str) -> list[str]:
        """Grid, ticks and the name of the x axis."""
        made: list[str] = []
        for tick in self.y_ticks:
            made.append(self.level("grid", tick))
            made.append(
                f'<text class="tick" x="{LEFT - 7}" y="{self.y(tick) + 4:.1f}" text-anchor="end">'
                f"{short_number(tick)}</text>"
            )
        for tick in self.x_ticks:
            made.append(
                f'<text class="tick" x="{self.x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" '
                f'text-anchor="middle">{short_number(tick)}</text>'
            )
        made.append(
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 3}" text-anchor="end">'
            f"{escape(x_name)}</text>"
        )
        return made


def _figure(title: str, keys: Sequence[str], parts: Sequence[str], said: str) -> str:
    return (
        f'<figure class="chart"><figcaption>{escape(title)}<span class="keys">{"".join(keys)}</span>'
        f'</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(f"{title}: {said}")}">{"".join(parts)}</svg></figure>'
    )


def _kind(line: Series, number: int) -> str:
    return "reference" if line.dashed else f"line s{number}"


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_name: str,
    reference: float | None = None,
    reference_name: str = "chance",
    from_zero: bool = False,
) -> str:
    """A titled figure with up to six lines over one x axis; empty text if no series has two finite points.

    ``reference`` draws a dashed level, such as chance. Values that are not finite are left out.
    """
    lines = [s for s in map(_finite, series) if len(s.xs) > 1][:LINES]
    if not lines:
        return ""
    ys = [y for s in lines for y in s.ys] + ([reference] if reference is not None else [])
    frame = _Frame.around([x for s in lines for x in s.xs], [*ys, *([0.0] if from_zero else [])])
    parts = frame.parts(x_name)
    if reference is not None:
        parts.append(frame.level("reference", reference))
    keys: list[str] = []
    for number, line in enumerate(lines, 1):
        path = " ".join(f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(line.xs, line.ys, strict=True))
        parts.append(f'<polyline class="{_kind(line, number)}" fill="none" points="{path}"/>')
        if len(lines) > 1:
            mark = "dashed" if line.dashed else f"s{number}"
            keys.append(f'<span class="key {mark}">{escape(line.name)}</span>')
        if line.marked:
            parts += [
                f'<circle class="dot s{number}" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="3.5"><title>'
                f"{escape(line.name)}: {short_number(y)} at {short_number(x)} "
                f"{escape(x_name)}</title></circle>"
                for x, y in zip(line.xs, line.ys, strict=True)
            ]
    if reference is not None:
        keys.append(f'<span class="key dashed">{escape(reference_name)}</span>')
    return _figure(title, keys, parts, "; ".join(line.last for line in lines if not line.dashed))


def scatter_chart(
    title: str,
    xs: Sequence[float],
    ys: Sequence[float],
    *,
    x_name: str,
    line: Series | None = None,
) -> str:
    """A titled figure of points, with a dashed line through it; empty text without two finite points."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return ""
    dashed = Series("") if line is None else line
    frame = _Frame.around([*(x for x, _ in points), *dashed.xs], [*(y for _, y in points), *dashed.ys])
    parts = frame.parts(x_name)
    parts += [f'<circle class="point" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}" r="2"/>' for x, y in points]
    keys: list[str] = []
    if dashed.xs:
        ends = " ".join(
            f"{frame.x(x):.1f},{frame.y(y):.1f}" for x, y in zip(dashed.xs, dashed.ys, strict=True)
        )
        parts.append(f'<polyline class="reference" fill="none" points="{ends}"/>')
        keys.append(f'<span class="key dashed">{escape(dashed.name)}</span>')
    return _figure(title, keys, parts, f"{len(points)} points")


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
