"""How well batches are mixed: how often two samples of a batch come from one shard.

    python benchmarks/shuffle_quality.py [--quick] [--results FILE]

64 shards of 1,000 samples each. Two random samples of the whole set share a shard in 1/64 of the cases; what
exceeds that makes negatives of one kind, for neighbours in a shard tend to be of one site, and batches that
drift.
Beside ours stands webdataset's own reader with open_clip's settings: shards in drawn order, a buffer of 5,000
samples, first filled with 1,000, one worker.
"""

import argparse
import io
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import webdataset as wds
from PIL import Image
from rows import append_row

from diptych.data.order import Order
from diptych.data.shards import ShardWriter

SHARDS, PER_SHARD = 64, 1000
BATCHES = (256, 1024, 4096)


def write_shards(folder: Path, per_shard: int) -> None:
    file = io.BytesIO()
    Image.new("RGB", (1, 1)).save(file, "PNG")
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for i in range(SHARDS * per_shard):
            writer.write(f"{i:06d}", file.getvalue(), "png", "x", {})


def webdataset_ids(folder: Path) -> Iterator[int]:
    """Sample numbers of one epoch as a worker of open_clip's loader would see them."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]
    pipeline: Any = wds.DataPipeline(
        wds.SimpleShardList(urls, seed=0),
        wds.tarfile_to_samples(),
        wds.shuffle(5000, initial=1000),
    )
    for sample in pipeline:
        yield int(sample["__key__"])


def ours(order: Order) -> Iterator[int]:
    yield from chain.from_iterable(order.global_batch(0, t).tolist() for t in range(order.steps_per_epoch))


def same_shard_rate(ids: Iterable[int], batch: int, per_shard: int) -> float:
    """Of all pairs within batches, the share that comes from one shard."""
    same = pairs = 0
    stream = iter(ids)
    while len(part := list(islice(stream, batch))) == batch:
        counts = np.bincount(np.array(part) // per_shard)
        same += int((counts * (counts - 1)).sum())
        pairs += batch * (batch - 1)
    return same / pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a quarter of the samples")
    parser.add_argument("--results", type=Path, help="FILE")
    options = parser.parse_args()
    per_shard = PER_SHARD // 4 if options.quick else PER_SHARD
    sizes = [per_shard] * SHARDS
    warnings.filterwarnings("ignore", module="webdataset")
    figures: dict[str, Any] = {"shards": SHARDS, "samples_per_shard": per_shard, "rates": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "set"
        write_shards(folder, per_shard)
        peer = list(webdataset_ids(folder))
        assert sorted(peer) == list(range(SHARDS * per_shard)), "webdataset did not read every sample"
        print("share of pairs in a batch that come from one shard\n")
        print("batch    drawn from all   Diptych   Diptych as on large data   webdataset's buffer")
        for batch in BATCHES:
            large = Order(sizes, seed=0, global_batch_size=batch, lanes=8, window=4 * per_shard)
            rates = {
                "drawn_from_all": (per_shard - 1) / (SHARDS * per_shard - 1),
                "diptych": same_shard_rate(
                    ours(Order(sizes, seed=0, global_batch_size=batch)), batch, per_shard
                ),
                "diptych_8_lanes_of_4_shards": same_shard_rate(ours(large), batch, per_shard),
                "webdataset_buffer_5000": same_shard_rate(peer, batch, per_shard),
            }
            figures["rates"][str(batch)] = rates
            print(f"{batch:5} {rates['drawn_from_all']:15.4f} {rates['diptych']:11.4f}", end="")
            print(f" {rates['diptych_8_lanes_of_4_shards']:16.4f} {rates['webdataset_buffer_5000']:21.4f}")
    append_row("shuffle_quality", figures, options.results)


if __name__ == "__main__":
    main()
