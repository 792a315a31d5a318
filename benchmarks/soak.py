"""A long run on two processes that is killed at random all the time, beside the same run left alone.

    python benchmarks/soak.py [--steps 2000] [--kills 110] [--seed 0] [--quick] [--work DIR] [--results FILE]

A small ViT learns coloured squares. Its processes get SIGKILL at random instants and at chosen operations on
files, alone or both at once: while they start, in a step, while a checkpoint is written, renamed or removed,
while held-out shards are scored (tests/faults/killing.py). The same command is started again each time. At
its end the run must be the undisturbed one bit for bit: metrics but for the clock, weights, optimizer.
Memory, open files and /dev/shm are watched. Ctrl-C stops it; the same command goes on where it was.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import shutil
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml
from PIL import Image
from rows import append_row, judge

from diptych.configs.files import cache_dir
from diptych.data.writer import ShardWriter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "faults"))
from killing import (  # which the tests use, too
    NAMES,
    Fault,
    Forker,
    Runner,
    Start,
    differences,
    draw,
    kill_until_done,
    left_over,
    newest_step,
    trained,
)

BATCH, EVERY, SIDE, RANKS = 32, 10, 16, 2
MODEL: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {
        "layers": 2,
        "width": 32,
        "head_width": 16,
        "patch_size": 8,
        "image_size": SIDE,
        "patch_dropout": 0.25,
    },
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}
WORDS = ["red", "green", "blue", "yellow", "pink", "grey", "brown", "teal", "gold", "navy", "lime", "plum"]
GROWTH = 1.05  # of memory from one part of a run to a later one


def square(name: str, number: int) -> bytes:
    """A PNG whose colours tell two words, with a shade of its own."""
    digest = hashlib.sha256(name.encode()).digest()
    image = Image.new("RGB", (SIDE, SIDE), (digest[0], digest[1], digest[2]))
    image.paste((digest[3], digest[4], (digest[5] + 9 * number) % 256), (4, 4, 12, 12))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def write_data(folder: Path, copies: int) -> None:
    """Shards of ``copies`` pictures of each pair of words."""
    with ShardWriter(folder, samples_per_shard=100) as writer:
        for number in range(copies):
            for i, name in enumerate(f"{a} {b}" for a in WORDS for b in WORDS):
                writer.write(f"{number:02d}-{i:03d}", square(name, number), "png", name, {"n": i})


def write_config(work: Path, steps: int) -> Path:
    """Data and config, unless they are there."""
    file = work / "run.yaml"
    if not file.is_file():
        shutil.rmtree(work / "data", ignore_errors=True)
        write_data(work / "data" / "train", 10)
        write_data(work / "data" / "val", 1)
        config: dict[str, Any] = {
            "data": {"train": str(work / "data" / "train"), "workers": 1, "augment": {"hflip": 0.5}},
            "model": MODEL,
            "loss": {"duplicates": "positives"},
            "optim": {"lr": 2e-3, "ema_decay": 0.9},
            "schedule": {"warmup_samples": 20 * BATCH},
            "train": {
                "global_batch_size": BATCH,
                "total_samples": steps * BATCH,
                "log_every_steps": 1,
                "device": "cpu",
                "threads": 1,
            },
            "checkpoint": {"every_steps": EVERY},
            "evaluate": {"data": str(work / "data" / "val"), "every_steps": 25, "max_images": 64},
            "tracking": {"wandb": "off"},
        }
        file.write_text(yaml.safe_dump(config))
    return file


class Soak:
    """The two runs in a folder; what has been done there is not done again."""

    def __init__(self, forker: Forker, work: Path, steps: int, kills: int, seed: int) -> None:
        self.work, self.steps, self.kills, self.seed = work, steps, kills, seed
        config = write_config(work, steps)
        self.runners = {
            name: Runner(forker, ["pretrain", str(config), f"out={work / name}"], work / name, RANKS)
            for name in ("straight", "killed")
        }
        self.journal = work / "starts.jsonl"
        self.begun = time.monotonic()

    def undisturbed(self) -> list[dict[str, float]]:
        """What rank 0 of the undisturbed run held, step by step."""
        kept, run = self.work / "straight.json", self.work / "straight"
        if not kept.is_file():
            shutil.rmtree(run, ignore_errors=True)
            print(f"the undisturbed run: {self.steps} steps on {RANKS} processes", flush=True)
            start = self.runners["straight"].once(None)
            if any(start.codes):
                raise SystemExit(self.runners["straight"].log.read_text()[-3000:])
            kept.write_text(json.dumps(start.samples))
        return json.loads(kept.read_text())

    def starts(self) -> list[Start]:
        """All starts of the killed run so far."""
        lines = self.journal.read_text().splitlines() if self.journal.is_file() else []
        return [Start(**json.loads(line)) for line in lines]

    def faults(self) -> Iterator[Fault]:
        """What is still to come; steps between kills are such that all find room."""
        done = [start for start in self.starts() if start.killed]
        for number in range(len(done), self.kills):
            rng = random.Random(f"{self.seed} {number}")
            left = self.steps - newest_step(self.work / "killed")
            rows = max(2, 2 * left // (self.kills - number))
            name = NAMES[number % len(NAMES)]
            ranks = rng.choice(["all", "0", "1"])
            if name in ("save", "rename", "prune", "evaluate", "resume") and ranks == "1":
                ranks = "0"  # which does these
            yield replace(draw(rng, name, rows=rows), ranks=ranks)

    def tell(self, start: Start) -> None:
        """Keep a start and show where it all is."""
        with self.journal.open("a") as file:
            print(json.dumps(asdict(replace(start, samples=start.samples[-1:]))), file=file)
        starts = self.starts()
        kills = sum(one.killed for one in starts)
        repeated = sum(one.lost for one in starts)
        line = f"step {start.done} of {self.steps}, kill {kills} of {self.kills} ({start.fault or 'none'})"
        print(
            f"{time.monotonic() - self.begun:6.0f} s  {line}, goes on after {start.saved}; "
            f"{repeated} steps done again so far",
            flush=True,
        )

    def go(self) -> None:
        """Kill the run until it is over."""
        if newest_step(self.work / "killed") < self.steps:
            kill_until_done(self.runners["killed"], self.faults(), at_most=2 * EVERY, tell=self.tell)


def flat(values: list[float]) -> float:
    """Median of the last quarter over that of the second: 1 where nothing grows."""
    quarter = max(1, len(values) // 4)
    early = values[quarter : 2 * quarter] or values[:1]
    return statistics.median(values[-quarter:]) / statistics.median(early)


def orphans(before: set[str]) -> list[str]:
    """Files in /dev/shm that were not there before and that no living process has mapped."""
    mapped = ""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            mapped += maps.read_text()
    return [name for name in sorted(set(os.listdir("/dev/shm")) - before) if f"/dev/shm/{name}" not in mapped]


def figures(soak: Soak, samples: list[dict[str, float]], shm: set[str]) -> dict[str, Any]:
    """The row."""
    starts, run, straight = soak.starts(), soak.work / "killed", soak.work / "straight"
    kills = [start for start in starts if start.killed]
    ends = [start.samples[-1] for start in starts if start.samples]
    last = [one for one in ends if one["steps"] >= 2 and "rss_mib" in one]  # none if it was dying by then
    losses = [row["loss"] for row in trained(straight) if row["kind"] == "train"]
    leaders = [pid for start in starts for pid in start.leaders]
    held = {key: [one[key] for one in samples if key in one] for key in ("rss_mib", "fds", "threads")}
    return {
        "steps": soak.steps,
        "ranks": RANKS,
        "kills": len(kills),
        "kills_by_place": dict(Counter(start.fault for start in kills)),
        "kills_that_left_half_a_checkpoint": sum(start.torn > 0 for start in kills),
        "starts": len(starts),
        "steps_done_again": sum(start.lost for start in kills),
        "most_steps_lost": max((start.lost for start in kills), default=0),
        "steps_lost_allowed": 2 * EVERY,
        "others_ended_as_torchrun_would": {
            "before the first step": sum(not start.unaided and not start.samples for start in starts),
            "in training": sum(not start.unaided and bool(start.samples) for start in starts),
        },
        "differences": differences(run, straight),
        "left_over": left_over(run, leaders),
        "loss": {"first": losses[0], "last": losses[-1]},
        "memory_growth": round(flat(held["rss_mib"]), 4),
        "memory_growth_over_starts": round(flat([one["rss_mib"] for one in last]), 4),
        "rss_mib": round(held["rss_mib"][-1]),
        "fds": {"most": max(held["fds"]), "last": held["fds"][-1]},
        "threads": {"most": max(held["threads"]), "last": held["threads"][-1]},
        "shm_files_left": orphans(shm),
        "cpu_s": round(sum(start.cpu_s for start in starts)),
        "wall_s": round(sum(start.wall_s for start in starts)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=110)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="60 steps and 6 kills")
    parser.add_argument("--work", type=Path, help="DIR, by default one in Diptych's cache")
    parser.add_argument("--results", type=Path, help="FILE, by default benchmarks/results/soak.jsonl")
    options = parser.parse_args()
    steps, kills = (60, 6) if options.quick else (options.steps, options.kills)
    name = f"{steps}-{kills}-{options.seed}"
    work: Path = options.work or cache_dir() / "benchmarks" / "soak" / name
    work.mkdir(parents=True, exist_ok=True)
    before = set(os.listdir("/dev/shm"))
    with Forker() as forker:
        soak = Soak(forker, work, steps, kills, options.seed)
        known = len(soak.starts())
        try:
            samples = soak.undisturbed()
            soak.go()
        except KeyboardInterrupt:
            raise SystemExit("\nstopped; the same command goes on from here") from None
        row = figures(soak, samples, before)
        anew = len(soak.starts()) > known
    row = {
        "quick": options.quick,
        "seed": options.seed,
        **row,
    }
    print(json.dumps(row, indent=1))
    judge("kills", row["kills"], kills)
    judge("most steps lost", row["most_steps_lost"], row["steps_lost_allowed"], below=True)
    judge("differences from undisturbed", len(row["differences"]), 0, below=True)
    judge("left over", len(row["left_over"]), 0, below=True)
    judge("left in /dev/shm", len(row["shm_files_left"]), 0, below=True)
    judge("growth of memory", row["memory_growth"], GROWTH, below=True)
    if anew:
        append_row("soak", row, options.results)
    else:
        print(f"this soak had ended before, and no row is added; remove {work} to run it anew")
    if row["differences"] or row["left_over"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
