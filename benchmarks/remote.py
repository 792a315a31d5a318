"""What reading from an object store costs beside a local folder: whole shards in the cache, and range reads.

    python benchmarks/remote.py [--samples N] [--delay MS] [--results FILE]

An S3 server (moto) runs on this machine in a process of its own. It is slow, and without a network; so what
counts is the processor time of the reading process (its download thread included), and for range reads how
the time of a call follows from the delay that every request is given.
"""

import argparse
import io
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
from PIL import Image
from rows import append_row

from diptych.data.shards import ShardSet, ShardWriter, open_shards

SERVER = """
import sys, time, threading
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
import logging
logging.getLogger("werkzeug").setLevel(logging.ERROR)
from moto.s3.responses import S3Response
delay = float(sys.argv[1]) / 1000
wrapped = S3Response.key_response
def slow(self, *args, **kwargs):
    time.sleep(delay)
    return wrapped(self, *args, **kwargs)
S3Response.key_response = slow
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


def write_set(folder: Path, samples: int, side: int) -> None:
    rng = np.random.default_rng(0)
    images: list[bytes] = []
    for _ in range(50):
        buffer = io.BytesIO()
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((side * 4, side * 4)).save(buffer, "JPEG", quality=90)
        images.append(buffer.getvalue())
    with ShardWriter(folder, samples_per_shard=max(1, samples // 10)) as writer:
        for i in range(samples):
            writer.write(f"k{i:06d}", images[i % 50], "jpg", f"caption number {i}", {"number": i})


def best(work: Callable[[], Any], rounds: int = 5) -> tuple[float, float]:
    """Least processor and least wall seconds."""
    cpu: list[float] = []
    wall: list[float] = []
    for _ in range(rounds):
        start = time.process_time(), time.perf_counter()
        work()
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return min(cpu), min(wall)


def read_each(shards: ShardSet, ids: list[int]) -> None:
    for sample_id in ids:
        shards.read(sample_id)


def measure(folder: Path, url: str, cache: Path, delay: float) -> dict[str, Any]:
    here = open_shards(folder)
    ids = random.Random(0).sample(range(len(here)), len(here))
    total = sum(row.bytes for row in here.rows)
    start = time.process_time(), time.perf_counter()
    cached = open_shards(url, cache_gb=10, cache=cache)
    cached.read_many(list(range(0, len(here), here.rows[0].num_ok)))
    first = time.process_time() - start[0], time.perf_counter() - start[1]
    ranges = open_shards(url, cache_gb=0)
    few = ids[:256]
    ranges.read_many(few)  # indexes and connections
    one = best(lambda: read_each(ranges, few[:20]))
    many = best(lambda: ranges.read_many(few[:128]))
    return {
        "samples": len(here),
        "image_bytes": len(here.read(0).image),
        "delay_ms": delay,
        "local_us": best(lambda: read_each(here, ids))[0] / len(ids) * 1e6,
        "cached_us": best(lambda: read_each(cached, ids))[0] / len(ids) * 1e6,
        "download_cpu_s_per_gb": first[0] / total * 1e9,
        "download_mb_per_s": total / first[1] / 1e6,
        "range_one_ms": one[1] / 20 * 1e3,
        "range_one_cpu_us": one[0] / 20 * 1e6,
        "range_128_ms": many[1] * 1e3,
        "range_128_cpu_us_per_sample": many[0] / 128 * 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=4000)
    parser.add_argument("--side", type=int, default=64, help="a quarter of the images' side")
    parser.add_argument("--delay", type=float, default=20.0, help="milliseconds that each request waits")
    parser.add_argument("--results", type=Path)
    args = parser.parse_args()
    os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing"}
    os.environ["AWS_DEFAULT_REGION"] = "us-east-1"
    server = subprocess.Popen(
        [sys.executable, "-c", SERVER, str(args.delay)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdin is not None
    try:
        os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{int(server.stdout.readline())}"
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name) / "set"
            write_set(folder, args.samples, args.side)
            system = fsspec.filesystem("s3")
            system.mkdir("bucket")
            for path in sorted(folder.iterdir()):
                if path.is_file():
                    system.pipe_file(f"bucket/set/{path.name}", path.read_bytes())
            figures = measure(folder, "s3://bucket/set", Path(name) / "cache", args.delay)
        for key, value in figures.items():
            print(f"{key:28} {value:,.1f}")
        append_row("remote", figures, args.results)
    finally:
        server.stdin.close()
        server.wait(20)


if __name__ == "__main__":
    main()
