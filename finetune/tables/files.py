"""Table files: CSV, TSV, JSONL and Parquet, whole or in chunks of rows.

A file is looked through once when it is opened, so that line 1,000,000 which is no CSV or JSON is told before
any work is done; then it is read again chunk by chunk, and never more than one chunk is held.
"""

import csv
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.parquet as pq

from ...configs.errors import UserError

__all__ = [
    "CHUNK",
    "FORMATS",
    "UNREADABLE",
    "Columns",
    "LazyColumn",
    "Table",
    "cells_of",
    "columns_of",
    "open_table",
    "read_columns",
    "types_of",
]

Columns = dict[str, Sequence[Any]]
FORMATS = (".csv", ".tsv", ".jsonl", ".parquet")
CHUNK = 2048
"""Rows of a chunk."""
UNREADABLE = (pa.ArrowException, ValueError, OverflowError, KeyError)
"""What pyarrow raises of values that Python cannot hold, or the other way."""


@dataclass(frozen=True)
class Table:
    """A table file that was looked through."""

    path: Path
    names: tuple[str, ...]
    rows: int

    def chunks(self, size: int = CHUNK) -> Iterator[Columns]:
        """The rows in order, ``size`` at a time, each with all columns."""
        with _told(self.path):
            if self.path.suffix.lower() == ".parquet":
                with pq.ParquetFile(self.path, buffer_size=1 << 20) as file:
                    first = 0
                    for batch in file.iter_batches(batch_size=size):
                        yield {
                            name: cells_of(batch.column(name), str(self.path), name, first)
                            for name in self.names
                        }
                        first += len(batch)
                return
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                lines = _lines(file, self.path)
                while chunk := list(islice(lines, size)):
                    yield {name: [row.get(name) for row in chunk] for name in self.names}

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path)

    @property
    def folder(self) -> Path:
        """Where relative image paths start."""
        return self.path.parent

    def types(self, *, exact: bool = True) -> pa.Schema:
        """Arrow types of all columns: a Parquet file's own, strings of separated values, and of JSONL those
        that hold every cell. UserError where there are none. Unless ``exact``, JSONL has strings too."""
        with _told(self.path):
            if self.path.suffix.lower() == ".parquet":
                return pq.read_schema(self.path)
        if self.path.suffix.lower() == ".jsonl" and exact:
            return pa.schema(list(types_of(self.chunks(), self.names, self.name).items()))
        return pa.schema([(name, pa.string()) for name in self.names])


def types_of(chunks: Iterable[Columns], names: Sequence[str], source: str) -> dict[str, pa.DataType]:
    """Arrow types that hold every cell of some columns. UserError where Parquet has none."""
    types: dict[str, pa.DataType] = dict.fromkeys(names, pa.null())
    for columns in chunks:
        for name in names:
            with _storable(source, name):
                both = [pa.schema([("", kind)]) for kind in (types[name], pa.array(columns[name]).type)]
                types[name] = pa.unify_schemas(both, promote_options="permissive").field(0).type
    for name, kind in types.items():
        with _storable(source, name):
            pq.ParquetWriter(pa.BufferOutputStream(), pa.schema([(name, kind)])).close()
    return types


@contextmanager
def _storable(source: str, name: str) -> Generator[None]:
    """Errors of finding a column's type as UserError."""
    try:
        yield
    except UNREADABLE as error:
        raise UserError(
            f"{source}: column '{name}' holds cells of different kinds, or one that Parquet cannot hold "
            f"({_first_line(error)}); mend it or write answers as .jsonl"
        ) from error


def open_table(path: Path) -> Table:
    """Look through a table file. Raises UserError if it cannot be read or holds no rows."""
    with _told(path):
        if _format(path) == ".parquet":
            with pq.ParquetFile(path) as file:
                names, rows = _names(file, path), file.metadata.num_rows
        else:
            names, rows = dict[str, None](), 0
            with path.open(encoding="utf-8-sig", newline="") as file:
                for row in _lines(file, path, text=True):
                    names |= dict.fromkeys(row)
                    rows += 1
    if rows == 0:
        raise UserError(f"{path} holds no rows; add some")
    return Table(path, tuple(names), rows)


def read_columns(path: Path) -> Columns:
    """All columns of a table file. CSV and TSV cells are strings; a column of Parquet is read when its cells
    are asked for, so those that nobody uses cost nothing. Raises UserError if it cannot be read."""
    with _told(path):
        if _format(path) == ".parquet":
            with pq.ParquetFile(path) as parquet:
                rows = parquet.metadata.num_rows
                return {n: LazyColumn(rows, partial(_read_cells, path, n)) for n in _names(parquet, path)}
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = list(_lines(file, path))
            names = dict.fromkeys(name for row in lines for name in row)
            return {name: [row.get(name) for row in lines] for name in names}


class LazyColumn(Sequence[Any]):
    """The cells of a column, read at their first use."""

    def __init__(self, rows: int, read: Callable[[], list[Any]]) -> None:
        self._rows, self._read = rows, read

    @cached_property
    def _cells(self) -> list[Any]:
        return self._read()

    def __len__(self) -> int:
        return self._rows

    @overload
    def __getitem__(self, index: int) -> Any: ...
    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...
    def __getitem__(self, index: int | slice) -> Any:
        return self._cells[index]


def _read_cells(path: Path, name: str) -> list[Any]:
    with _told(path), pq.ParquetFile(path) as file:
        return cells_of(file.read(columns=[name]).column(name), str(path), name)


def _names(file: pq.ParquetFile, path: Path) -> dict[str, None]:
    """Names of the columns, in order."""
    return dict.fromkeys(_once(file.schema_arrow.names, path))


def _once(names: Sequence[str], path: Path) -> Sequence[str]:
    if repeated := [name for name, count in Counter(names).items() if count > 1]:
        raise UserError(f"{path}: column '{repeated[0]}' stands twice; rename one")
    return names


def cells_of(column: Any, source: str, name: str, first: int = 0) -> list[Any]:
    """The cells of an arrow column as Python's, with ``first`` rows of the source before them. Raises
    UserError for one that Python does not have, as a time in nanoseconds."""
    try:
        return column.to_pylist()
    except UNREADABLE as error:
        row = first + 1 + next((i for i, cell in enumerate(column) if not _readable(cell)), 0)
        raise UserError(
            f"{source}: row {row}: Python cannot hold what stands in column '{name}' of {column.type} "
            f"({_first_line(error)}); write the column as another type, or remove it"
        ) from error


def _readable(cell: Any) -> bool:
    try:
        cell.as_py()
    except UNREADABLE:
        return False
    return True


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _format(path: Path) -> str:
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"{path}: a table must end in {', '.join(FORMATS)}; convert it")
    return path.suffix.lower()


@contextmanager
def _told(path: Path) -> Generator[None]:
    """Errors of reading as UserError with the file's name."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise UserError(f"{path}: {reason}; give the path of a labelled table") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text; save it as UTF-8") from error
    except pa.ArrowException as error:
        raise UserError(f"{path} is not Parquet ({_first_line(error)}); write it again") from error


def _lines(file: Iterable[str], path: Path, *, text: bool = False) -> Iterator[dict[str, Any]]:
    """Rows of a text file, one after the other. ``text``: JSON must be text that can be written again."""
    return _json_lines(file, path, text=text) if path.suffix.lower() == ".jsonl" else _csv_lines(file, path)


def _csv_lines(file: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 27)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = (line for line in csv.reader(file, delimiter=delimiter, strict=True) if line)
    try:
        first = next(lines, None)
        if first is None:
            raise UserError(f"{path} is empty; its first line must name the columns")
        names = _once([name.strip() for name in first], path)
        for number, line in enumerate(lines, 1):
            if len(line) != len(names):
                raise UserError(
                    f"{path}: row {number} has {len(line)} cells instead of {len(names)}; quote cells with "
                    "commas"
                )
            yield dict(zip(names, line, strict=True))
    except csv.Error as error:
        raise UserError(f"{path} is not a table of separated values ({error}); quote its cells") from error


def _json_lines(file: Iterable[str], path: Path, *, text: bool) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            if text and "\\u" in line:
                json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"{path}: line {number} holds half a surrogate pair, which is no character; mend it"
            ) from error
        except ValueError as error:
            raise UserError(f"{path}: line {number} is not JSON ({error}); mend it") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}: line {number} must be an object of columns, not {type(row).__name__}")
        yield row


def columns_of(table: Any) -> Columns:
    """Columns of a data frame, an arrow table, a dict of columns or a list of rows."""
    if hasattr(table, "to_pydict"):  # pyarrow
        names, rows, source = table.schema.names, table.num_rows, "the table"
        return {n: LazyColumn(rows, partial(cells_of, table.column(n), source, n)) for n in names}
    if hasattr(table, "to_dict") and hasattr(table, "columns"):  # pandas
        return {str(k): list(v) for k, v in table.to_dict("list").items()}
    if isinstance(table, Mapping):
        columns: Columns = {str(k): list(v) for k, v in table.items()}
        if len({len(v) for v in columns.values()}) > 1:
            raise UserError("the table's columns have different lengths; give one cell per row")
        return columns
    if isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table):
        names = dict.fromkeys(str(name) for row in table for name in row)
        return {name: [row.get(name) for row in table] for name in names}
    raise UserError(
        "a table must be a path, a data frame, a dict of columns or a list of rows, not "
        f"{type(table).__name__}"
    )
