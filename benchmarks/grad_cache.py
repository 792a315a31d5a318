"""Memory and seconds of a training step in micro-batches of an eighth (GradCache) beside the plain step.

    python benchmarks/grad_cache.py [--quick] [--results FILE]

Both are Diptych's own step (forward, loss, backward, AdamW) of ViT-S/16-128, both towers 256 wide with 6
layers, on captions with the lengths of LAION alt-texts; the plain one takes the whole batch at once. Each
measurement runs in an interpreter of its own on one thread, the two in drawn order; seconds are processor
time, and ratios medians of the rounds' own. Memory is what a process grows by at its peak, weights, gradients
and optimizer state included; without them, what the step adds to them. The largest difference between the two
gradients in fp64, relative to the largest entry of each parameter's, is of a small batch with patch dropout.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from contestants import resident
from rows import append_row, judge, machine
from torch import Tensor
from train_step import batch_of, build_ours, our_optimizer

from diptych.pretrain.contrastive import contrastive_loss
from diptych.pretrain.engine import keep_freed_memory
from diptych.pretrain.gradcache import forward_backward
from diptych.pretrain.model import ContrastiveModel, clamp_logit_scale

HERE = Path(__file__).resolve()
KINDS = {"plain": 1, "grad_cache": 8}  # micro-batches
MODEL, BATCH, ROUNDS = "ViT-S/16-128", 768, 3
MEMORY_TARGET, TIME_TARGET = 1 / 4, 1.4
Figures = dict[str, Any]


def features_and_loss(model: ContrastiveModel, batch: dict[str, Any], micro_batches: int) -> Tensor:
    """Forward and backward of one batch, as in ``pretrain/train.py``."""

    def loss_of(out: dict[str, Tensor]) -> Tensor:
        return contrastive_loss(**out, valid=batch["valid"])

    return forward_backward(model, batch, loss_of, micro_batches=micro_batches)["loss"]


def child(kind: str, name: str, size: int) -> None:
    """Print seconds and memory of one step, as JSON."""
    torch.set_num_threads(1)
    keep_freed_memory()
    before = resident("VmRSS")
    model = build_ours(name).train()
    optimizer = our_optimizer(model)

    def step(batch: dict[str, Any], micro_batches: int) -> None:
        features_and_loss(model, batch, micro_batches)
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        clamp_logit_scale(model)

    step(batch_of(name, 2, 0), 1)  # optimizer state and gradients are there from now on
    batch = batch_of(name, size, 1)
    state = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    wall, cpu = time.perf_counter(), time.process_time()
    step(batch, KINDS[kind])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    peak = resident("VmHWM")
    print(json.dumps({"cpu": cpu, "wall": wall, "MiB": peak - before, "step_MiB": peak - state}))


def measured(kind: str, name: str, size: int) -> Figures:
    """One step in a fresh process."""
    words = [sys.executable, str(HERE), "--child", kind, name, str(size)]
    done = subprocess.run(words, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    if done.returncode:
        raise SystemExit(f"{kind} ended with exit code {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def difference(name: str) -> float:
    """Largest relative difference between a parameter's two gradients in fp64, with half of the patches
    dropped."""
    batch = batch_of(name, 16, 0)
    batch["sample_id"] = torch.arange(16)
    gradients: list[dict[str, Tensor]] = []
    for micro_batches in KINDS.values():
        model = build_ours(name, 0.5).double().train()
        features_and_loss(model, batch, micro_batches)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    whole, cut = gradients
    assert whole.keys() == cut.keys()
    return max(float((whole[n] - cut[n]).abs().max() / whole[n].abs().max().clamp_min(1e-30)) for n in whole)


def figures(found: dict[str, list[Figures]]) -> Figures:
    """The row, without the comparison in fp64."""

    def ratio(key: str) -> float:
        pairs = zip(found["grad_cache"], found["plain"], strict=True)
        return round(statistics.median(a[key] / b[key] for a, b in pairs), 4)

    def medians(key: str, digits: int) -> dict[str, float]:
        return {k: round(statistics.median(r[key] for r in rows), digits) for k, rows in found.items()}

    return {
        "memory_ratio": ratio("MiB"),
        "time_ratio": ratio("cpu"),
        "time_ratio_wall": ratio("wall"),
        "memory_ratio_without_state": ratio("step_MiB"),
        "cpu_s": medians("cpu", 3),
        "wall_s": medians("wall", 3),
        "memory_mib": medians("MiB", 0),
        "step_mib": medians("step_MiB", 0),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--results", type=Path, help="FILE, by default benchmarks/results/grad_cache.jsonl")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        kind, name, size = options.child
        child(kind, name, int(size))
        return
    print(machine())
    name, size, rounds = ("quick", 64, 1) if options.quick else (MODEL, BATCH, ROUNDS)
    found: dict[str, list[Figures]] = {kind: [] for kind in KINDS}
    order = random.Random(0)
    for number in range(rounds):
        for kind in order.sample(list(KINDS), len(KINDS)):
            found[kind].append(measured(kind, name, size))
        print(f"\rround {number + 1} of {rounds}   ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    row = figures(found) | {"model": name, "batch_size": size, "micro_batches": KINDS["grad_cache"]}
    row |= {"rounds": rounds, "difference_fp64": difference(name)}
    for kind in KINDS:
        print(f"{kind:12} {row['cpu_s'][kind]:9.3f} CPU s   {row['memory_mib'][kind]:8.0f} MiB at the peak")
    judge("memory, micro-batches / plain", row["memory_ratio"], MEMORY_TARGET, below=True)
    judge("without weights and their state", row["memory_ratio_without_state"], None)
    judge("time, micro-batches / plain", row["time_ratio"], TIME_TARGET, below=True)
    print(f"largest relative difference of a gradient in fp64: {row['difference_fp64']:.1e}")
    append_row("grad_cache", row, options.results)


if __name__ == "__main__":
    main()
