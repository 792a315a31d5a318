"""A task that frozen features answer badly: what counts is one corner of a picture, the others are noise."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diptych.finetune.adapt.fit import Fitted, LiveRows, Part, fit
from diptych.finetune.adapt.training import Keeper
from diptych.finetune.config import AdaptConfig, HeadConfig, StoppingConfig
from diptych.finetune.encoders.live import encode_rows
from diptych.finetune.tables.cells import Picture
from diptych.finetune.tasks.task import Task
from diptych.pretrain.model import LoadedModel

from .labelled import live_rows

COLOURS = np.array([[230, 40, 40], [40, 40, 230]])
NAMES = ("red", "blue", "green", "gold")
TASK = Task("binary", ("0", "1"))
PROMPTS = {"0": ["red corner", "a red one"], "1": "blue corner"}
Log = list[dict[str, Any]]


def corner(label: int, random: np.random.Generator) -> bytes:
    """A picture of four squares of which the first says the class."""
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    for row in range(2):
        for column in range(2):
            kind = label if row == column == 0 else random.integers(2)
            colour = np.clip(COLOURS[kind] + random.integers(-30, 30, 3), 0, 255)
            pixels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8] = colour
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def corners(model: LoadedModel, n: int, seed: int) -> Part:
    """Live rows whose text knows nothing of the class."""
    random = np.random.default_rng(seed)
    targets = np.arange(n) % 2
    images = [Picture(data=corner(int(target), random)) for target in targets]
    texts = [f"{NAMES[random.integers(len(NAMES))]} square" for _ in targets]
    rows = live_rows(model, image=images, text=texts)
    return Part(rows, torch.from_numpy(targets))


def frozen(part: Part) -> Part:
    """The same rows with features of the encoders as they are."""
    assert isinstance(part.rows, LiveRows)
    return Part(encode_rows(part.rows, part.rows.modalities), part.targets)


def train(
    model: LoadedModel, *, op: Any = "image", seed: int = 0, keeper: Keeper | None = None, **adapt: Any
) -> tuple[Fitted, Log]:
    """A head and these encoders trained on 160 corners."""
    given = {"epochs": 6, "batch_size": 32, "lr": 1e-2, "encoder_lr": 3e-3} | adapt
    settings = {"encoder_epochs": 6, "encoder_batch_size": 32} | given
    parts = corners(model, 160, 1), corners(model, 80, 2)
    live = parts[0].rows, parts[1].rows
    assert isinstance(live[0], LiveRows)
    assert isinstance(live[1], LiveRows)
    log: Log = []
    fitted = fit(
        HeadConfig(op=op), AdaptConfig(**settings), StoppingConfig(), TASK, frozen(parts[0]),
        frozen(parts[1]), widths={"image": 24, "text": 24}, seed=seed, live=live, log=log.append,
        keeper=keeper,
    )  # fmt: skip
    return fitted, log


def checkpoint(folder: Path) -> Path:
    """A tiny checkpoint."""
    from .labelled import squares

    return folder if folder.is_dir() else squares.make_checkpoint(folder)
