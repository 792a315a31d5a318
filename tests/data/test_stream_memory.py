"""Memory of the stream does not grow with what has passed through it."""

import gc
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from diptych.data.shards import ShardWriter

from .images import photo, stored
from .stream_corpus import stream_of

N, BATCH, EPOCHS = 1500, 50, 8


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("memory")
    images = [stored(photo(64 + i, 64, seed=i), "JPEG") for i in range(10)]
    for name in ("a", "b"):
        with ShardWriter(folder / name, samples_per_shard=10) as writer:
            for i in range(N):
                meta = {"names": [f"name {i}"], "tags": [f"tag {i}"]}
                writer.write(f"{i:05d}", images[i % 10], "jpg", f"picture {i}", meta)
    return [{"data": str(folder / name), "where": "width > 64"} for name in ("a", "b")]


@pytest.mark.parametrize("workers", [0, 2])
def test_resident_memory_is_flat_over_epochs(
    sets: list[dict[str, Any]], workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """150 tars of which 128 are open at a time, a filter, a mixture, all captions drawn anew."""
    monkeypatch.setenv("DIPTYCH_CACHE", str(tmp_path))
    stream = stream_of(sets, batch=BATCH, lanes=None, window=None, epoch_samples=2 * N, workers=workers)
    process = psutil.Process()
    used: list[float] = []
    with stream:
        for _ in range(EPOCHS):
            for _ in islice(stream, stream.steps_per_epoch):
                pass
            gc.collect()
            family = [process, *process.children(recursive=True)]
            used.append(sum(one.memory_info().rss for one in family) / 2**20)
    settled = used[2:]  # tokens of all captions are kept by then
    slope = np.polyfit(np.arange(len(settled)), settled, 1)[0]
    assert abs(slope) < 1.0, f"MiB at the end of each epoch: {[round(x, 1) for x in used]}"
