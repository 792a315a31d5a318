"""SVG documents to PNG: resvg on white, in a pool of processes, the same bytes for any number of them."""

import hashlib
import io
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from ...configs.errors import UserError
from ...configs.files import temporary_beside
from .iconify import Icon

__all__ = ["Picture", "Renderer", "hash_24", "read_pictures", "render", "renderer_version"]

CHUNK = 64
Drawn = Callable[[int], None]


@dataclass(frozen=True)
class Picture:
    """A rendered icon: PNG bytes (RGB), hash of its pixels, and the coarse hash that near-copies share."""

    png: bytes
    pixels: str
    hash_24: str


def hash_24(image: Image.Image) -> str:
    """Hash of an RGB picture at 24 x 24 with 16 shades per channel: equal for copies that differ in little
    more than a renderer's rounding."""
    small = np.asarray(image.resize((24, 24), Image.Resampling.BOX)) // 16
    return hashlib.sha256(small.tobytes()).hexdigest()[:32]


def render(svg: str, size: int, *, square: bool = False) -> Picture | None:
    """The SVG on white, ``size`` pixels on its longer side, with ``square`` filled up to ``size`` x ``size``;
    None if it cannot be drawn or the picture is one colour."""
    import resvg_py

    try:
        # dpi: sizes in mm or pt vanish at resvg's own default of 0; fonts: none, so every machine draws the
        # same
        data = resvg_py.svg_to_bytes(
            svg_string=svg, width=size, height=size, background="#ffffff", dpi=96, skip_system_fonts=True
        )
    except ValueError:
        return None
    image = Image.open(io.BytesIO(bytes(data))).convert("RGB")
    if square and image.size != (size, size):
        image = ImageOps.pad(image, (size, size), color="white")
    pixels = np.asarray(image)
    if (np.ptp(pixels, axis=(0, 1)) < 16).all():
        return None
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return Picture(buffer.getvalue(), hashlib.sha256(pixels.tobytes()).hexdigest()[:32], hash_24(image))


def renderer_version() -> str:
    """The renderer and its version, "resvg-py 0.5.0". UserError if it is not installed."""
    try:
        return f"resvg-py {version('resvg-py')}"
    except PackageNotFoundError as error:
        raise UserError(
            "drawing icons needs resvg-py; run `pip install resvg-py` (it comes with `diptych[demo]`)"
        ) from error


class Renderer:
    """Draws sets of icons with a pool of processes, and keeps what it has drawn in ``folder``, so that an
    interrupted fetch goes on where it stopped. UserError if resvg-py is not installed."""

    def __init__(
        self, folder: Path, size: int, *, square: bool = False, processes: int | None = None
    ) -> None:
        self._version = renderer_version()
        self.folder, self.size, self.square = folder, size, square
        self._processes = processes if processes is not None else _cores()
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def draw(self, icons: Sequence[Icon], drawn: Drawn | None = None) -> Path:
        """A file with the pictures of ``icons``, in order; see ``pictures``. ``drawn`` is told how many are
        done."""
        shape = " square" if self.square else ""
        digest = hashlib.sha256(f"{self.size}{shape} {self._version}".encode())
        for icon in icons:
            digest.update(f"\0{icon.name}\0{icon.svg}".encode())
        path = self.folder / f"{digest.hexdigest()[:32]}.parquet"
        if not path.is_file():
            columns: dict[str, list[str | bytes | None]] = {"png": [], "pixels": [], "hash_24": []}
            for number, picture in enumerate(self._each([icon.svg for icon in icons])):
                if drawn is not None and number % CHUNK == 0:
                    drawn(number)
                for name, values in columns.items():
                    values.append(None if picture is None else getattr(picture, name))
            types = {"png": pa.binary(), "pixels": pa.string(), "hash_24": pa.string()}
            table = pa.table({name: pa.array(values, types[name]) for name, values in columns.items()})
            with temporary_beside(path) as temporary:
                pq.write_table(table, temporary, compression="none")
        return path

    def _each(self, svgs: Sequence[str]) -> Iterator[Picture | None]:
        draw = partial(render, size=self.size, square=self.square)
        if self._processes < 2 or len(svgs) < 4 * CHUNK:
            yield from map(draw, svgs)
            return
        if self._pool is None:
            # spawn: a fork of a process that has torch's threads may hang
            self._pool = ProcessPoolExecutor(self._processes, multiprocessing.get_context("spawn"))
        try:
            yield from self._pool.map(draw, svgs, chunksize=CHUNK)
        except BrokenProcessPool as error:
            raise UserError("a process that draws icons was killed; free memory and fetch again") from error


def read_pictures(path: Path) -> list[Picture | None]:
    """The pictures of a file that ``Renderer.draw`` wrote; None where there is nothing to see."""
    columns = pq.read_table(path).to_pydict()
    return [
        None if png is None else Picture(png, pixels, coarse)
        for png, pixels, coarse in zip(columns["png"], columns["pixels"], columns["hash_24"], strict=True)
    ]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
