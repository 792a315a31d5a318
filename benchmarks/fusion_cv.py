"""What a cross-validation over all heads on frozen encoders costs, with features kept and without.

    python benchmarks/fusion_cv.py [--quick] [--rows N] [--folds K] [--results FILE]

A made table of pictures (64 pixels) and captions in ten classes, and a small CLIP (ViT of 6 layers, width
256) with random weights, which cost what trained ones do. ``cold`` is the whole ``finetune`` with an empty
cache: pictures and captions are encoded once for all heads, folds and epochs. ``warm`` is the same command
for another run folder, with the features in the cache. A program without either encodes every batch: two
heads are trained on the first fold by the same loop, from the table of features (``kept``) and with the
encoders at work, without gradients (``live``); ``live_ratio`` is that of the two sums. Seconds are those of
the clock, on one thread.
"""

import argparse
import csv
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rows import append_row, judge, machine

from diptych.configs.load import load_config
from diptych.data.text import tokenizer_for
from diptych.finetune.adapt.fit import LiveRows, Part, fit
from diptych.finetune.config import FinetuneConfig
from diptych.finetune.encoders.features import silent
from diptych.finetune.protocol import finetune
from diptych.finetune.runs.saved import write_encoder
from diptych.finetune.session import Session, open_sessions
from diptych.finetune.tables.cells import PictureReader
from diptych.pretrain.config import ModelConfig
from diptych.pretrain.model import LoadedModel, build_model, open_clip_config

HEADS: dict[str, dict[str, Any]] = {
    "weighted_sum": {"op": "weighted_sum"},
    "gated": {"op": "gated"},
    "bilinear": {"op": "bilinear"},
    "late": {"op": "late"},
    "stacking": {"op": "late", "rule": "stacking"},
    "merged": {"op": "merged"},
    "cross": {"op": "cross"},
    "bottleneck": {"op": "bottleneck"},
}
LIVE = ("concat", "bilinear")
EPOCHS = 10
VISION = {"image_size": 64, "patch_size": 8, "width": 256, "head_width": 64, "layers": 6}
TEXT = {"context_length": 32, "width": 256, "heads": 4, "layers": 6}
SMALL = {"layers": 1, "width": 32}
CLASSES = 10


def make_table(folder: Path, rows: int) -> None:
    """Pictures whose colour, and captions whose word, lean to the class."""
    (folder / "pictures").mkdir()
    random = np.random.default_rng(0)
    with (folder / "table.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["id", "image", "text", "label"])
        for i in range(rows):
            label = i % CLASSES
            noise = random.integers(0, 120, (64, 64, 3)) + np.array([12 * label, 130 - 12 * label, 60])
            Image.fromarray(noise.clip(0, 255).astype(np.uint8)).save(folder / f"pictures/{i}.png")
            word = label if random.random() < 0.5 else int(random.integers(CLASSES))
            table.writerow([i, f"pictures/{i}.png", f"a thing of the {word} kind, number {i}", f"c{label}"])


def make_checkpoint(folder: Path, *, quick: bool) -> None:
    """The encoders as a checkpoint folder."""
    torch.manual_seed(0)
    vision, text = (VISION | SMALL, TEXT | SMALL) if quick else (VISION, TEXT)
    clip = build_model(ModelConfig(embed_dim=256, vision_cfg=vision | {"head_width": 32}, text_cfg=text))
    tokenizer = tokenizer_for(open_clip_config(clip)["model_cfg"]["text_cfg"], None)
    folder.mkdir()
    write_encoder(LoadedModel(clip, tokenizer), folder)


def config_of(folder: Path, out: str, folds: int, epochs: int) -> FinetuneConfig:
    """The config of a run that goes to ``out`` in the folder of table and checkpoint."""
    config = {
        "out": str(folder / out),
        "task": {"type": "multiclass", "target": "label"},
        "data": {"manifest": str(folder / "table.csv"), "id": "id", "split": None},
        "model": {"checkpoint": str(folder / "checkpoint")},
        "heads": HEADS,
        "adapt": {"epochs": epochs},
        "early_stopping": {"patience": epochs},
        "eval": {"seeds": [0], "bootstrap": 200, "cv": {"folds": folds}},
        "device": "cpu",
        "tracking": {"wandb": "off"},
    }
    (folder / f"{out}.yaml").write_text(json.dumps(config))  # JSON is YAML
    return load_config(FinetuneConfig, folder / f"{out}.yaml")


def clocked(work: Callable[[], Any]) -> float:
    """Seconds that ``work`` takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def train(session: Session, name: str, *, live: bool) -> None:
    """One head on one fold, from the table of features or with the encoders at work."""

    def part(rows: Any) -> Part:
        kept = session.part(rows)
        if not live:
            return kept
        some = session.rows.take(rows)
        encoders = session.model
        for parameter in encoders.clip.parameters():
            parameter.requires_grad_(False)
        reader = PictureReader()
        return Part(LiveRows(encoders, some, 10**6, reader), kept.targets)

    head = session.config.all_heads()[name]
    fit(
        head,
        session.config.adapt_of(name),
        session.config.early_stopping,
        session.task,
        part(session.splits.train),
        part(session.splits.inner),
        widths=session.widths,
        token_widths=session.token_widths,
        seed=0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="little data, a tiny model: only that it runs")
    parser.add_argument("--rows", type=int, default=300)
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--results", type=Path)
    options = parser.parse_args()
    rows, epochs, folds = (120, 2, 2) if options.quick else (options.rows, EPOCHS, options.folds)
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["DIPTYCH_CACHE"] = str(folder / "cache")
        make_table(folder, rows)
        make_checkpoint(folder / "checkpoint", quick=options.quick)
        cold = clocked(lambda: finetune(config_of(folder, "cold", folds, epochs)))
        warm = clocked(lambda: finetune(config_of(folder, "warm", folds, epochs)))
        session = open_sessions(config_of(folder, "live", folds, epochs), silent, lambda line: None)[0]
        heads = session.config.all_heads()
        kept, live = (
            {name: clocked(lambda name=name, how=how: train(session, name, live=how)) for name in LIVE}
            for how in (False, True)
        )
    row = {
        "quick": options.quick,
        "rows": rows,
        "folds": folds,
        "heads": len(heads),
        "epochs": epochs,
        "cold_s": round(cold, 1),
        "warm_s": round(warm, 1),
        "fold_kept_s": {k: round(v, 2) for k, v in kept.items()},
        "fold_live_s": {k: round(v, 2) for k, v in live.items()},
        "live_ratio": round(sum(live.values()) / sum(kept.values()), 1),
    }
    print(f"{rows:,} rows, {folds} folds, {len(heads)} heads, {epochs} epochs")
    judge("cross-validation, cold, s", cold, None)
    judge("cross-validation, warm, s", warm, None)
    judge("encoding every batch / features", row["live_ratio"], None)
    append_row("fusion_cv", row, options.results)


if __name__ == "__main__":
    main()
