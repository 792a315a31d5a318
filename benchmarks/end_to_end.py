"""A whole training beside ``open_clip_train.main``: JPEG tars, decoding, augmentation, steps, on one thread.

    python benchmarks/end_to_end.py [--quick] [--peer-packages DIR] [--results FILE]

Both train ViT-S/16-128 (both towers 256 wide, 6 layers) in batches of 64 from the same WebDataset tars,
photos of 341 x 256 pixels with captions as long as LAION's (caption_lengths.json), with the same crops, loss,
optimizer settings and number of samples, each by its own command in a process of its own. Every command runs
twice, for a few steps and for more: the difference is training alone, without imports, model building and
saving. Seconds are processor time of the whole process tree, the speedup is the median of the rounds' own.
``masked`` leaves out half of the patches, which is another mathematics. open_clip's loader needs an old
webdataset and pandas, which pip puts into a folder of their own.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from loader import peer_packages, photo
from open_clip.tokenizer import SimpleTokenizer
from rows import append_row, machine
from train_step import MODELS, caption_lengths

from diptych.configs.files import cache_dir
from diptych.data.writer import ShardWriter

NAME = "ViT-S/16-128"
SIZE = (341, 256)
KINDS = ("open_clip", "exact", "masked")
TARGET = 2.2
# open_clip_train.main with a model config of ours
OPEN_CLIP = """
import sys, open_clip
open_clip.add_model_config(sys.argv.pop(1))
from open_clip_train.main import main
main(sys.argv[1:])
"""


def words() -> list[str]:
    """Words that are one token each."""
    plain = [token.removesuffix("</w>") for token in SimpleTokenizer().encoder if token.endswith("</w>")]
    return [word for word in plain if word.isascii() and word.isalpha() and len(word) > 2]


def write_shards(folder: Path, count: int) -> None:
    """Tars of ``count`` pairs; a caption's length in tokens counts both end tokens."""
    rng = np.random.default_rng(0)
    photos = [photo(*SIZE, rng) for _ in range(64)]
    vocabulary = words()
    with ShardWriter(folder, samples_per_shard=count // 4) as writer:
        for i, length in enumerate(caption_lengths(count, rng)):
            caption = " ".join(rng.choice(vocabulary, max(1, int(length) - 2)))
            writer.write(f"{i:06d}", photos[i % len(photos)], "jpg", caption, {"number": i})


def command(kind: str, folder: Path, shards: Path, model: str, batch: int, samples: int) -> list[str]:
    """What a user would type."""
    if kind == "open_clip":
        (folder / "bench.json").write_text(json.dumps(MODELS[model][0]))
        tars = "::".join(str(tar) for tar in sorted(shards.glob("*.tar")))
        words = ["--model", "bench", "--train-data", tars, "--dataset-type", "webdataset"]
        words += ["--train-num-samples", samples, "--batch-size", batch, "--epochs", 1, "--workers", 0]
        words += ["--precision", "fp32", "--device", "cpu", "--warmup", 10, "--lr", 5e-4, "--logs", "none"]
        return [sys.executable, "-c", OPEN_CLIP, str(folder / "bench.json"), *map(str, words)]
    config: dict[str, Any] = {
        "data": {"train": str(shards)},
        "model": MODELS[model][0],
        "loss": {"duplicates": "negatives"},
        "optim": {"lr": 5e-4, "clip_grad_norm": None},
        "schedule": {"warmup_samples": 10 * batch},
        "train": {"global_batch_size": batch, "total_samples": samples, "device": "cpu", "threads": 1},
        "tracking": {"wandb": "off"},
    }
    if kind == "masked":
        config["model"] = config["model"] | {
            "vision_cfg": config["model"]["vision_cfg"] | {"patch_dropout": 0.5}
        }
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(config))
    out = tempfile.mkdtemp(dir=folder)
    return [sys.executable, "-m", "diptych.pretrain", str(file), f"out={out}/run"]


def run(words: list[str], packages: Path | None, log: Path) -> dict[str, float]:
    """Processor and wall seconds and peak MiB of a command and its children."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if packages is not None:
        environment["PYTHONPATH"] = str(packages)
    start = time.perf_counter()
    with log.open("w") as out:
        process = subprocess.Popen(words, stdout=out, stderr=out, env=environment, cwd=log.parent)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(
            f"{words[1:3]} ended with exit code {process.returncode}:\n{log.read_text()[-3000:]}"
        )
    wall = time.perf_counter() - start
    return {"cpu": usage.ru_utime + usage.ru_stime, "wall": wall, "mib": usage.ru_maxrss / 1024}


def measure(folder: Path, packages: Path, model: str, batch: int, steps: tuple[int, int], rounds: int) -> Any:
    """By kind, one dict a round: seconds of the steps between the two lengths, and MiB at the peak."""
    shards = folder / "shards"
    write_shards(shards, max(1024, batch * steps[1]))
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    order = random.Random(0)
    for number in range(rounds):
        for kind in order.sample(KINDS, len(KINDS)):
            short, long = (
                run(
                    command(kind, folder, shards, model, batch, batch * n),
                    packages if kind == "open_clip" else None,
                    folder / "log",
                )
                for n in steps
            )
            found[kind].append(
                {k: long[k] - short[k] for k in ("cpu", "wall")} | {"mib": long["mib"], "whole": long["cpu"]}
            )
            print(f"\rround {number + 1} of {rounds}: {kind}      ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument(
        "--peer-packages", type=Path, default=cache_dir() / "peers" / "open_clip-3.3", help="DIR"
    )
    parser.add_argument("--results", type=Path, help="FILE, by default benchmarks/results/end_to_end.jsonl")
    options = parser.parse_args()
    packages = peer_packages(options.peer_packages)
    if packages is None:
        return
    model, batch, steps, rounds = ("quick", 16, (2, 42), 1) if options.quick else (NAME, 64, (2, 12), 3)
    with tempfile.TemporaryDirectory(prefix="diptych-end-to-end-") as temporary:
        found = measure(Path(temporary), packages, model, batch, steps, rounds)
    samples = batch * (steps[1] - steps[0])

    def ratio(kind: str, key: str) -> float:
        pairs = zip(found["open_clip"], found[kind], strict=True)
        return round(statistics.median(theirs[key] / ours[key] for theirs, ours in pairs), 3)

    def median(kind: str, key: str) -> float:
        return statistics.median(one[key] for one in found[kind])

    row: dict[str, Any] = {
        "model": model,
        "batch_size": batch,
        "samples": samples,
        "rounds": rounds,
        "speedup": ratio("exact", "cpu"),
        "speedup_wall": ratio("exact", "wall"),
        "speedup_masked": ratio("masked", "cpu"),
        "memory_ratio": round(median("exact", "mib") / median("open_clip", "mib"), 3),
        "samples_per_cpu_second": {kind: round(samples / median(kind, "cpu"), 2) for kind in KINDS},
        "samples_per_second": {kind: round(samples / median(kind, "wall"), 2) for kind in KINDS},
        "peak_rss_mib": {kind: round(median(kind, "mib")) for kind in KINDS},
        "seconds_with_start": {kind: round(median(kind, "whole"), 1) for kind in KINDS},
    }
    print(f"{model}, batch {batch}, {samples} samples from JPEG tars, one thread ({machine()})\n")
    print("                      " + "".join(f"{kind:>11}" for kind in KINDS))
    for what in ("samples_per_cpu_second", "samples_per_second", "peak_rss_mib"):
        print(f"{what.replace('_', ' '):22}" + "".join(f"{row[what][kind]:11.5g}" for kind in KINDS))
    met = "met" if row["speedup"] >= TARGET else "MISSED"
    print(f"\nexact / open_clip, CPU   {row['speedup']:6.2f}   target {TARGET:g}: {met}")
    print(f"masked / open_clip, CPU  {row['speedup_masked']:6.2f}")
    append_row("end_to_end", row, options.results)


if __name__ == "__main__":
    main()
