"""Progress bars on standard error, so that standard output holds the results alone."""

import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager

from .unread import still_read

__all__ = ["progress"]


@contextmanager
def progress(what: str, total: int) -> Generator[Callable[[int], None]]:
    """``with progress(what, total) as advance: advance(done)``: a bar with the time left on a terminal, and
    nothing elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    bar = Progress(*columns, console=console, transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task(what, total=total)
    still_read("stderr", bar.start)
    try:
        yield lambda done: bar.advance(task, done)
    finally:
        still_read("stderr", bar.stop)
