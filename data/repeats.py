"""Which 64-bit hashes come again, among more of them than the memory holds."""

import tempfile
from collections.abc import Iterator
from types import TracebackType
from typing import Self

import numpy as np
from numpy.typing import NDArray

__all__ = ["HashColumn", "Place"]

AT_ONCE = 1 << 23  # hashes that are sorted in memory at a time, 16 bytes each

Place = tuple[int, int]
"""Number of the part and number of the value in it."""


class HashColumn:
    """Hashes, appended part by part to a temporary file. Use it as a context; zeros stand for no value."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115  closed by __exit__
        self._ends: list[int] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def append(self, values: NDArray[np.uint64]) -> None:
        """Add a part, uint64 [n]."""
        self._file.write(np.ascontiguousarray(values, dtype="<u8").tobytes())
        self._ends.append(len(self) + len(values))

    def repeats(self, at_once: int = AT_ONCE) -> Iterator[list[Place]]:
        """The places of every value that is there several times, each list in order. About ``at_once``
        values are in memory at a time; the file is read once for each such share."""
        if not len(self):
            return
        self._file.flush()
        every = np.memmap(self._file, dtype="<u8", mode="r")
        shares = -(-len(every) // at_once)
        for share in range(shares):
            places = [
                start + np.flatnonzero((block != 0) & (block % np.uint64(shares) == share))
                for start in range(0, len(every), at_once)
                for block in (every[start : start + at_once],)
            ]
            yield from self._groups(every, np.concatenate(places))

    def _groups(self, every: NDArray[np.uint64], places: NDArray[np.int64]) -> Iterator[list[Place]]:
        values = every[places]
        order = np.argsort(values, kind="stable")
        values, places = values[order], places[order]
        starts = (
            np.flatnonzero(np.concatenate([[True], values[1:] != values[:-1]])) if len(values) else places
        )
        ends = np.append(starts[1:], len(values))
        again = ends - starts > 1
        groups = sorted(
            places[start:end].tolist() for start, end in zip(starts[again], ends[again], strict=True)
        )
        for group in groups:
            parts = np.searchsorted(self._ends, group, side="right").tolist()
            yield [
                (part, at - (self._ends[part - 1] if part else 0))
                for part, at in zip(parts, group, strict=True)
            ]
