"""The stream in real process groups: each rank's own process and workers, put together by gloo."""

from pathlib import Path
from typing import Any

import pytest
import torch

from diptych.data.augment import AugmentConfig
from diptych.data.config import DataConfig, SourceConfig
from diptych.data.shards import ShardWriter
from diptych.data.stream import open_stream
from diptych.data.text import build_tokenizer
from diptych.pretrain import distributed

B = 10


def write_sets(folder: Path) -> list[str]:
    from io import BytesIO

    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    names: list[str] = []
    for name, n in (("a", 43), ("b", 17)):
        with ShardWriter(folder / name, samples_per_shard=5) as writer:
            for i in range(n):
                file = BytesIO()
                Image.fromarray(random.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(file, "PNG")
                writer.write(f"{name}{i}", file.getvalue(), "png", f"picture {i} of {name}", {})
        names.append(str(folder / name))
    return names


def walk(
    rank: int, world_size: int, sets: list[str], workers: int, state: dict[str, Any] | None, count: int
) -> dict[str, Any]:
    """``count`` batches of this rank, gathered from all; rank 0 has what one process would have seen."""
    config = DataConfig(
        train=tuple(SourceConfig(data=name, weight=2.0 - i) for i, name in enumerate(sets)),
        augment=AugmentConfig(scale=(0.4, 1.0), hflip=0.5),
        workers=workers,
        start_method="fork" if workers else None,
        epoch_samples=None if len(sets) == 1 else 4 * B,
        lanes=2,
        window=7,
    )
    stream = open_stream(
        config,
        seed=1,
        global_batch_size=B,
        image_size=12,
        tokenizer=build_tokenizer(None, 8),
        rank=rank,
        world_size=world_size,
    )
    if state is not None:
        stream.load_state_dict(state)
    out: dict[str, list[torch.Tensor]] = {
        "image": [],
        "sample_id": [],
        "source": [],
        "seq_lens": [],
        "token_ids": [],
    }
    with stream:
        for _ in range(count):
            batch = next(stream)
            for key, parts in out.items():
                own = batch[key].int() if key == "source" else batch[key]  # gloo has no int16
                whole = own if world_size == 1 else distributed.all_gather_rows(own)
                parts.append(whole)
        return {key: torch.cat(parts) for key, parts in out.items()} | {"state": stream.state_dict()}


@pytest.mark.parametrize("names", [1, 2])
def test_groups_of_any_size_see_one_order_and_go_on_for_one_another(
    ranks: Any, tmp_path: Path, names: int
) -> None:
    sets = write_sets(tmp_path / "data")[:names]
    truth = walk(0, 1, sets, 0, None, 11)
    state, done = None, 0
    tokens = 0
    for world_size, workers, count in ((3, 1, 4), (2, 2, 3), (4, 0, 4)):
        found = ranks(world_size, walk, sets, workers, state, count)
        assert all(one["state"] == found[0]["state"] for one in found)
        state = found[0]["state"]
        rows = slice(B * done, B * (done + count))
        for key in ("image", "sample_id", "source", "seq_lens"):
            assert torch.equal(found[0][key], truth[key][rows]), key
        more = len(found[0]["token_ids"])
        assert torch.equal(found[0]["token_ids"], truth["token_ids"][tokens : tokens + more])
        tokens += more
        done += count
    assert state == truth["state"]
