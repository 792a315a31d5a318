"""What the order costs on a manifest of 100,000 shards: start, memory, batches, a trace.

    python benchmarks/order_scale.py [--shards N] [--results FILE]

The manifest is written, the tars are not: nothing here reads them. Beside it stands the usual way, a shuffled
list of all ids (``numpy.random.permutation``), at the size that fits into memory here; its cost is
proportional. Seconds are processor time; memory is what the process grew by.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rows import append_row

SAMPLES_PER_SHARD = 50_000
LISTED = 100_000_000  # ids in the list that is shuffled beside
BATCH, BATCHES = 4096, 1000


def write_manifest(folder: Path, shards: int) -> int:
    """A manifest of shards of uneven sizes; returns how many samples it has."""
    sizes = np.random.default_rng(0).integers(SAMPLES_PER_SHARD // 2, SAMPLES_PER_SHARD * 3 // 2, shards)
    with (folder / "manifest.jsonl").open("w") as file:
        for i, n in enumerate(sizes.tolist()):
            row = {"shard": f"{i:06d}.tar", "bytes": n * 50_000, "num_ok": n, "num_bad": 0}
            print(json.dumps(row | {"xxh3": f"{i:016x}", "idx_xxh3": f"{i + 1:016x}"}), file=file)
    return int(sizes.sum())


def timed(work: Callable[[], Any]) -> tuple[Any, float, float]:
    """What it gives, processor seconds, and MiB by which the process grew."""
    memory, start = resident(), time.process_time()
    out = work()
    return out, time.process_time() - start, resident() - memory


def resident() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**20


def measure(folder: str) -> dict[str, float]:
    """Run in a process of its own."""
    from diptych.data.order import Order
    from diptych.data.shards import open_shards

    shards, manifest_s, manifest_mib = timed(lambda: open_shards(folder, check_files=False))

    def start() -> Order:
        order = Order(shards.shard_sizes, seed=0, global_batch_size=65_536)
        order.local_batch(3, order.steps_per_epoch // 2, 7, 1024)
        return order

    order, order_s, order_mib = timed(start)
    middle = order.steps_per_epoch // 2
    local = [timed(lambda t=t: order.local_batch(3, t, 7, 1024))[1] for t in range(middle, middle + 200)]
    whole = Order(shards.shard_sizes, seed=0, global_batch_size=BATCH)
    _, batches_s, _ = timed(lambda: [whole.global_batch(1, t) for t in range(100)])
    return {
        "manifest_s": manifest_s,
        "manifest_mib": manifest_mib,
        "order_s": order_s,
        "order_mib": order_mib,
        "local_batch_of_64_ms": float(np.median(local)) * 1e3,
        "microseconds_per_sample": batches_s / (100 * BATCH) * 1e6,
    }


def shuffled_list() -> dict[str, float]:
    ids, seconds, mib = timed(lambda: np.random.default_rng(0).permutation(LISTED))
    assert len(ids) == LISTED
    return {"list_s_per_billion": seconds * 1e9 / LISTED, "list_mib_per_billion": mib * 1e9 / LISTED}


def trace(folder: Path, world_size: int) -> float:
    """Processor seconds of ``diptych data trace`` over 1,000 global batches, start of Python included."""
    config = folder / "run.yaml"
    config.write_text(
        f"data: {{train: {folder}}}\nmodel: {{arch: ViT-B-32}}\n"
        f"train: {{global_batch_size: {BATCH}, epochs: 1}}\n"
    )
    command = [str(Path(sys.executable).with_name("diptych")), "data", "trace", str(config)]
    command += ["--steps", str(BATCHES), "--world-size", str(world_size)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with (folder / "trace.jsonl").open("w") as out:
        subprocess.run(command, stdout=out, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines = (folder / "trace.jsonl").read_text().count("\n")
    assert lines == BATCHES, f"{lines} lines"
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--shards", type=int, default=100_000, help="shards of the manifest")
    parser.add_argument("--quick", action="store_true", help="10,000 shards")
    parser.add_argument("--results", type=Path, help="FILE")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure is not None:
        print(json.dumps(shuffled_list() if options.measure == "list" else measure(options.measure)))
        return
    shards = 10_000 if options.quick else options.shards
    with tempfile.TemporaryDirectory() as name:
        samples = write_manifest(Path(name), shards)
        figures: dict[str, Any] = {"shards": shards, "samples": samples}
        for what in (name, "list"):
            command = [sys.executable, __file__, "--measure", what]
            figures |= json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        figures["trace_1000_batches_s"] = {ranks: trace(Path(name), ranks) for ranks in (1, 8)}
    figures["list_mib_for_these"] = figures["list_mib_per_billion"] * samples / 1e9
    figures["list_s_for_these"] = figures["list_s_per_billion"] * samples / 1e9
    print(f"{samples:,} samples in {shards:,} shards")
    for key, value in figures.items():
        print(f"  {key:28} {value:.4g}" if isinstance(value, float) else f"  {key:28} {value}")
    append_row("order_scale", figures, options.results)


if __name__ == "__main__":
    main()
