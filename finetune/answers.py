"""Predictions as a table file: the input's columns without its pictures, the class, and its probabilities."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..configs.errors import UserError
from ..configs.files import atomic_write_text, temporary_beside
from .manifest import FORMATS, Columns
from .predictor import Predictor
from .tasks import Floats, predicted

__all__ = ["check_out", "write_answers"]


def check_out(path: Path) -> None:
    """UserError if answers cannot go there, before any work is done."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: answers are written as {', '.join(FORMATS)}; choose such a name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it")


def write_answers(path: Path, columns: Columns, predictor: Predictor, p: Floats) -> None:
    """Write the input's columns, ``prediction`` and one ``p_CLASS`` per class. Bytes are left out."""
    kept = {name: cells for name, cells in columns.items() if not any(isinstance(c, bytes) for c in cells)}
    table: dict[str, list[Any]] = dict(kept)
    table["prediction"] = [predictor.classes[c] for c in predicted(p)]
    for c, name in enumerate(predictor.classes):
        table[f"p_{name}"] = [float(value) for value in p[:, c]]
    kind = path.suffix.lower()
    if kind == ".parquet":
        with temporary_beside(path) as temporary:
            pq.write_table(pa.table(table), temporary)
        return
    rows = zip(*table.values(), strict=True)
    if kind == ".jsonl":
        lines = [json.dumps(dict(zip(table, row, strict=True)), ensure_ascii=False) for row in rows]
        atomic_write_text(path, "".join(line + "\n" for line in lines))
        return
    buffer = io.StringIO()
    writer = csv.writer(buffer, delimiter="\t" if kind == ".tsv" else ",", lineterminator="\n")
    writer.writerow(table)
    for row in rows:
        writer.writerow(
            [f"{cell:.6f}" if isinstance(cell, float) else "" if cell is None else cell for cell in row]
        )
    atomic_write_text(path, buffer.getvalue())
