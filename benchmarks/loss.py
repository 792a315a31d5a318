"""Seconds and memory of the contrastive loss, forward and backward, beside open_clip's ClipLoss.

    python benchmarks/loss.py [--quick] [--results FILE]

Features of 512 numbers. In one process: batches of 1,024 to 32,768 pairs, each measurement in an interpreter
of its own on one thread, ours and open_clip's in turn. Memory is what the process grows by at its peak over
its features. At 32,768 the dense loss would need some 17 GiB, and ours runs alone. Then on 2 and 4 processes
(gloo), one global batch for all: ours with the texts gathered and with the texts passed round a ring, and
open_clip's local loss with gathered gradients. Bytes are those that the loopback device carried for a pass,
the least of all rounds, as other programs' traffic only adds. Seconds are processor time, of all processes
together; ratios are medians of the rounds' own.
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from contestants import resident
from open_clip.loss import ClipLoss
from rows import append_row, judge, machine
from torch import Tensor
from torch.nn import functional as F

from diptych.pretrain import distributed
from diptych.pretrain.contrastive import contrastive_loss

DIMENSION = 512
SIZES = {1024: (10, 7), 4096: (3, 5), 16384: (1, 3), 32768: (1, 1)}  # batch: passes of a process, rounds
QUICK = {128: (2, 2), 256: (1, 1)}
WORLDS, GLOBAL_BATCH = (2, 4), 4096
KINDS = ("diptych", "open_clip")
RANKED = ("gather", "ring", "open_clip")
MEMORY_TARGET = 1 / 20
Figures = dict[str, Any]


def features(start: int, count: int) -> list[Tensor]:
    """Image and text features float32 [count, D] of pairs from ``start``, and the scale."""
    generator = torch.Generator().manual_seed(start)
    leaves = [F.normalize(torch.randn(count, DIMENSION, generator=generator), dim=1) for _ in range(2)]
    return [leaf.requires_grad_() for leaf in (*leaves, torch.tensor(1 / 0.07))]


def loss_of(kind: str) -> Callable[..., Tensor]:
    """open_clip's loss, or ours with an exchange."""
    rank, world = distributed.rank(), distributed.world_size()
    if kind == "open_clip":
        return ClipLoss(
            local_loss=True, gather_with_grad=True, cache_labels=True, rank=rank, world_size=world
        )
    return lambda *inputs: contrastive_loss(*inputs, exchange="ring" if kind == "ring" else "gather")


def one_pass(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Figures:
    """CPU and wall seconds and loopback bytes of one forward and backward."""
    for leaf in inputs:
        leaf.grad = None
    distributed.barrier()
    carried, wall, cpu = loopback_bytes(), time.perf_counter(), time.process_time()
    loss(*inputs).backward()
    cpu = time.process_time() - cpu
    distributed.barrier()
    wall = time.perf_counter() - wall
    return {"cpu": cpu, "wall": wall, "bytes": loopback_bytes() - carried}


def child(kind: str, batch: int, passes: int) -> None:
    """Print the passes of this process and what it grew by, as JSON; in a process group rank 0 prints for
    all."""
    torch.set_num_threads(1)
    distributed.setup("cpu")
    loss, world = loss_of(kind), distributed.world_size()
    one_pass(loss, features(0, 64))  # libraries loaded, connections made
    inputs = features(distributed.rank(), batch // world)
    for leaf in inputs:
        leaf.grad = torch.zeros_like(leaf)
    base = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    warm = [one_pass(loss, inputs)] if passes > 1 else []
    timed = [one_pass(loss, inputs) for _ in range(passes)]
    mine = {"passes": timed, "MiB": max(0.0, resident("VmHWM") - base), "warm": len(warm)}
    everyone = distributed.gather_json(mine)
    if distributed.rank() == 0:
        print(json.dumps(everyone))
    distributed.teardown()


def loopback_bytes() -> int:
    """What the loopback device has carried since the machine started."""
    found = re.search(r"^\s*lo:\s*(\d+)", Path("/proc/net/dev").read_text(), re.MULTILINE)
    return int(found[1]) if found is not None else 0


def measured(kind: str, batch: int, passes: int, world: int = 1) -> Figures:
    """One measurement in fresh processes: medians over passes, sums or peaks over processes."""
    words = [__file__, "--child", kind, str(batch), str(passes)]
    if world > 1:
        words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{kind} at {batch} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    ranks = json.loads(done.stdout.strip().splitlines()[-1])

    def median(key: str) -> list[float]:
        return [statistics.median(one[key] for one in rank["passes"]) for rank in ranks]

    return {
        "cpu": sum(median("cpu")),
        "wall": max(median("wall")),
        "bytes": min(one["bytes"] for one in ranks[0]["passes"]),
        "MiB": max(rank["MiB"] for rank in ranks),
    }


def rounds_of(kinds: tuple[str, ...], rounds: int, *arguments: int) -> dict[str, list[Figures]]:
    """Measurements by kind, one of each a round, in drawn order."""
    found: dict[str, list[Figures]] = {kind: [] for kind in kinds}
    order = random.Random(0)
    for number in range(rounds):
        for kind in order.sample(kinds, len(kinds)):
            found[kind].append(measured(kind, *arguments))
        print(f"\r{arguments}: round {number + 1} of {rounds}   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return found


def ratio(over: list[Figures], under: list[Figures], key: str) -> float:
    """Median of the rounds' own ratios."""
    return round(statistics.median(a[key] / max(b[key], 1e-9) for a, b in zip(over, under, strict=True)), 4)


def summary(found: dict[str, list[Figures]], key: str, digits: int = 4) -> dict[str, float]:
    return {kind: round(statistics.median(one[key] for one in rows), digits) for kind, rows in found.items()}


def single(batch: int, passes: int, rounds: int, compared: bool) -> Figures:
    """The row of one batch size in one process."""
    found = rounds_of(KINDS if compared else KINDS[:1], rounds, batch, passes)
    row: Figures = {"batch": batch, "dimension": DIMENSION, "rounds": rounds}
    if compared:
        row["speedup"] = ratio(found["open_clip"], found["diptych"], "cpu")
        row["speedup_wall"] = ratio(found["open_clip"], found["diptych"], "wall")
        row["memory_ratio"] = ratio(found["diptych"], found["open_clip"], "MiB")
    row["cpu_s"] = summary(found, "cpu")
    row["wall_s"] = summary(found, "wall")
    row["memory_mib"] = summary(found, "MiB", 1)
    return row


def across(world: int, batch: int, rounds: int) -> Figures:
    """Figures of one global batch on several processes."""
    found = rounds_of(RANKED, rounds, batch, 3, world)
    row: Figures = {"batch": batch}
    for kind in RANKED[:2]:
        row[f"speedup_{kind}"] = ratio(found["open_clip"], found[kind], "cpu")
        row[f"speedup_{kind}_wall"] = ratio(found["open_clip"], found[kind], "wall")
    row["mb_moved"] = {
        kind: round(min(one["bytes"] for one in rows) / 1e6, 2) for kind, rows in found.items()
    }
    return row | {
        key: summary(found, name) for key, name in (("cpu_s", "cpu"), ("wall_s", "wall"), ("mib", "MiB"))
    }


def report(row: Figures) -> None:
    """Print one batch size."""
    print(f"\n{row['batch']:,} pairs in one process")
    for kind, seconds in row["cpu_s"].items():
        print(f"  {kind:10} {seconds:9.3f} CPU s   {row['memory_mib'][kind]:8.1f} MiB")
    if "speedup" in row:
        judge("open_clip's time / ours", row["speedup"], 1.0)
        target = MEMORY_TARGET if row["batch"] == 16384 else None
        judge("our memory / open_clip's", row["memory_ratio"], target, below=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two small batches, two processes, in a minute")
    parser.add_argument("--results", type=Path, help="FILE, by default benchmarks/results/loss.jsonl")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        kind, batch, passes = options.child
        child(kind, int(batch), int(passes))
        return
    print(machine())
    sizes = QUICK if options.quick else SIZES
    ranks: dict[str, Figures] = {}
    for world in WORLDS[:1] if options.quick else WORLDS:
        ranks[str(world)] = across(world, 256 if options.quick else GLOBAL_BATCH, 1 if options.quick else 3)
        print(f"\n{ranks[str(world)]['batch']:,} pairs on {world} processes: {json.dumps(ranks[str(world)])}")
    for batch, (passes, rounds) in sizes.items():
        row = single(batch, passes, rounds, batch != max(sizes))
        report(row)
        append_row("loss", row | {"ranks": ranks}, options.results)


if __name__ == "__main__":
    main()
