"""A small corpus to stream, and ways to look at what comes out."""

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diptych.data.augment import AugmentConfig
from diptych.data.captions import CaptionConfig
from diptych.data.config import DataConfig, SourceConfig
from diptych.data.shards import ShardWriter
from diptych.data.stages import StageConfig
from diptych.data.stream import Stream, open_stream
from diptych.data.text import Tokenizer, build_tokenizer

from .images import photo, stored

AUGMENT = AugmentConfig(
    scale=(0.5, 1.0),
    margin=0.2,
    hflip=0.5,
    color_jitter=(0.3, 0.3, 0.3, 0.1),
    color_jitter_prob=0.5,
    grayscale_prob=0.2,
)
CAPTIONS = CaptionConfig(txt=1.0, names=1.0, tags=1.0)
SIZE = 16
TOKENIZER: Tokenizer = build_tokenizer(None, 12)
Batch = dict[str, Any]


def write_corpus(folder: Path, n: int = 53, per_shard: int = 6) -> Path:
    kinds = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"))
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for i in range(n):
            extension, kind = kinds[i % 3]
            image = stored(photo(20 + i % 5, 18 + i % 7, seed=i), kind)
            meta = {"names": [f"name {i}", f"alias {i}"], "tags": ["red", "round", f"tag{i}"]}
            writer.write(f"key-{i:03d}", image, extension, f"picture number {i}", meta)
    return folder


def stream_of(
    folder: Path | list[dict[str, Any]],
    *,
    seed: int = 3,
    batch: int = 8,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
    image_size: int = SIZE,
    tokenizer: Tokenizer = TOKENIZER,
    stages: Sequence[StageConfig] = (),
    **settings: Any,
) -> Stream:
    train = str(folder) if isinstance(folder, Path) else tuple(SourceConfig(**one) for one in folder)
    config = DataConfig(
        **{"train": train, "augment": AUGMENT, "captions": CAPTIONS, "lanes": 2, "window": 9} | settings
    )
    return open_stream(
        config,
        seed=seed,
        global_batch_size=batch,
        image_size=image_size,
        tokenizer=tokenizer,
        stages=stages,
        rank=rank,
        world_size=world_size,
        pin_memory=pin_memory,
    )


def ranks_of(folder: Path | list[dict[str, Any]], world_size: int, **settings: Any) -> list[Stream]:
    return [stream_of(folder, rank=r, world_size=world_size, **settings) for r in range(world_size)]


def global_batches(streams: list[Stream], n: int, state: Any = None) -> list[Batch]:
    """The next n global batches, put together from all ranks; workers end afterwards."""
    out: list[Batch] = []
    try:
        for stream in streams:
            if state is not None:
                stream.load_state_dict(state)
        for parts in islice(zip(*streams, strict=True), n):
            assert len({(part["epoch"], part["step"]) for part in parts}) == 1
            out.append(join(parts))
    finally:
        for stream in streams:
            stream.close()
    return out


def join(parts: Any) -> Batch:
    merged: Batch = {"epoch": parts[0]["epoch"], "step": parts[0]["step"]}
    merged["bad"] = [row for part in parts for row in part["bad"]]
    merged["cut_captions"] = sum(part["cut_captions"] for part in parts)
    for key, value in parts[0].items():
        if isinstance(value, torch.Tensor):
            merged[key] = torch.cat([part[key] for part in parts])
    return merged


def same(first: Batch, second: Batch) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        for key, value in first.items()
    )


def all_same(first: list[Batch], second: list[Batch]) -> bool:
    return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))


def change_bytes(tar: Path, at: int, change: Callable[[int], int] = lambda byte: byte ^ 0xFF) -> None:
    with tar.open("r+b") as file:
        file.seek(at)
        byte = file.read(1)[0]
        file.seek(at)
        file.write(bytes([change(byte)]))


def caption_texts(batch: Batch) -> list[list[int]]:
    return [part.tolist() for part in batch["token_ids"].split(batch["seq_lens"].tolist())]


def ids(batches: list[Batch]) -> np.ndarray:
    return np.concatenate([batch["sample_id"].numpy() for batch in batches])
