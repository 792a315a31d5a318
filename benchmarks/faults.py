"""The same faults against Diptych, open_clip's trainer and Accelerate's ``save_state``, side by side.

    python benchmarks/faults.py [--quick] [--only KIND] [--work DIR] [--peer-packages DIR] [--results FILE]

Each trains the same small CLIP for three epochs of twelve batches on one core. Something goes wrong in it,
the same command is started again, and it is held against its own undisturbed run: did it end without a hand,
how many steps were done again, which samples did the final weights not learn from or learn from twice, and
how far are they from the undisturbed ones. Diptych and Accelerate save every four steps, open_clip every
epoch, as often as it can. Accelerate is a loop as in its guide to checkpoints; what it reads is the loop's
own, so that there is no damaged shard for it. open_clip's loader needs an old webdataset and pandas, which
pip puts into a folder of their own. What each fault did is kept in DIR: a stopped table goes on where it was.
"""

import argparse
import hashlib
import io
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import yaml
from faulty import BATCH, CAPTION, EPOCHS, LR, MODEL, PER_EPOCH, WARMUP
from loader import peer_packages
from PIL import Image
from rows import append_row
from safetensors.torch import load_file

from diptych.configs.files import cache_dir
from diptych.data.writer import ShardWriter

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tests" / "faults"))
from killing import Forker  # noqa: E402 # lies where the line above points

KINDS = ("diptych", "open_clip", "accelerate")
EVERY, FAULT_STEP, SHARES = 4, 19, (0.2, 0.5, 0.8)
SAMPLES = BATCH * PER_EPOCH
FAULTS = {
    "none": "nothing: the same run again",
    "killed_in_step": "SIGKILL in the middle of an epoch",
    "killed_in_save": "SIGKILL while a checkpoint is written",
    "truncated": "the newest checkpoint's largest file is cut in half",
    "flipped": "a bit of the newest checkpoint's largest file is flipped",
    "rng_missing": "the newest checkpoint's random numbers are missing",
    "sigterm": "SIGTERM in the middle of an epoch",
    "nan": "the loss of one step is not a number",
    "shard": "the last quarter of a shard is zeros",
}


def write_shards(folder: Path) -> None:
    """Four tars of coloured squares, each with a caption that names it."""
    with ShardWriter(folder, samples_per_shard=SAMPLES // 4) as writer:
        for i in range(SAMPLES):
            colours = hashlib.sha256(str(i).encode()).digest()
            image = Image.new("RGB", (32, 32), tuple(colours[:3]))
            image.paste(tuple(colours[3:6]), (8, 8, 24, 24))
            buffer = io.BytesIO()
            image.save(buffer, format="PNG")
            writer.write(f"{i:04d}", buffer.getvalue(), "png", CAPTION.format(i), {"n": i})


def write_configs(folder: Path, shards: Path) -> dict[str, str]:
    """The file that each trainer is given."""
    config = {
        "data": {"train": str(shards), "max_bad_fraction": 0.1},
        "model": MODEL,
        "optim": {"lr": LR},
        "schedule": {"warmup_samples": WARMUP * BATCH},
        "train": {
            "global_batch_size": BATCH,
            "total_samples": EPOCHS * SAMPLES,
            "log_every_steps": 1,
            "device": "cpu",
            "threads": 1,
        },
        "checkpoint": {"every_steps": EVERY},
        "tracking": {"wandb": "off"},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    (folder / "faults.json").write_text(json.dumps(MODEL))
    return {"diptych": str(folder / "run.yaml"), "open_clip": str(folder / "faults.json"), "accelerate": ""}


class Trainer:
    """Starts of one trainer in folders of its own."""

    def __init__(self, kind: str, forker: Forker, config: str, packages: Path) -> None:
        self.kind, self.forker, self.config, self.packages = kind, forker, config, packages

    def start(self, run: Path, shards: Path, **fault: Any) -> int:
        """Start and wait; the exit code."""
        run.parent.mkdir(parents=True, exist_ok=True)
        job = {"run": str(run), "shards": str(shards), "config": self.config, "every": EVERY}
        job |= {"journal": str(run.with_suffix(".journal")), "first": self.newest_step(run), **fault}
        paths = [str(HERE), *([str(self.packages)] if self.kind == "open_clip" else [])]
        more = {"main": f"faulty:{self.kind}", "paths": paths}
        log = run.with_suffix(".log")
        pid = self.forker.start([json.dumps(job)], log, environment={"WANDB_MODE": "disabled"}, **more)
        while (end := self.forker.look(pid)) is None:
            time.sleep(0.01)
        return int(end["code"])

    def checkpoints(self, run: Path) -> list[Path]:
        """Checkpoints of a run, oldest first: folders, or files."""
        pattern = {
            "diptych": "checkpoints/step_*",
            "open_clip": "checkpoints/epoch_latest.pt",
            "accelerate": "checkpoints/checkpoint_*",
        }[self.kind]
        return sorted(run.glob(pattern), key=lambda path: path.stat().st_mtime)

    def newest_step(self, run: Path) -> int:
        """Where a start goes on, for Diptych, whose journal counts from there."""
        if self.kind != "diptych":
            return 0
        from diptych.pretrain.checkpoint import newest_checkpoint

        newest = newest_checkpoint(run)
        return int(newest.name.removeprefix("step_")) if newest is not None else 0

    def weights(self, run: Path) -> dict[str, torch.Tensor] | None:
        """What the run ended with, None if it has no end."""
        if self.kind == "diptych":
            files = [run / f"checkpoints/step_{EPOCHS * PER_EPOCH:08d}/open_clip_model.safetensors"]
        elif self.kind == "open_clip":
            files = [run / f"checkpoints/epoch_{EPOCHS}.pt"]
        else:
            files = [run / "final.safetensors"]
        if not files[0].is_file():
            return None
        if self.kind == "open_clip":
            return torch.load(files[0], weights_only=True)["state_dict"]
        return load_file(files[0])


def journal(run: Path) -> list[dict[str, Any]]:
    file = run.with_suffix(".journal")
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def data_of(rows: list[dict[str, Any]], skipped: set[int]) -> dict[str, int]:
    """What the final weights have not learnt from and what twice, over all epochs, and steps done again. A
    step counts as it was done the last time."""
    steps = [row for row in rows if "step" in row]
    last = {row["step"]: row["samples"] for row in steps}
    missing = repeated = 0
    for epoch in range(EPOCHS):
        own = range(epoch * PER_EPOCH + 1, (epoch + 1) * PER_EPOCH + 1)
        seen = Counter(sample for step in own if step not in skipped for sample in last.get(step, []))
        missing += SAMPLES - len(seen)
        repeated += sum(seen.values()) - len(seen)
    return {"steps_again": len(steps) - len(last), "missing": missing, "repeated": repeated}


def distance(mine: dict[str, torch.Tensor] | None, other: dict[str, torch.Tensor]) -> float | None:
    """Of the weights, relative to the undisturbed ones; None if there are none or they are not numbers."""
    if mine is None:
        return None
    pairs = [(mine[name].double(), other[name].double()) for name in other if other[name].is_floating_point()]
    off = math.sqrt(sum(float((a - b).square().sum()) for a, b in pairs))
    value = off / math.sqrt(sum(float(b.square().sum()) for _, b in pairs))
    return float(f"{value:.3g}") if math.isfinite(value) else None


def largest(checkpoint: Path) -> Path:
    files = [checkpoint] if checkpoint.is_file() else [p for p in checkpoint.rglob("*") if p.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    file = largest(checkpoint)
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)


def flip(checkpoint: Path) -> None:
    file = largest(checkpoint)
    data = bytearray(file.read_bytes())
    data[len(data) // 2 | 3] ^= 1 << 6  # of a float's exponent
    file.write_bytes(data)


def forget(checkpoint: Path) -> None:
    for name in ("rng.safetensors", "random_states_0.pkl"):
        if checkpoint.is_dir() and (checkpoint / name).is_file():
            (checkpoint / name).unlink()


DAMAGE: dict[str, Callable[[Path], None]] = {"truncated": truncate, "flipped": flip, "rng_missing": forget}


class Arena:
    """All faults against one trainer."""

    def __init__(self, kind: str, forker: Forker, work: Path, packages: Path) -> None:
        self.work = Path(tempfile.mkdtemp(dir=work))
        self.shards = self.work / "shards"
        write_shards(self.shards)
        config = write_configs(self.work, self.shards)[kind]
        self.trainer = trainer = Trainer(kind, forker, config, packages)
        self.straight = self.work / "straight"
        code = trainer.start(self.straight, self.shards)
        weights = trainer.weights(self.straight)
        if code or weights is None:
            raise SystemExit(f"{kind}: {self.straight.with_suffix('.log').read_text()[-3000:]}")
        self.truth = weights
        self.saves = [row["seconds"] for row in journal(self.straight) if "save" in row]

    def result(self, name: str) -> dict[str, Any]:
        """What a fault did."""
        if name == "killed_in_save":
            return self.in_save(self.work / name, SHARES)
        return self.once(name, self.work / name / "run")

    def judge(self, run: Path, code: int) -> dict[str, Any]:
        """What came of a run."""
        weights = self.trainer.weights(run) if code == 0 else None
        bad = run / "bad_steps.jsonl"
        skipped = (
            {json.loads(line)["step"] for line in bad.read_text().splitlines()} if bad.is_file() else set()
        )
        finite = weights is not None and all(bool(v.isfinite().all()) for v in weights.values())
        return {
            "survived": code == 0 and finite,
            **data_of(journal(run), skipped),
            "difference": distance(weights, self.truth),
        }

    def once(self, name: str, run: Path) -> dict[str, Any]:
        """One fault, and the start after it."""
        start, shards = self.trainer.start, self.shards
        if name in ("none", "nan"):
            return self.judge(run, start(run, shards, **({"nan_at": FAULT_STEP} if name == "nan" else {})))
        if name == "shard":
            shards = run.with_suffix(".shards")
            shutil.copytree(self.shards, shards)
            tar = sorted(shards.glob("*.tar"))[1]
            size = tar.stat().st_size
            with tar.open("r+b") as file:
                file.seek(size * 3 // 4)
                file.write(bytes(size - size * 3 // 4))
            return self.judge(run, start(run, shards))
        first = {"term_at": FAULT_STEP} if name == "sigterm" else {"die_at": FAULT_STEP}
        code = start(run, shards, **first)
        if name in DAMAGE:
            DAMAGE[name](self.trainer.checkpoints(run)[-1])
        ended = code != 0 or self.trainer.weights(run) is None
        return self.judge(run, start(run, shards) if ended else code)

    def in_save(self, folder: Path, shares: tuple[float, ...]) -> dict[str, Any]:
        """Killed at several instants of the third save; the worst is told."""
        found: list[dict[str, Any]] = []
        for share in shares:
            run = folder / f"share_{share:.0%}"
            seconds = share * statistics.median(self.saves)
            self.trainer.start(run, self.shards, die_in_save=(3, seconds))
            found.append(self.judge(run, self.trainer.start(run, self.shards)))
        worst = {key: max(one[key] for one in found) for key in ("steps_again", "missing", "repeated")}
        off = [one["difference"] for one in found if one["difference"] is not None]
        survived = sum(one["survived"] for one in found)
        return {
            "survived": survived == len(found),
            "tries": len(found),
            "tries_survived": survived,
            **worst,
            "difference": max(off, default=None),
        }


def results_of(
    kind: str, names: tuple[str, ...], work: Path, forker: Forker, packages: Path
) -> Iterator[tuple[str, dict[str, Any]]]:
    """What each fault did to this trainer."""
    done = work / "done"
    if not done.is_dir():
        shutil.rmtree(work, ignore_errors=True)
        done.mkdir(parents=True)
    arena: Arena | None = None
    for name in names:
        if (kind, name) in (("accelerate", "shard"), ("open_clip", "rng_missing")):
            continue  # reads no shards; keeps no random numbers
        kept = done / f"{name}.json"
        if not kept.is_file():
            if arena is None:
                arena = Arena(kind, forker, work, packages)
            kept.write_text(json.dumps(arena.result(name)))
        yield name, json.loads(kept.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="Diptych alone, three faults")
    parser.add_argument("--only", choices=KINDS, help="fill DIR with these and write no row")
    parser.add_argument("--work", type=Path, help="DIR, by default one in Diptych's cache")
    parser.add_argument(
        "--peer-packages", type=Path, default=cache_dir() / "peers" / "open_clip-3.3", help="DIR"
    )
    parser.add_argument("--results", type=Path, help="FILE, by default benchmarks/results/faults.jsonl")
    options = parser.parse_args()
    packages = options.peer_packages if options.quick else peer_packages(options.peer_packages)
    if packages is None:
        return
    kinds = KINDS[:1] if options.quick else (options.only,) if options.only else KINDS
    names = ("killed_in_step", "flipped", "shard") if options.quick else tuple(FAULTS)
    work: Path = options.work or cache_dir() / "benchmarks" / "faults"
    table: dict[str, dict[str, Any]] = {name: {} for name in names}
    with Forker() as forker:
        for kind in kinds:
            for name, result in results_of(kind, names, work / kind, forker, packages):
                table[name][kind] = result
                print(f"{kind:11} {FAULTS[name]:58} {json.dumps(result)}", flush=True)
    if options.only:
        return
    row = {"quick": options.quick, "faults_told": FAULTS, "faults": table}
    append_row("faults", row, options.results)


if __name__ == "__main__":
    main()
