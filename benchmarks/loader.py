"""Images per second of one core, from tars to training tensors, beside open_clip's own loader and webdataset.

    python benchmarks/loader.py [--quick] [--peer-packages DIR] [--results FILE]

Photos of 256, 512 and 1024 pixels (341 x 256, 512 x 384, 1024 x 768) are cut from two that come with
scikit-learn, get noise, and become JPEGs of quality 90, 4:2:0, in WebDataset tars. All contestants make of
them batches of normalised float32 [64, 3, 224, 224] and token ids: random crops of 0.9 to 1 of the area,
bicubic, antialiased. Each runs in an interpreter of its own on one thread; one pass of each makes a round, in
drawn order. Seconds are processor time, figures medians over rounds, and speedups medians of the rounds' own
ratios, so that a machine that changes its speed does no harm. open_clip's loader needs an old webdataset and
pandas, which pip puts into a folder of their own.
"""

import argparse
import io
import os
import random
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from contestants import Contestant
from numpy.random import Generator, Philox
from PIL import Image
from rows import append_row, judge, machine
from sklearn.datasets import load_sample_images

from diptych.configs.files import cache_dir
from diptych.configs.versions import versions
from diptych.data.augment import AugmentConfig, draw
from diptych.data.decode import drawn_crop, train_pixels
from diptych.data.image_header import read_header
from diptych.data.writer import ShardWriter

HERE = Path(__file__).resolve().parent
IMAGE_SIZE, BATCH_SIZE = 224, 64
SIDES = {"256": (341, 256), "512": (512, 384), "1024": (1024, 768)}
KINDS = ("fast", "plain", "open_clip", "webdataset")
PEER_PACKAGES = ("webdataset==0.2.86", "braceexpand==0.1.7", "pandas<4", "python-dateutil", "six")
TARGETS = {"speedup_fast": {"256": 3.0, "512": 2.6, "1024": 3.0}, "speedup_plain": dict.fromkeys(SIDES, 1.8)}
READ_TARGET = 10.0


def peer(kind: str, packages: Path | None) -> Contestant:
    """A process of ``peers.py``, with a folder of packages of its own."""
    environment = {} if packages is None else {"PYTHONPATH": str(packages)}
    return Contestant(kind, [HERE / "peers.py", kind, BATCH_SIZE, IMAGE_SIZE], environment)


def rate(contestant: Contestant, what: str, folder: Path) -> float:
    """Images per second of processor time, of one pass."""
    answer = contestant.ask(what, folder)
    return answer["images"] / answer["seconds"]


def photo(width: int, height: int, rng: Generator) -> bytes:
    """A JPEG of a part of a photo, with a sensor's noise."""
    whole = Image.fromarray(load_sample_images().images[rng.integers(2)])
    part = rng.uniform(0.6, 1.0) * min(whole.width / width, whole.height / height)
    w, h = int(part * width), int(part * height)
    left, top = int(rng.integers(whole.width - w + 1)), int(rng.integers(whole.height - h + 1))
    image = whole.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h))
    noisy = np.asarray(image) + rng.normal(0, 4, (height, width, 3))
    buffer = io.BytesIO()
    rounded = Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
    rounded.save(buffer, format="JPEG", quality=90, subsampling="4:2:0")
    return buffer.getvalue()


def write_shards(folder: Path, photos: list[bytes], count: int) -> None:
    with ShardWriter(folder, samples_per_shard=count // 2) as writer:
        for i in range(count):
            caption = f"photo number {i} of a temple or a flower"
            writer.write(f"{i:05d}", photos[i % len(photos)], "jpg", caption, {"number": i})


def psnr(photos: list[bytes]) -> float:
    """Mean decibels between our training pixels and Pillow's crop and resize of the same boxes."""
    augment = AugmentConfig()
    levels: list[float] = []
    for i, data in enumerate(photos):
        numbers = Generator(Philox(key=i))
        ours = train_pixels(data, IMAGE_SIZE, augment, numbers).permute(1, 2, 0).numpy()
        drawn = draw(Generator(Philox(key=i)))
        shrink, box = drawn_crop(read_header(data), IMAGE_SIZE, augment, drawn)
        image = Image.open(io.BytesIO(data)).convert("RGB")
        left, top = shrink * box.left, shrink * box.top
        right, bottom = left + shrink * box.width, top + shrink * box.height
        part = image.crop((left, top, min(right, image.width), min(bottom, image.height)))
        truth = part.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC)
        error = np.square(ours.astype(float) - np.asarray(truth, dtype=float)).mean()
        levels.append(10 * np.log10(255**2 / max(error, 1e-9)))
    return float(np.mean(levels))


def peer_packages(folder: Path) -> Path | None:
    """The folder, filled by pip if it is not; None, and a line that says so, where pip cannot."""
    if not (folder / "webdataset").is_dir() or not (folder / "pandas").is_dir():
        print(f"pip puts {', '.join(PEER_PACKAGES)} into {folder}", flush=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target"]
        environment = {key: value for key, value in os.environ.items() if key != "PIP_CONSTRAINT"}
        done = subprocess.run([*command, str(folder), *PEER_PACKAGES], env=environment, check=False)
        if done.returncode:
            print("pip failed: open_clip's own loader is left out, and no row is written")
            return None
    return folder


def measure(kind_packages: dict[str, Path | None], folders: dict[str, Path], rounds: int) -> dict[str, Any]:
    """Rates by task, contestant and round, a task being a size or "read"; and versions by contestant."""
    rates: dict[str, dict[str, list[float]]] = {task: {k: [] for k in kind_packages} for task in folders}
    found: dict[str, dict[str, str]] = {}
    order = random.Random(0)
    with ExitStack() as stack:
        running = [stack.enter_context(peer(*pair)) for pair in kind_packages.items()]
        for contestant in running:
            found[contestant.kind] = contestant.ask()["versions"]
        for task, folder in folders.items():
            what = "read" if task == "read" else "train"
            for contestant in running:
                rate(contestant, what, folder)  # the first pass warms up
            for number in range(rounds):
                for contestant in order.sample(running, len(running)):
                    rates[task][contestant.kind].append(rate(contestant, what, folder))
                print(f"\r{task}: round {number + 1} of {rounds}   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return {"rates": rates, "versions": found}


def ratio(mine: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(mine, theirs, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer images and rounds, in a minute")
    parser.add_argument(
        "--peer-packages", type=Path, default=cache_dir() / "peers" / "open_clip-3.3", help="DIR"
    )
    parser.add_argument("--results", type=Path, help="FILE, by default benchmarks/results/loader.jsonl")
    options = parser.parse_args()
    torch.set_num_threads(1)
    packages = peer_packages(options.peer_packages)
    kinds: dict[str, Path | None] = {"plain": None, "webdataset": None}
    if find_spec("simplejpeg") is None:
        print("no simplejpeg (pip install 'diptych[fast]'): [fast] is left out, and no row is written")
    else:
        kinds = {"fast": None, **kinds}
    if packages is not None:
        kinds["open_clip"] = packages
    count, reads, rounds = (64, 1024, 3) if options.quick else (128, 4096, 9)
    folders: dict[str, Path] = {}
    row: dict[str, Any] = {
        "image_size": IMAGE_SIZE,
        "images": count,
        "rounds": rounds,
        "bytes_per_image": {},
        "psnr": {},
    }
    with tempfile.TemporaryDirectory(prefix="diptych-loader-") as temporary:
        for name, size in SIDES.items():
            rng = np.random.default_rng(size[0])
            photos = [photo(*size, rng) for _ in range(count)]
            row["bytes_per_image"][name] = sum(map(len, photos)) // count
            row["psnr"][name] = round(psnr(photos[:32]), 1)
            folders[name] = Path(temporary) / name
            write_shards(folders[name], photos, count)
            if name == "256":
                folders["read"] = Path(temporary) / "read"
                write_shards(folders["read"], photos, reads)
        measured = measure(kinds, folders, rounds)
    report(row, measured["rates"])
    if len(kinds) < len(KINDS):
        return
    row["versions"] = versions() | {f"{k}: {n}": v for k in KINDS for n, v in measured["versions"][k].items()}
    print()
    append_row("loader", row, options.results)


def report(row: dict[str, Any], rates: dict[str, dict[str, list[float]]]) -> None:
    """Complete the row with medians and speedups, and print them."""
    kinds = list(rates["read"])
    row["images_per_second"] = {
        size: {kind: round(statistics.median(rates[size][kind]), 1) for kind in kinds} for size in SIDES
    }
    row["reads_per_second"] = {kind: round(statistics.median(rates["read"][kind])) for kind in kinds}
    print(f"images per second of one core ({machine()}), {IMAGE_SIZE} x {IMAGE_SIZE} float32 tensors\n")
    print("JPEG sides   KiB  " + "".join(f"{kind:>12}" for kind in kinds) + "   PSNR to Pillow")
    for size, (width, height) in SIDES.items():
        cells = "".join(f"{row['images_per_second'][size][kind]:12.0f}" for kind in kinds)
        kib = row["bytes_per_image"][size] / 1024
        print(f"{width:4} x {height:<4} {kib:5.0f}  {cells}{row['psnr'][size]:11.1f} dB")
    print("tar reading alone " + "".join(f"{row['reads_per_second'][kind]:12.0f}" for kind in kinds))
    print()
    ours = [kind for kind in kinds if kind in ("fast", "plain")]
    for mine in ours:
        for peer in [kind for kind in kinds if kind not in ours]:
            name = f"speedup_{mine}" if peer == "open_clip" else f"speedup_{mine}_{peer}"
            row[name] = {size: round(ratio(rates[size][mine], rates[size][peer]), 2) for size in SIDES}
            for size in SIDES:
                target = TARGETS[name][size] if name in TARGETS else None
                judge(f"{mine} / {peer} at {size} pixels", row[name][size], target)
    row["speedup_read"] = round(ratio(rates["read"][ours[0]], rates["read"]["webdataset"]), 1)
    judge("tar reading / webdataset", row["speedup_read"], READ_TARGET)


if __name__ == "__main__":
    main()
