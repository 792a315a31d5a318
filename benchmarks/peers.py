"""One contestant of ``loader.py``, in an interpreter of its own.

    python peers.py {fast,plain,open_clip,webdataset} BATCH_SIZE IMAGE_SIZE

fast and plain are Diptych's stream with simplejpeg and with Pillow; open_clip is ``open_clip_train``'s own
loader with the webdataset that it needs; webdataset is the newest webdataset with open_clip's transform.
Commands come as lines on the standard input, ``train FOLDER`` or ``read FOLDER``: one pass over the shards to
training tensors, or over the tars alone. The answer is one line of JSON with the processor time that the pass
took.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
Pass = Callable[[str], Iterable[tuple[int, str]]]


def tars(folder: str) -> list[str]:
    return sorted(str(path) for path in Path(folder).glob("*.tar"))


def sample_count(folder: str) -> int:
    return sum(json.loads((Path(folder) / "sizes.json").read_text()).values())


def diptych(batch_size: int, image_size: int, *, fast: bool) -> tuple[Pass, Pass]:
    from diptych.data import decode
    from diptych.data.config import DataConfig
    from diptych.data.shards import open_shards
    from diptych.data.stream import open_stream
    from diptych.data.text import build_tokenizer

    if not fast:
        decode.simplejpeg = None
    elif decode.simplejpeg is None:
        raise SystemExit("simplejpeg is not installed; pip install 'diptych[fast]'")
    tokenizer = build_tokenizer(None, 77)
    mean, std = (255 * torch.tensor(value).view(1, 3, 1, 1) for value in (MEAN, STD))
    pixels = torch.empty(batch_size, 3, image_size, image_size)

    @cache
    def stream(folder: str) -> Any:
        config = DataConfig(train=folder)
        return open_stream(
            config, seed=0, global_batch_size=batch_size, image_size=image_size, tokenizer=tokenizer
        )

    def train(folder: str) -> Iterator[tuple[int, str]]:
        batches = stream(folder)
        for _ in range(batches.steps_per_epoch):
            batch = next(batches)
            # what training does on the device (ContrastiveModel.pixels), here on the processor; a device's
            # allocator gives the same memory again, so that no pages are made for it
            image = pixels.copy_(batch["image"]).sub_(mean).div_(std)
            assert bool(batch["valid"].all())
            yield len(image), str(image.dtype)

    def read(folder: str) -> Iterator[tuple[int, str]]:
        shards = open_shards(folder)
        for sample_id in range(len(shards)):
            raw = shards.read(sample_id)
            yield 1, raw.key

    return train, read


def open_clip_transform(image_size: int) -> Any:
    import open_clip

    return open_clip.image_transform(image_size, is_train=True, mean=MEAN, std=STD)


def open_clip_train(batch_size: int, image_size: int) -> tuple[Pass, Pass]:
    import open_clip
    from open_clip_train.data import get_wds_dataset, tarfile_to_samples_nothrow

    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    transform = open_clip_transform(image_size)

    @cache
    def loader(folder: str) -> Any:
        args = SimpleNamespace(
            train_data="::".join(tars(folder)),
            train_num_samples=sample_count(folder),
            train_data_upsampling_factors=None,
            dataset_resampled=False,
            seed=0,
            workers=0,
            world_size=1,
            batch_size=batch_size,
        )
        return get_wds_dataset(args, transform, is_train=True, tokenizer=tokenizer).dataloader

    def train(folder: str) -> Iterator[tuple[int, str]]:
        for image, _ in loader(folder):
            yield len(image), str(image.dtype)

    def read(folder: str) -> Iterator[tuple[int, str]]:
        samples: Any = tarfile_to_samples_nothrow([{"url": tar} for tar in tars(folder)])
        for sample in samples:
            yield 1, sample["__key__"]

    return train, read


def newest_webdataset(batch_size: int, image_size: int) -> tuple[Pass, Pass]:
    import open_clip
    import webdataset

    wds: Any = webdataset
    tokenizer = open_clip.get_tokenizer("ViT-B-32")
    transform = open_clip_transform(image_size)

    def train(folder: str) -> Iterator[tuple[int, str]]:
        shards = wds.WebDataset(tars(folder), shardshuffle=100, empty_check=False).shuffle(1000)
        samples = shards.decode("pilrgb").to_tuple("jpg", "txt")
        for image, _ in samples.map_tuple(transform, lambda text: tokenizer(text)[0]).batched(batch_size):
            yield len(image), str(image.dtype)

    def read(folder: str) -> Iterator[tuple[int, str]]:
        for sample in wds.WebDataset(tars(folder), shardshuffle=False, empty_check=False):
            yield 1, sample["__key__"]

    return train, read


def versions() -> dict[str, str]:
    """Of the modules that this contestant took."""
    names = ("torch", "torchvision", "PIL", "open_clip", "webdataset", "simplejpeg", "numpy", "pandas")
    return {name: sys.modules[name].__version__ for name in names if name in sys.modules}


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    torch.set_num_threads(1)
    kind, batch_size, image_size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if kind in ("fast", "plain"):
        train, read = diptych(batch_size, image_size, fast=kind == "fast")
    else:
        train, read = {"open_clip": open_clip_train, "webdataset": newest_webdataset}[kind](
            batch_size, image_size
        )
    print(json.dumps({"versions": versions()}), file=answers, flush=True)
    for line in sys.stdin:
        what, folder = line.rstrip("\n").split(" ", 1)
        start = time.process_time()
        seen = list((train if what == "train" else read)(folder))
        seconds = time.process_time() - start
        images, kinds = sum(count for count, _ in seen), {kind for _, kind in seen}
        if what == "train":
            assert kinds == {"torch.float32"}, kinds
        assert images == sample_count(folder), (images, folder)
        print(json.dumps({"images": images, "seconds": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
