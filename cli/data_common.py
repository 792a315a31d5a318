"""What the commands of ``diptych data`` share: arguments, bars, and how findings are shown."""

import argparse
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = [
    "counts",
    "engine_arguments",
    "fraction",
    "limit_arguments",
    "limits_of",
    "positive",
    "print_findings",
    "progress",
    "progress_bar",
]

SHOWN = 20  # findings printed; --json gives all


def positive(text: str) -> int:
    """An argument that is an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def fraction(text: str) -> float:
    """An argument from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be between 0 and 1")
    return value


def engine_arguments(parser: argparse.ArgumentParser) -> None:
    """--workers and --engine."""
    default = os.cpu_count() or 1
    parser.add_argument(
        "--workers", type=positive, default=default, metavar="N", help=f"processes (default: {default})"
    )
    parser.add_argument(
        "--engine",
        choices=["local", "ray"],
        default="local",
        help="where they run: on this machine, or on the Ray cluster that RAY_ADDRESS names (default: local)",
    )


def limit_arguments(parser: argparse.ArgumentParser) -> None:
    """--max-pixels and --max-image-mb."""
    parser.add_argument(
        "--max-pixels", type=positive, metavar="N", help="larger images are bad (default: 89478485)"
    )
    parser.add_argument(
        "--max-image-mb",
        type=positive,
        metavar="N",
        help="larger image files are bad (default and most: 256)",
    )


def limits_of(args: argparse.Namespace) -> Any:
    """The limits that the arguments ask for."""
    from ..data.scanning import USUAL, Limits

    most = USUAL.max_image_bytes if args.max_image_mb is None else args.max_image_mb * 1024 * 1024
    return Limits(args.max_pixels or USUAL.max_pixels, most)


def progress_bar() -> Any:
    """A bar on standard error, and nothing where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    # where it is no terminal, a bar would leave empty lines
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


@contextmanager
def progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """A bar; where ``total`` is 0, a count."""
    with progress_bar() as bar:
        task = bar.add_task(what, total=total or None)
        yield lambda done: bar.advance(task, done)


def counts(reasons: Mapping[str, int]) -> str:
    """Reasons with their counts in one line."""
    return ", ".join(f"{reason} {count}" for reason, count in reasons.items())


def print_findings(lines: Iterable[str], more: int = 0) -> None:
    """The first findings on standard error, and how many more there are; ``more``: not in ``lines``."""
    every = list(lines)
    for line in every[:SHOWN]:
        print(line, file=sys.stderr)
    if len(every) + more > SHOWN:
        print(f"... and {len(every) + more - SHOWN} more", file=sys.stderr)
