"""Small pictures, and tars written by others than the product."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diptych.data.shards import ShardWriter

Sample = tuple[str, bytes, str, str, dict[str, Any]]  # key, image, extension, caption, meta
# webdataset leaves the files that it read to the garbage collector
WEBDATASET = pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)
PIL_NAMES = {"jpg": "JPEG", "png": "PNG", "webp": "WEBP"}


def picture(seed: int = 0, extension: str = "png", size: tuple[int, int] = (9, 7)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format=PIL_NAMES[extension])
    return buffer.getvalue()


def samples(n: int, first: int = 0) -> list[Sample]:
    out: list[Sample] = []
    for i in range(first, first + n):
        extension = ("png", "jpg", "webp")[i % 3]
        meta = {"number": i, "tags": ["a", "b"]} if i % 4 else {}
        out.append(
            (f"key-{i:04d}", picture(i, extension), extension, f"picture number {i} \N{CAT FACE}", meta)
        )
    return out


def write(folder: Path, content: Iterable[Sample], *, per_shard: int = 4, **options: Any) -> Path:
    with ShardWriter(folder, samples_per_shard=per_shard, **options) as writer:
        for sample in content:
            writer.write(*sample)
    return folder


def sample_members(content: Iterable[Sample]) -> list[tuple[str, bytes]]:
    """Members in the order in which the product writes them."""
    out: list[tuple[str, bytes]] = []
    for key, image, extension, caption, meta in content:
        text = json.dumps(meta, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        parts = {extension: image, "json": text.encode(), "txt": caption.encode()}
        out += [(f"{key}.{name}", parts[name]) for name in sorted(parts)]
    return out


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], kind: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar made by the standard library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def member_offsets(path: Path) -> dict[str, tuple[int, int]]:
    """Offset and size of each member's bytes, by the standard library."""
    with tarfile.open(path) as tar:
        return {member.name: (member.offset_data, member.size) for member in tar}


def by_webdataset(urls: list[str]) -> list[dict[str, Any]]:
    """The samples of tars as webdataset's own reader gives them."""
    import webdataset  # brings torch along, which processes started by tests do without

    return list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))


def flip(path: Path, offset: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= mask
    path.write_bytes(data)


def as_dict(raw: Any) -> Mapping[str, Any]:
    return {name: getattr(raw, name) for name in ("key", "image", "extension", "caption", "meta")}
