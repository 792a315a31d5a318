"""Example retrievals of an evaluated gallery, as pictures for people and as entries of evaluate.json."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from ..configs.files import atomic_write_bytes
from ..data.eval_batches import eval_batches
from ..data.shards import ShardSet
from .encode import Encoded
from .pictures import Example, choose_examples, draw_examples, png, thumbnail
from .retrieval import top_k
from .statistics import Ints

__all__ = ["write_examples"]

THUMBNAIL = 72  # pixels
ANSWERS = 5


def write_examples(
    folder: Path,
    name: str,
    shards: ShardSet,
    images: Encoded,
    texts: Tensor,
    caption_ids: Ints,
    captions: list[str],
    *,
    count: int,
) -> list[dict[str, Any]]:
    """Write ``<folder>/evaluate/examples_<name>.png`` and the thumbnails it shows; return the entries.

    ``count`` pictures look for captions and ``count`` captions for pictures, each chosen by the hash of its
    name.
    """
    picture_rows = choose_examples(images.keys, count)
    caption_rows = choose_examples(captions, count)
    cosines, found = top_k(images.features[picture_rows], texts, ANSWERS)
    cosines_back, found_back = top_k(texts[caption_rows], images.features, ANSWERS)
    shown = sorted({*picture_rows, *map(int, found_back.ravel())})
    thumbs = _thumbnails(shards, images, shown)
    out = folder / "evaluate" / "thumbs"
    out.mkdir(parents=True, exist_ok=True)
    paths: dict[int, str] = {}
    for row, image in thumbs.items():
        file = out / f"{name}-{int(images.sample_ids[row])}.png"
        atomic_write_bytes(file, png(image))
        paths[row] = file.relative_to(folder).as_posix()
    examples: list[Example] = []
    entries: list[dict[str, Any]] = []
    for row, values, best in zip(picture_rows, cosines, found, strict=True):
        hits = [int(b) == int(caption_ids[row]) for b in best]
        answers = [captions[int(b)] for b in best]
        examples.append(
            Example("image_to_text", images.captions[row], thumbs[row], answers, [], list(values), hits)
        )
        top = [
            {"caption": answer, "cosine": float(value), "hit": hit}
            for answer, value, hit in zip(answers, values, hits, strict=True)
        ]
        entries.append(_entry("image_to_text", name, images.captions[row], paths[row], top))
    for row, values, best in zip(caption_rows, cosines_back, found_back, strict=True):
        hits = [int(caption_ids[b]) == row for b in best]
        pictures: list[Image.Image | None] = [thumbs[int(b)] for b in best]
        answers = [images.captions[int(b)] for b in best]
        examples.append(Example("text_to_image", captions[row], None, answers, pictures, list(values), hits))
        top = [
            {"caption": answer, "picture": paths[int(b)], "cosine": float(value), "hit": hit}
            for b, answer, value, hit in zip(best, answers, values, hits, strict=True)
        ]
        entries.append(_entry("text_to_image", name, captions[row], None, top))
    title = f"{name}: {len(images)} pictures, {len(captions)} captions"
    draw_examples(examples, folder / "evaluate" / f"examples_{name}.png", title=title)
    return entries


def _entry(
    direction: str, gallery: str, query: str, picture: str | None, top: list[dict[str, Any]]
) -> dict[str, Any]:
    return {"direction": direction, "gallery": gallery, "query": query, "picture": picture, "top": top}


def _thumbnails(shards: ShardSet, images: Encoded, rows: list[int]) -> dict[int, Image.Image]:
    """Pictures of the given rows."""
    by_id = {int(images.sample_ids[row]): row for row in rows}
    wanted = np.array(sorted(by_id), dtype=np.int64)
    out: dict[int, Image.Image] = {}
    for batch in eval_batches(shards, image_size=THUMBNAIL, batch_size=64, sample_ids=wanted):
        for sample_id, pixels in zip(batch.sample_ids, batch.image, strict=True):
            out[by_id[int(sample_id)]] = thumbnail(pixels)
    return out
