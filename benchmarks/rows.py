"""One JSON row per run of a benchmark, in benchmarks/results/NAME.jsonl."""

import datetime
import json
import os
import platform
from pathlib import Path
from typing import Any

from diptych.configs.versions import versions

RESULTS = Path(__file__).resolve().parent / "results"


def machine() -> str:
    """Processor and number of cores."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.machine()}, {os.cpu_count()} cores"


def append_row(benchmark: str, figures: dict[str, Any], results: Path | None = None) -> None:
    """Append ``figures`` with date, machine and versions, and say where."""
    file = results or RESULTS / f"{benchmark}.jsonl"
    row = {
        "benchmark": benchmark,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "versions": versions(),
        **figures,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as opened:
        print(json.dumps(row), file=opened)
    print(f"appended to {file}")


def judge(what: str, value: float, target: float | None, *, below: bool = False) -> None:
    """Print a ratio and whether it meets its target, from above or ``below``."""
    met = target is not None and (value <= target if below else value >= target)
    verdict = "" if target is None else f"   target {target:g}: {'met' if met else 'MISSED'}"
    print(f"{what:32} {value:7.3f}{verdict}")
