"""Predictions as a table file: the input's columns without its pictures, the answer and its probabilities.

Rows are read, answered and written chunk by chunk, so tables may be larger than memory. The file is written
under a temporary name and takes its own when the last row is in it.
"""

import csv
import json
import math
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ..configs.errors import UserError
from ..configs.files import temporary_beside
from .encoders.features import Progress, silent
from .explain.shapley import Explanation
from .predictor import Predictor
from .tables.cells import PictureFolder
from .tables.files import CHUNK, FORMATS, UNREADABLE, Columns
from .tables.sources import Form, Source, open_source
from .tasks.task import Floats

__all__ = ["answer_table", "check_out"]

Write = Callable[[Columns], None]


def check_out(path: Path) -> None:
    """UserError if answers cannot go there, before any work is done."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: answers are written as {', '.join(FORMATS)}; choose such a name")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent}; make it")


def answer_table(
    predictor: Predictor,
    source: str | Path,
    out: Path,
    *,
    form: Form | None = None,
    root: Path | None = None,
    explain: bool = False,
    chunk: int = CHUNK,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = silent,
) -> int:
    """Answer every row of a table, of shards or of folders (see ``sources.read_source``) into a table file
    and return how many there were.

    Written are the input's columns but those of bytes, ``prediction`` and one ``p_CLASS`` per class (none for
    regression); with ``explain`` also one ``phi_MODALITY`` each, where the head has weights one
    ``weight_MODALITY`` each, and for multilabel ``explained``, the label that they are about. Several labels
    are a list in Parquet and JSONL, and in CSV text between the training table's separator, or ``;``. Raises
    UserError as ``Predictor.predict_proba`` does; ``out`` is then as it was.
    """
    check_out(out)
    table = open_source(source, form, key="--format")
    _tell_absent(predictor, table, say)
    folder = PictureFolder(table.folder, root)
    made = _made(predictor, explain)
    schema = _schema(table, made, as_text=out.suffix.lower() != ".parquet")
    done = 0
    with (
        _writer(out, schema, short=made.keys() - {"prediction"}) as write,
        progress("answering rows", table.rows) as advance,
    ):
        for columns in table.chunks(chunk):
            rows = predictor.parse(columns, folder, table.name, first=done)
            if explain:
                p, explanation = predictor.explain_rows(rows)
            else:
                p, explanation = predictor.of_rows(rows), None
            answers = columns | _answers(predictor, p, explanation, as_text=out.suffix.lower() in SEPARATED)
            write({name: answers[name] for name in schema.names})
            done += len(rows)
            advance(len(rows))
    return done


def _tell_absent(predictor: Predictor, table: Source, say: Callable[[str], None]) -> None:
    """Say which columns the table lacks; of all of them parsing speaks."""
    named = {k: [n for names in m.columns.values() for n in names] for k, m in predictor.modalities.items()}
    if not any(name in table.names for names in named.values() for name in names):
        return
    for k, names in named.items():
        absent = [name for name in names if name not in table.names]
        lacks = f"{table.name} has no column {', '.join(repr(name) for name in absent)}"
        if len(absent) == len(names):
            say(f"{lacks}: all rows are answered without {k}")
        elif absent:
            say(f"{lacks}: all rows are answered as if it were empty")


SEPARATED = (".csv", ".tsv")


def _made(predictor: Predictor, explain: bool) -> dict[str, pa.DataType]:
    """Columns that the answers add, in order."""
    labels = predictor.task.type == "multilabel"
    said = pa.list_(pa.string()) if labels else pa.string() if predictor.classes else pa.float64()
    made: dict[str, pa.DataType] = {"prediction": said}
    made |= {f"p_{name}": pa.float64() for name in predictor.classes}
    if explain:
        made |= {"explained": pa.string()} if labels else {}
        made |= {f"phi_{k}": pa.float64() for k in predictor.modalities}
        made |= {f"weight_{k}": pa.float64() for k in predictor.modalities if predictor.has_weights}
    return made


def _schema(table: Source, made: Mapping[str, pa.DataType], *, as_text: bool) -> pa.Schema:
    """Columns of the answers, in order; those of the input that have the name of an answer are left out.
    ``as_text``: types are not needed."""
    types = table.types(exact=not as_text)
    kept = [field for field in types if field.name not in made and not _is_bytes(field.type)]
    return pa.schema([*kept, *made.items()])


def _is_bytes(kind: pa.DataType) -> bool:
    return (
        pa.types.is_binary(kind)
        or pa.types.is_large_binary(kind)
        or pa.types.is_fixed_size_binary(kind)
        or pa.types.is_binary_view(kind)
    )


def _answers(predictor: Predictor, p: Floats, explanation: Explanation | None, *, as_text: bool) -> Columns:
    said: list[Any] = predictor.named(p)
    if predictor.task.type == "retrieval":  # a row without both modalities has no cosine
        said = [None if value != value else value for value in said]
    if predictor.task.type == "multilabel" and as_text:
        said = [(predictor.separator or ";").join(labels) for labels in said]
    made: Columns = {"prediction": said}
    made |= {f"p_{name}": p[:, c].tolist() for c, name in enumerate(predictor.classes)}
    if explanation is None:
        return made
    made["explained"] = explanation.classes or []
    made |= {f"phi_{k}": explanation.phi[:, j].tolist() for j, k in enumerate(explanation.modalities)}
    if explanation.weights is not None:
        weights = explanation.weights
        made |= {f"weight_{k}": weights[:, j].tolist() for j, k in enumerate(explanation.modalities)}
    return made


@contextmanager
def _writer(path: Path, schema: pa.Schema, *, short: Collection[str]) -> Generator[Write]:
    """A function that appends columns to a file which is there when the block has ended well. ``short``:
    columns whose numbers are written with nine digits where the file is text."""
    kind = path.suffix.lower()
    with temporary_beside(path) as temporary:
        if kind == ".parquet":
            with pq.ParquetWriter(temporary, schema) as writer:
                yield lambda columns: writer.write_table(_arrow(columns, schema, path))
            return
        with temporary.open("w", encoding="utf-8", newline="") as file:
            if kind == ".jsonl":
                yield lambda columns: file.writelines(_json_lines(columns))
                return
            lines = csv.writer(file, delimiter="\t" if kind == ".tsv" else ",", lineterminator="\n")
            lines.writerow(schema.names)
            yield lambda columns: lines.writerows(_texts(columns, short))


def _arrow(columns: Columns, schema: pa.Schema, path: Path) -> pa.Table:
    """Columns in the types of a schema; UserError for a cell that does not fit."""
    arrays: list[Any] = []
    for field in schema:
        try:
            arrays.append(pa.array(columns[field.name], field.type))
        except UNREADABLE as error:
            raise UserError(
                f"{path}: column '{field.name}' cannot be written as {field.type} "
                f"({str(error).splitlines()[0]}); write answers as .jsonl"
            ) from error
    return pa.Table.from_arrays(arrays, schema=schema)


def _json_lines(columns: Columns) -> Generator[str]:
    for row in zip(*columns.values(), strict=True):
        cells = {name: _json(cell) for name, cell in zip(columns, row, strict=True)}
        yield json.dumps(cells, ensure_ascii=False, default=str) + "\n"


def _json(cell: Any) -> Any:
    """A cell without NaN and infinity, which JSON does not have."""
    if isinstance(cell, float):
        return cell if math.isfinite(cell) else None
    if isinstance(cell, list | tuple):
        return [_json(item) for item in cell]
    return {key: _json(item) for key, item in cell.items()} if isinstance(cell, dict) else cell


def _texts(columns: Columns, short: Collection[str]) -> Generator[list[Any]]:
    """Rows for ``csv``, which writes other numbers as repr does: whole."""
    cut = [name in short for name in columns]
    for row in zip(*columns.values(), strict=True):
        cells = zip(row, cut, strict=True)
        yield [f"{cell:.9g}" if less and isinstance(cell, float) else cell for cell, less in cells]
