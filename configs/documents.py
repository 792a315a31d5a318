"""JSON objects out of files that may come from anybody: bounded, and told in one sentence if they are not
what they should be."""

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .errors import UserError

__all__ = ["MOST_BYTES", "as_written", "read_document"]

MOST_BYTES = 64 << 20
"""No document of a checkpoint or a run is longer."""
WRONG = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


def read_document(path: Path, mend: str = "take another checkpoint") -> dict[str, Any]:
    """The JSON object in a file. UserError, ending in ``mend``, if it cannot be read, is no object or is
    longer than ``MOST_BYTES``."""
    try:
        if path.stat().st_size > MOST_BYTES:
            raise UserError(f"{path} has more than {MOST_BYTES >> 20} MiB, which is too much; {mend}")
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}; {mend}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON ({' '.join(str(error).split())[:200]}); {mend}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must hold an object; {mend}")
    return data


@contextmanager
def as_written(path: Path, mend: str = "take another") -> Generator[None]:
    """Inside, values of a document are used as its writer left them; what that makes of a document that
    somebody changed is a UserError which names it and ends in ``mend``."""
    try:
        yield
    except UserError:
        raise
    except WRONG as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} does not hold what it should ({type(error).__name__}: {reason}); {mend}"
        ) from error
