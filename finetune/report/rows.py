"""The labelled table of a run, as the report reads it again for pictures and texts."""

from pathlib import Path

import numpy as np

from ...configs.errors import UserError
from ...configs.load import load_config
from ..config import FinetuneConfig
from ..session import planned_rows
from ..tables.manifest import Rows
from .predictions import Predictions, Unreadable

__all__ = ["rows_of"]


def rows_of(folder: Path, found: Predictions) -> tuple[Rows, dict[str, int]]:
    """The rows of the table that the run's config names, and the number of each id that was tested.

    Raises Unreadable where the table is gone, or is another one now.
    """
    try:
        config = load_config(FinetuneConfig, folder / "config.yaml")
        rows, _ = planned_rows(config)
    except UserError as error:
        raise Unreadable(str(error)) from error
    number = {name: i for i, name in enumerate(rows.ids)}
    tested = {name: number[name] for name in found.ids if name in number}
    if not tested:
        raise Unreadable(f"{rows.source} has none of the tested rows any more")
    return rows, tested


def sample_of(tested: dict[str, int], most: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """At most so many of the tested rows, evenly over the table."""
    numbers = np.array(sorted(tested.values()), dtype=np.int64)
    if len(numbers) <= most:
        return numbers
    return numbers[np.linspace(0, len(numbers) - 1, most).round().astype(np.int64)]
