"""Samples per second of making, indexing and verifying shards, by one process and by all cores.

    python benchmarks/shards.py [--samples N] [--results FILE]

Photographs of scikit-learn, cut to 384 x 288 (JPEG, some 36 kB). Besides the time on the wall, which other
programs stretch, the processor time of all processes is told.
"""

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rows import append_row

from diptych.data.build import build_shards
from diptych.data.foreign import index_folder
from diptych.data.overlap import find_overlap
from diptych.data.recode import Recode
from diptych.data.verify import verify_folder

DISTINCT = 1000
WIDTH, HEIGHT = 384, 288


def write_tables(folder: Path, samples: int) -> None:
    """``table.csv``, and ``eval.csv`` of the first thousand."""
    from sklearn.datasets import load_sample_images  # here: each process imports this file

    rng = np.random.default_rng(0)
    photographs = load_sample_images().images
    for i in range(min(samples, DISTINCT)):
        photograph = photographs[i % len(photographs)]
        top, left = (
            int(rng.integers(0, side - own))
            for side, own in zip(photograph.shape[:2], (HEIGHT, WIDTH), strict=True)
        )
        piece = photograph[top : top + HEIGHT, left : left + WIDTH]
        Image.fromarray(piece).save(folder / f"{i}.jpg", quality=90)
    lines = [f"{i % DISTINCT}.jpg,a caption of number {i} with some words" for i in range(samples)]
    for name, own in (("table", lines), ("eval", lines[:DISTINCT])):
        (folder / f"{name}.csv").write_text("\n".join(["image,caption", *own]))


def processor_s() -> float:
    """Of this process and of those that it has ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in usage)


def measure(folder: Path, samples: int, workers: int) -> dict[str, dict[str, float]]:
    table, out = folder / "table.csv", folder / "shards"
    options: dict[str, Any] = {"workers": workers, "overwrite": True}
    work: dict[str, Callable[[], object]] = {
        "build": lambda: build_shards([table], out, **options),
        "build_224": lambda: build_shards([table], out, recode=Recode(image_size=224), **options),
        "build_no_decode": lambda: build_shards([table], out, decode=False, **options),
        "index": lambda: index_folder(out, **options),
        "verify": lambda: verify_folder(out, workers=workers),
        "verify_decode": lambda: verify_folder(out, decode=True, workers=workers),
        "overlap": lambda: find_overlap(out, [folder / "eval"], workers=workers),
    }
    figures: dict[str, dict[str, float]] = {}
    for name, do in work.items():
        begun, used = time.perf_counter(), processor_s()
        do()
        wall, used = time.perf_counter() - begun, processor_s() - used
        figures[name] = {"per_s": round(samples / wall, 1), "per_cpu_s": round(samples / used, 1)}
        print(
            f"{workers} processes: {name:16} {samples / wall:8.0f} per s {samples / used:8.0f} per CPU-second"
        )
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=12000)
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DIPTYCH_CACHE"] = str(folder / "cache")
        write_tables(folder, args.samples)
        build_shards(
            [folder / "eval.csv"], folder / "eval", recode=Recode(image_size=200), workers=2, decode=False
        )
        figures = {str(n): measure(folder, args.samples, n) for n in sorted({1, os.cpu_count() or 1})}
    load = os.getloadavg()[0]
    append_row(
        "shards",
        {"samples": args.samples, "load": load, "size": [WIDTH, HEIGHT], "by_processes": figures},
        args.results,
    )


if __name__ == "__main__":
    main()
