"""A tiny run on coloured squares: 60 samples, a small ViT, a dozen steps a second."""

import json
import os
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from diptych.configs.load import load_config
from diptych.pretrain.config import PretrainConfig

from .evaluate_corpus import NAMES, SIZE, write_split

BATCH = 16


def make_data(root: Path) -> Path:
    """Shards of 60 training squares and 24 held-out ones."""
    write_split(root / "train", ["noto", "twemoji", "fluent", "fxemoji", "mdi"], NAMES)
    write_split(root / "val", ["openmoji", "other"], NAMES)
    return root


def write_config(path: Path, data: Path, **sections: Any) -> Path:
    """A config file; ``sections`` are merged into the defaults below."""
    config: dict[str, Any] = {
        "data": {"train": str(data / "train"), "augment": {"scale": [0.6, 1.0], "hflip": 0.5}},
        "model": {
            "embed_dim": 16,
            "vision_cfg": {
                "layers": 2,
                "width": 32,
                "head_width": 16,
                "patch_size": 8,
                "image_size": SIZE,
                "patch_dropout": 0.25,
            },
            "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
        },
        "loss": {"duplicates": "positives"},
        "optim": {"lr": 2e-3, "ema_decay": 0.9},
        "schedule": {"warmup_samples": 64},
        "train": {
            "global_batch_size": BATCH,
            "total_samples": 20 * BATCH,
            "log_every_steps": 1,
            "device": "cpu",
            "threads": 1,
        },
        "checkpoint": {"every_steps": 6},
        "evaluate": {"data": str(data / "val"), "every_steps": 10},
        "tracking": {"wandb": "off"},
    }
    for name, section in sections.items():
        config[name] = {**config[name], **section} if isinstance(section, dict) else section
    path.write_text(yaml.safe_dump(config))
    return path


def load(path: Path, out: Path, *overrides: str) -> PretrainConfig:
    return load_config(PretrainConfig, path, [f"out={out}", *overrides])


def rows(run: Path, kind: str = "train") -> list[dict[str, Any]]:
    lines = (run / "metrics.jsonl").read_text().split("\n")[:-1]  # the last may still be on its way
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in rows(run)]


def launch(
    config: Path,
    out: Path,
    processes: int,
    *overrides: str,
    launcher: list[str] | None = None,
    own_group: bool = False,
) -> subprocess.Popen[str]:
    """The run as a user starts it, over real gloo processes; ``launcher`` in place of torchrun."""
    if launcher is None:
        torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        launcher = torchrun if processes > 1 else []
    module = ["-m", "diptych.pretrain", str(config), f"out={out}", *overrides]
    return subprocess.Popen(
        [sys.executable, *launcher, *module],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=own_group,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Wait for a good end and return what it printed."""
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0, err[-3000:]
    return out


HOLD = """
import sys, time
from pathlib import Path
from diptych.pretrain.owner import RunLock
RunLock(Path(sys.argv[1])).take()
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def held(run: Path) -> Generator[int]:
    """Inside, another process works in the run folder: its process id. It is killed at the end."""
    command = [sys.executable, "-c", HOLD, str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder.pid
        finally:
            holder.kill()
