"""What a folder of shards holds: counts, sizes, caption lengths, duplicates, fields of the JSON."""

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engine import Progress, quiet
from .image_header import FORMATS
from .index import OK
from .repeats import HashColumn
from .shards import DamagedSample, ShardSet, open_shards

__all__ = ["shard_stats"]

READ = 20_000  # samples whose texts are read; the rest is known from the index
DISTINCT = 1000  # values of a field that are told apart
QUANTILES = (0, 5, 25, 50, 75, 95, 100)
SIZE_EDGES = (0, 64, 128, 224, 256, 384, 512, 1024, 2048)
LENGTH_EDGES = (0, 8, 16, 32, 64, 128, 256, 512, 1024)


def shard_stats(folder: str | Path, *, progress: Progress = quiet) -> dict[str, Any]:
    """Figures of a folder of shards, as plain data.

    Sizes, caption lengths in characters, and copies of images (equal bytes) are counted over all samples,
    from the index; captions said several times, lengths in words, and the JSON's fields over at most 20,000
    evenly spaced ones. Raises UserError as ``open_shards`` does.
    """
    shards = open_shards(folder)
    parts: dict[str, list[NDArray[Any]]] = {name: [] for name in ("side", "aspect", "bytes", "text")}
    formats = np.zeros(len(FORMATS), dtype=np.int64)
    with HashColumn() as images, HashColumn() as keys:
        with progress("reading indexes", len(shards.rows)) as advance:
            for shard in range(len(shards.rows)):
                records = shards.records(shard)
                records = records[(records["flags"] & OK) > 0]
                formats += np.bincount(records["format"], minlength=len(FORMATS))
                parts["side"].append(np.minimum(records["width"], records["height"]))
                parts["aspect"].append(
                    (records["width"] / np.maximum(records["height"], 1)).astype(np.float32)
                )
                parts["bytes"].append(np.array(records["image_size"]))
                parts["text"].append(np.array(records["text_len"]))
                images.append(records["image_xxh3"])
                keys.append(records["key_hash"])
                advance(1)
        copied, repeated = _copies(images), _copies(keys)
    columns = {name: np.concatenate(parts.pop(name)) for name in list(parts)}
    out: dict[str, Any] = {
        "folder": str(shards.folder),
        "fingerprint": shards.fingerprint,
        "shards": len(shards.rows),
        "samples": len(shards),
        "left_out": sum(row.num_bad for row in shards.rows),
        "bytes": sum(row.bytes for row in shards.rows),
        "formats": {name: int(n) for name, n in zip(FORMATS, formats, strict=True) if n},
        "shorter_side": _distribution(columns["side"], SIZE_EDGES),
        "aspect_ratio": _quantiles(columns["aspect"]),
        "image_bytes": _quantiles(columns["bytes"]),
        "caption_characters": _distribution(columns["text"], LENGTH_EDGES),
        "copied_images": copied,
        "repeated_keys": repeated,
    }
    return out | _texts(shards, progress)


def _quantiles(values: NDArray[Any]) -> dict[str, float]:
    got = np.percentile(values, QUANTILES, method="nearest")
    return {f"p{q}": round(float(value), 3) for q, value in zip(QUANTILES, got, strict=True)}


def _distribution(values: NDArray[Any], edges: tuple[int, ...]) -> dict[str, Any]:
    """Mean, quantiles, and counts of values from one edge up to the next."""
    place = np.searchsorted(edges, values, side="right") - 1
    counts = np.bincount(place, minlength=len(edges))
    names = [f"{low}-{high - 1}" for low, high in pairwise(edges)] + [f"{edges[-1]}+"]
    histogram = {name: int(count) for name, count in zip(names, counts, strict=True)}
    return {"mean": round(float(np.mean(values)), 2), **_quantiles(values), "histogram": histogram}


def _copies(hashes: HashColumn) -> dict[str, float]:
    """How many of the values were there before, and as a rate."""
    again = sum(len(places) - 1 for places in hashes.repeats())
    return {"count": again, "rate": round(again / len(hashes), 6)}


def _texts(shards: ShardSet, progress: Progress) -> dict[str, Any]:
    chosen = np.unique(np.linspace(0, len(shards) - 1, min(len(shards), READ)).round().astype(np.int64))
    words, captions = list[int](), Counter[str]()
    fields, values = Counter[str](), dict[str, Counter[str]]()
    damaged = 0
    with progress("reading texts", len(chosen)) as advance:
        for sample_id in chosen:
            try:
                raw = shards.read(int(sample_id))
            except DamagedSample:
                damaged += 1
                continue
            words.append(len(raw.caption.split()))
            captions[raw.caption] += 1
            for name, value in raw.meta.items():
                fields[name] += 1
                counted = values.setdefault(name, Counter())
                if len(counted) <= DISTINCT:
                    counted.update(str(item) for item in _items(value))
            advance(1)
    n = len(words)
    return {
        "texts_read": n,
        "damaged": damaged,
        "caption_words": _quantiles(np.array(words or [0])),
        "repeated_captions": {"count": n - len(captions), "rate": round((n - len(captions)) / max(n, 1), 6)},
        "commonest_captions": {text[:60]: times for text, times in captions.most_common(5) if times > 1},
        "json": {name: _field(count, n, values.get(name)) for name, count in fields.most_common(50)},
    }


def _items(value: Any) -> list[Any]:
    """What of a JSON value is counted: itself, or a list's members; nothing of what is empty or deeper."""
    items: list[Any] = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, str | int | float) and item != ""]


def _field(count: int, n: int, values: Counter[str] | None) -> dict[str, Any]:
    """How often a field of the JSON is there, how many values it has, and its commonest ones."""
    out: dict[str, Any] = {"in": round(count / max(n, 1), 4)}
    if values:
        out["distinct"] = len(values) if len(values) <= DISTINCT else f"more than {DISTINCT}"
        out["commonest"] = {value[:60]: times for value, times in values.most_common(3)}
    return out
