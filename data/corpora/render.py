"""SVG documents to PNG: resvg on white, in a pool of processes, the same bytes for any number of them."""

import hashlib
import io
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial

from PIL import Image

from ...configs.errors import UserError

__all__ = ["Picture", "hash_24", "render", "render_all"]

CHUNK = 64


@dataclass(frozen=True)
class Picture:
    """A rendered icon: PNG bytes (RGB), sha256 of its pixels, the coarse hash that near-copies share."""

    png: bytes
    pixels: str
    hash_24: str


def hash_24(image: Image.Image) -> str:
    """Hash of the RGB picture at 24 x 24 with 16 shades per channel: equal for copies that differ in little
    more than the renderer's rounding."""
    small = image.resize((24, 24), Image.Resampling.BOX).point([value // 16 for value in range(256)] * 3)
    return hashlib.sha256(small.tobytes()).hexdigest()[:32]


def render(svg: str, size: int) -> Picture | None:
    """The SVG at ``size`` x ``size`` on white; None if it cannot be drawn or the picture is one colour."""
    import resvg_py

    try:
        # dpi: sizes in mm or pt vanish at resvg's own default of 0; fonts: none, so every machine draws the same
        data = resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="#ffffff", dpi=96, skip_system_fonts=True
        )
    except ValueError:
        return None
    image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    extrema: tuple[tuple[int, int], ...] = image.getextrema()  # type: ignore[assignment]
    if all(high - low < 16 for low, high in extrema):
        return None
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return Picture(buffer.getvalue(), hashlib.sha256(image.tobytes()).hexdigest(), hash_24(image))


def render_all(
    svgs: Sequence[str],
    size: int,
    *,
    processes: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Picture | None]:
    """``render`` of each, in order. UserError if the renderer is not installed."""
    try:
        import resvg_py  # noqa: F401
    except ImportError as error:
        raise UserError(
            "rendering icons needs resvg-py; run `pip install resvg-py` (it comes with `diptych[demo]`)"
        ) from error
    draw = partial(render, size=size)
    out: list[Picture | None] = []
    count = processes if processes is not None else len(os.sched_getaffinity(0))
    if count <= 1 or len(svgs) < 4 * CHUNK:
        for number, svg in enumerate(svgs):
            if progress is not None and number % CHUNK == 0:
                progress("render", number, len(svgs))
            out.append(draw(svg))
        return out
    # spawn: a fork of a process with torch's threads may hang
    with ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, picture in enumerate(pool.map(draw, svgs, chunksize=CHUNK)):
            if progress is not None and number % CHUNK == 0:
                progress("render", number, len(svgs))
            out.append(picture)
    return out
