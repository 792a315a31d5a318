"""A contestant of a benchmark: a process of its own that answers a line of words with a line of JSON."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

__all__ = ["Contestant", "resident"]


class Contestant:
    """A Python process, on one thread, that waits for what it is asked."""

    def __init__(self, kind: str, words: Sequence[Any], environment: Mapping[str, str] | None = None) -> None:
        """kind: what it is called. words: the script and its arguments."""
        self.kind = kind
        self._process = subprocess.Popen(
            [sys.executable, *map(str, words)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "KINETO_LOG_LEVEL": "99"}
            | dict(environment or {}),
        )

    def ask(self, *words: Any) -> dict[str, Any]:
        """Its answer to these words; to none, what it says first."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if words:
            print(*words, file=self._process.stdin, flush=True)
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"the contestant {self.kind} ended with exit code {self._process.wait()}")
        return json.loads(line)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.__exit__(None, None, None)  # it ends with its input


def resident(key: str) -> float:
    """MiB of this process: VmRSS now, or VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{key}:\s+(\d+) kB", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024
