"""Tables of squares with texts, numbers, brands and sounds."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from .labelled import SPLIT_OF, squares

BRANDS = ("acme", "bolt", "core")
NUMBERS = {"acme": 0.0, "bolt": 1.0, "core": 2.0}
MODALITIES = (
    "{image: {column: image}, text: {column: text}, "
    "tabular: {numeric: [price, stars], categorical: [brand]}, audio: {embedding: sound}}"
)
CONFIG = """
name: modal
out: {folder}/run
task: {{type: binary}}
data: {{manifest: {folder}/modal.parquet, id: id, group: group, modalities: {modalities}}}
model: {{checkpoint: {folder}/checkpoint}}
heads: {heads}
adapt: {{epochs: {epochs}, batch_size: 32}}
eval: {{seeds: [0], bootstrap: 100}}
tracking: {{wandb: "off"}}
"""


def modal_rows(folder: Path, n: int = 160, seed: int = 0) -> list[dict[str, Any]]:
    """Rows whose label is told by ``price`` and ``brand`` alone; some cells are empty."""
    random = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for i in range(n):
        name = squares.NAMES[int(random.integers(6))]
        shade = int(random.integers(8))
        path = f"images/{name}{shade}.png"
        if not (folder / path).exists():
            (folder / path).write_bytes(squares.square(name, 20 * shade))
        target, brand = int(random.integers(2)), BRANDS[int(random.integers(3))]
        price = 10.0 + 3.0 * (2 * target - 1) + 4.0 * NUMBERS[brand] + float(random.normal(0, 0.8))
        rows.append(
            {
                "id": f"r{i}",
                "image": None if i % 9 == 4 else path,
                "text": None if i % 11 == 5 else f"{squares.NAMES[int(random.integers(6))]} square",
                "price": None if i % 13 == 6 else price,
                "stars": None if i % 17 == 8 else float(random.integers(1, 6)),
                "brand": None if i % 19 == 9 else brand,
                "sound": None if i % 7 == 3 else random.normal(size=5).astype(np.float32).tolist(),
                "target": target,
                "group": f"g{i}",
                "split": SPLIT_OF[i % 10],
            }
        )
        if i % 23 == 11:
            rows[-1] |= {"price": None, "stars": None, "brand": None, "image": path, "text": "a square"}
    return rows


def write_modal(folder: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), folder / "modal.parquet")
    return folder / "modal.parquet"


def write_modal_task(
    folder: Path, heads: str = "[gated]", *, modalities: str = MODALITIES, epochs: int = 2, more: str = ""
) -> Path:
    """A table, a tiny checkpoint and a config in ``folder``."""
    write_modal(folder, modal_rows(folder))
    if not (folder / "checkpoint").is_dir():
        squares.make_checkpoint(folder / "checkpoint")
    text = CONFIG.format(folder=folder, heads=heads, modalities=modalities, epochs=epochs)
    (folder / "finetune.yaml").write_text(text + more, encoding="utf-8")
    return folder / "finetune.yaml"
