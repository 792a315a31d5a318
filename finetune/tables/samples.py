"""Tables whose rows are samples, one after the other, as in tars and in folders of pictures: what reading
them has in common. Pictures are not held: a cell says where one is."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ...configs.errors import UserError
from .files import CHUNK, Columns, types_of

__all__ = ["Damaged", "Sample", "SampleSource", "SampleTable", "open_samples", "read_samples"]

Sample = dict[str, Any]
"""Cells by column; a column that a sample lacks is empty."""


@dataclass(frozen=True)
class Damaged:
    """A sample that cannot be used: the tar or folder that holds it, its key (empty where it is the tar as a
    whole), and the rest of a sentence that says why."""

    place: str
    key: str
    reason: str

    def __str__(self) -> str:
        return f"{self.place}{f'#{self.key}' if self.key else ''} {self.reason}"


class SampleSource(ABC):
    """Samples in a fixed order."""

    pictures: tuple[str, ...] = ()
    """Columns whose cells are ``Picture``; those of paths are text."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name = name
        """For messages."""
        self.folder = folder
        """Where relative image paths start."""

    @abstractmethod
    def samples(self) -> Iterator[Sample | Damaged]:
        """All samples from the first one on."""


@dataclass(frozen=True)
class SampleTable:
    """Samples that were looked through, read again in chunks."""

    source: SampleSource
    names: tuple[str, ...]
    rows: int

    @property
    def name(self) -> str:
        """For messages."""
        return self.source.name

    @property
    def folder(self) -> Path:
        """Where relative image paths start."""
        return self.source.folder

    def chunks(self, size: int = CHUNK) -> Iterator[Columns]:
        """The rows in order, ``size`` at a time, each with all columns. UserError for a damaged sample."""
        samples = (_whole(sample) for sample in self.source.samples())
        while chunk := list(islice(samples, size)):
            yield {name: [sample.get(name) for sample in chunk] for name in self.names}

    def types(self, *, exact: bool = True) -> pa.Schema:
        """Arrow types of all columns, as of ``Table``; pictures count as bytes."""
        others = [name for name in self.names if name not in self.source.pictures]
        text = dict.fromkeys(others, pa.string())
        types = types_of(self.chunks(), others, self.name) if exact else text
        return pa.schema([(name, types.get(name, pa.binary())) for name in self.names])


def open_samples(source: SampleSource) -> SampleTable:
    """Look through samples. Raises UserError for a damaged one and where there are none."""
    names, rows = dict[str, None](), 0
    for sample in map(_whole, source.samples()):
        names |= dict.fromkeys(sample)
        rows += 1
    return SampleTable(source, tuple(names), _some(source, rows))


def read_samples(source: SampleSource) -> tuple[Columns, list[Damaged]]:
    """All columns, and the samples that were left out. UserError where no sample is whole."""
    found = list(source.samples())
    damaged = [sample for sample in found if isinstance(sample, Damaged)]
    whole = [sample for sample in found if not isinstance(sample, Damaged)]
    if not whole and damaged:
        raise UserError(f"{damaged[0]}; no sample of {source.name} can be used")
    _some(source, len(whole))
    names = dict.fromkeys(name for sample in whole for name in sample)
    return {name: [sample.get(name) for sample in whole] for name in names}, damaged


def _whole(sample: Sample | Damaged) -> Sample:
    if isinstance(sample, Damaged):
        raise UserError(f"{sample}; mend it or remove it")
    return sample


def _some(source: SampleSource, rows: int) -> int:
    if rows == 0:
        raise UserError(f"{source.name} holds no samples; add some")
    return rows
