"""Labelled tables of coloured squares, and features whose answers are known."""

import csv
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from diptych.finetune.adapt.fit import Part
from diptych.finetune.config import ModalityConfig
from diptych.finetune.encoders.features import FeatureRows
from diptych.finetune.encoders.live import LiveRows
from diptych.finetune.tables.cells import Picture, PictureReader
from diptych.finetune.tables.manifest import Rows
from diptych.pretrain.model import LoadedModel


def _squares() -> ModuleType:
    """The module of coloured squares of the pretraining tests."""
    name = "diptych_test_squares"
    if name not in sys.modules:
        path = Path(__file__).parents[1] / "pretrain" / "evaluate_corpus.py"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


squares = _squares()
COLUMNS = ("id", "image", "text", "target", "group", "split")
SPLIT_OF = ["train"] * 6 + ["val"] * 2 + ["test"] * 2


def match_rows(folder: Path, *, shades: int = 10, names: int = 8) -> list[list[Any]]:
    """Squares in shades, each with its caption (1) and with another's (0); one group per shade."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[list[Any]] = []
    for shade in range(shades):
        for i, name in enumerate(squares.NAMES[:names]):
            image = f"images/{name}{shade}.png"
            (folder / image).write_bytes(squares.square(name, 20 * shade))
            other = squares.NAMES[(i + 1 + shade % (names - 1)) % names]
            split = SPLIT_OF[shade % 10]
            for text, target in ((name, 1), (other, 0)):
                rows.append([f"{name}{shade}-{target}", image, f"{text} square", target, f"s{shade}", split])
    return rows


def write_csv(path: Path, rows: Sequence[Sequence[Any]], columns: Sequence[str] = COLUMNS) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_task(folder: Path, **options: Any) -> tuple[Path, Path]:
    """A table of squares and a tiny checkpoint in ``folder``."""
    table = write_csv(folder / "match.csv", match_rows(folder, **options))
    return table, squares.make_checkpoint(folder / "checkpoint")


CONFIG = """
name: squares
out: {folder}/run
task: {{type: binary}}
data: {{manifest: {folder}/match.csv, id: id, group: group}}
model: {{checkpoint: {folder}/checkpoint}}
heads: {heads}
adapt: {{epochs: {epochs}, batch_size: 32}}
eval: {{seeds: [0, 1], bootstrap: 100}}
tracking: {{wandb: "off"}}
"""


def write_config(folder: Path, heads: str = "[concat, late]", *, epochs: int = 2, more: str = "") -> Path:
    path = folder / "finetune.yaml"
    path.write_text(CONFIG.format(folder=folder, heads=heads, epochs=epochs) + more, encoding="utf-8")
    return path


def xor_rows(n: int, seed: int, *, width: int = 16, noise: float = 0.2) -> Part:
    """Two unrelated directions, one per modality, each with a random sign; the class says whether the signs
    agree. Neither modality alone knows anything. Tokens: the embedding and a token of noise."""
    random = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (2, n), generator=random) * 2.0 - 1
    directions = torch.linalg.qr(torch.randn(width, width, generator=torch.Generator().manual_seed(7)))[0][:2]
    tables: dict[str, Tensor] = {}
    for k, sign, direction in zip(("image", "text"), signs, directions, strict=True):
        z = sign[:, None] * direction + noise * torch.randn(n, width, generator=random)
        tables[k] = torch.nn.functional.normalize(z, dim=1)
        other = torch.randn(n, 1, width, generator=random)
        tables[f"{k}_tokens"] = torch.cat([tables[k][:, None] * width**0.5, other], dim=1)
    tables["text_mask"] = torch.ones(n, 2, dtype=torch.bool)
    rows = FeatureRows(tables, {"image": torch.arange(n), "text": torch.arange(n)})
    return Part(rows, (signs[0] == signs[1]).long())


def live_rows(model: LoadedModel, **cells: Sequence[Picture | str | None]) -> LiveRows:
    """Live rows of one picture and one text each; ``image`` and ``text`` are the modalities."""
    held = {k: [(c,) if isinstance(c, Picture) else c for c in column] for k, column in cells.items()}
    n = len(next(iter(held.values())))
    rows = Rows("x", [str(i) for i in range(n)], {k: ModalityConfig(column=k) for k in held}, dict(held))
    return LiveRows(model, rows, 10**6, PictureReader())


def everywhere(n: int) -> dict[str, Tensor]:
    """Both modalities present in n rows."""
    return {k: torch.ones(n, dtype=torch.bool) for k in ("image", "text")}
