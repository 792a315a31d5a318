"""How often a run folder's test split has been looked at: every new set of models that is scored on it
counts.

Scores of a split that was looked at before are hopeful as far as earlier scores led to what is scored now.
The count is that of one folder: nobody counts what a deleted folder, or another one, has seen.
"""

import hashlib
import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ...configs.errors import UserError
from ...configs.files import atomic_write_text

__all__ = ["LOOKS", "look"]

LOOKS = "test_looks.jsonl"


def look(folder: Path, identity: Sequence[Any], facts: dict[str, Any]) -> int:
    """Note that models are about to be scored on the test split, and return how many were by now, these
    included.

    identity: what tells models, rows and thresholds apart; the same ones again give the same scores and are
    no new look. facts: what else the line says. Raises UserError if the file cannot be read.
    """
    path = folder / LOOKS
    key = hashlib.sha256(json.dumps(list(identity)).encode()).hexdigest()
    lines = _lines(path)
    if key not in (line.get("key") for line in lines):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines.append({"look": len(lines) + 1, "time": now, "key": key, **facts})
        atomic_write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
    return len(lines)


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); mend it, or remove it to count anew") from error
    return [line if isinstance(line, dict) else {} for line in lines]
