"""Processor seconds that all guards of a run take, as a share of its training, at the default settings.

    python benchmarks/overhead.py [--steps 200] [--quick] [--results FILE]

A run of ViT-S/16-128 (both towers 256 wide, 6 layers) on two processes of one thread, each with 16 samples of
a batch, which is a small step for such a model and so no help; rank 0, which does most, is measured. What a
step asks and notes for reliability is timed where it is called, by the clock of the calling thread
(CLOCK_THREAD_CPUTIME_ID); the time inside one of them is not counted again in another. The one checkpoint at
the end is set against the 500 steps that lie between two by default: the comparison of the processes before
it, its copy, for which training stands still, and its writing, hashing and syncing by a thread beside.
"""

import argparse
import functools
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from end_to_end import write_shards
from rows import append_row, judge
from train_step import MODELS

from diptych.configs.load import load_config
from diptych.pretrain.config import PretrainConfig
from diptych.pretrain.guard_config import GuardConfig
from diptych.pretrain.retention import CheckpointConfig
from diptych.pretrain.train import train

NAME, BATCH, TARGET = "ViT-S/16-128", 16, 0.01
EVERY_STEP = {
    "guard": ("guard:Guard", ("enter", "passes", "clamped", "settle", "row", "ready")),
    "flags": ("saver:Saver", ("flags", "heed", "due")),
    "stop": ("stop:StopRequest", ("look", "heard", "listen")),
    "metrics": ("tracking:Tracker", ("log",)),
    "watch": ("watch:Watch", ("step_done", "be_patient", "_look")),
}
PER_SAVE = {  # as often as there are checkpoints
    "replicas": ("guard:Guard", ("_compare",)),
    "copying": ("saver:Saver", ("_begin",)),
    "writing": ("saver:_Job", ("_run",)),
}


class Meter:
    """Seconds and calls of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.begun = self.steps = 0
        self._here = threading.local()

    def watch(self, part: str, owner: str, names: tuple[str, ...]) -> None:
        """Time these methods of ``module:Class`` from now on."""
        module, _, name = owner.partition(":")
        found = getattr(importlib.import_module(f"diptych.pretrain.{module}"), name)
        for method in names:
            setattr(found, method, self._timed(part, getattr(found, method)))

    def _timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            start = time.thread_time()
            before, self._here.inner = getattr(self._here, "inner", 0.0), 0.0
            try:
                return function(*arguments, **options)
            finally:
                spent = time.thread_time() - start
                self.seconds[part] += spent - self._here.inner
                self.calls[part] += 1
                self._here.inner = before + spent

        return timed

    def begin(self) -> None:
        """From the first step on the processor's time counts."""
        module: Any = importlib.import_module("diptych.pretrain.train")
        forward = module.forward_backward

        def first(*arguments: Any, **options: Any) -> Any:
            self.steps += 1
            if self.steps == 2:  # the first one warms up
                self.begun = time.process_time()
                self.seconds.clear()
                self.calls.clear()
            return forward(*arguments, **options)

        module.forward_backward = first


def measure(model: str, steps: int, folder: Path) -> dict[str, Any]:
    """Train, one process of two, and tell the shares."""
    config = {
        "out": str(folder / "run"),
        "data": {"train": str(folder / "shards")},
        "model": MODELS[model][0],
        "train": {
            "global_batch_size": 2 * BATCH,
            "total_samples": (steps + 1) * 2 * BATCH,
            "device": "cpu",
            "threads": 1,
        },
        "tracking": {"wandb": "off"},
    }
    file = folder / f"run_{os.environ['RANK']}.yaml"
    file.write_text(yaml.safe_dump(config))
    meter = Meter()
    meter.begin()
    for part, (owner, names) in (EVERY_STEP | PER_SAVE).items():
        meter.watch(part, owner, names)
    train(load_config(PretrainConfig, file))
    total = time.process_time() - meter.begun
    every = CheckpointConfig().every_steps
    assert GuardConfig().replicas_every_steps == every, (
        "a comparison belongs to every checkpoint, and no more"
    )
    per_save = {part: meter.seconds[part] / max(1, meter.calls[part]) for part in PER_SAVE}
    training = (total - sum(meter.seconds[part] for part in PER_SAVE)) / steps
    shares = {part: meter.seconds[part] / steps / training for part in EVERY_STEP}
    shares |= {part: seconds / every / training for part, seconds in per_save.items()}
    return {
        "model": model,
        "batch_size": BATCH,
        "processes": 2,
        "steps": steps,
        "cpu_s_per_step": round(training, 5),
        "cpu_s_per_save": {part: round(seconds, 4) for part, seconds in per_save.items()},
        "share": float(f"{sum(shares.values()):.3g}"),
        "shares": {part: float(f"{share:.3g}") for part, share in shares.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--quick", action="store_true", help="a tiny model, 20 steps")
    parser.add_argument("--results", type=Path, help="FILE, by default benchmarks/results/overhead.jsonl")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    model, steps = ("quick", 20) if options.quick else (NAME, options.steps)
    torch.set_num_threads(1)
    if options.worker is not None:
        row = measure(model, steps, options.worker)
        (options.worker / f"row_{os.environ['RANK']}.json").write_text(json.dumps(row))
        return
    with tempfile.TemporaryDirectory(prefix="diptych-overhead-") as temporary:
        write_shards(Path(temporary, "shards"), 64 * BATCH)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        again = [__file__, *sys.argv[1:], "--worker", temporary]
        one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, *launcher, *again], env=one_thread, check=True)
        row = json.loads(Path(temporary, "row_0.json").read_text())
    print(json.dumps(row, indent=1))
    judge("share of training", row["share"], None if options.quick else TARGET, below=True)
    append_row("overhead", row, options.results)


if __name__ == "__main__":
    main()
