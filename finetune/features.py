"""Frozen features: encoded once per distinct picture and text, and kept by content.

A cache entry is named by the sha256 of the encoder's weights and preprocessing and of the content of every
item in order. Never by a name: another checkpoint in the same place, other pixels behind the same path or
another order is another entry. Entries are memory-mapped arrays, written whole or not at all.
"""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..configs.files import cache_dir, fsync_folder
from ..data.decode import DecodeError, eval_image
from ..pretrain.model import LoadedModel
from .cells import BrokenPicture, Picture, PictureReader
from .manifest import Rows
from .tokens import image_tokens, text_tokens

__all__ = ["FeatureRows", "Progress", "encoder_fingerprint", "extract", "read_pixels", "silent"]

Arrays = dict[str, NDArray[Any]]
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``with progress(what, total) as advance: advance(done)``."""
VERSION = 1  # of what is stored; part of every entry's name
TEXT_BATCH = 1024


def silent(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress that shows nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class FeatureRows:
    """Features of rows: tables over distinct items, and which item each row has (-1: missing).

    tables: ``image`` and ``text`` float32 [items, D]; where asked for, ``image_tokens`` and ``text_tokens``
    [items, P, W], and ``text_mask`` bool [items, L]. index: int64 [n] per modality.
    """

    tables: dict[str, Tensor]
    index: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.index.values())))

    def take(self, rows: NDArray[np.int64] | Tensor) -> "FeatureRows":
        """The given rows over the same tables."""
        rows = torch.as_tensor(rows)
        return replace(self, index={k: index[rows] for k, index in self.index.items()})

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features and presence of some rows, as heads take them; missing slots hold zeros."""
        features: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        for k, index in self.index.items():
            item = index[rows]
            present[k] = item >= 0
            for name, table in self.tables.items():
                if name != k and not (tokens and name.startswith(f"{k}_")):
                    continue
                if len(table) == 0:
                    features[name] = table.new_zeros((len(item), *table.shape[1:]))
                    continue
                got = table[item.clamp_min(0)]
                got[~present[k]] = 0
                features[name] = got
        if tokens and "text_mask" in features:  # no wider than this batch's longest text
            longest = max(1, int(features["text_mask"].sum(1).max()) if len(rows) else 1)
            for name in ("text_mask", "text_tokens"):
                features[name] = features[name][:, :longest]
        return features, present

    def to(self, device: torch.device) -> "FeatureRows":
        """The same on another device."""
        return FeatureRows(
            {k: v.to(device) for k, v in self.tables.items()},
            {k: v.to(device) for k, v in self.index.items()},
        )


def encoder_fingerprint(model: LoadedModel) -> str:
    """sha256 over every tensor of both towers, the preprocessing and the tokenizer."""
    digest = hashlib.sha256()
    tokenizer = {"name": model.tokenizer.name, "context_length": model.tokenizer.context_length}
    digest.update(json.dumps([VERSION, model.config, tokenizer], sort_keys=True, default=str).encode())
    for name, value in sorted(model.clip.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def extract(
    model: LoadedModel,
    rows: Rows,
    *,
    tokens: bool = False,
    fingerprint: str | None = None,
    batch_size: int = 256,
    max_pixels: int = 89_478_485,
    progress: Progress = silent,
) -> tuple[FeatureRows, dict[int, str]]:
    """Features of all rows, and the rows whose picture is broken with the reason (their features are zeros).

    ``fingerprint``: the encoder's; with it features are taken from and kept in the cache. ``tokens``: also
    the token tables.
    """
    tables: dict[str, Tensor] = {}
    index: dict[str, Tensor] = {}
    broken: dict[int, str] = {}
    reasons: dict[int, str] = {}
    if "image" in rows.modalities:
        pictures, of_row = _distinct(rows.images)
        reader = PictureReader()

        def encode_pictures(want_tokens: bool) -> Arrays:
            with progress("encoding pictures", len(pictures)) as advance:
                batches = _picture_batches(model, pictures, reader, batch_size, max_pixels, want_tokens)
                return _collect(batches, advance)

        content = [_picture_content(reader, picture) for picture in pictures]
        for kind in ("image", "image_tokens")[: 1 + tokens]:
            arrays = _kept(
                kind, fingerprint, content, lambda kind=kind: encode_pictures(kind == "image_tokens")
            )
            tables[kind] = _tensor(arrays["features"])
            reasons = {i: r for i, r in enumerate(arrays["broken"].tolist()) if r}
        index["image"] = torch.from_numpy(of_row)
        broken = {row: reasons[item] for row, item in enumerate(of_row) if item in reasons}
    if "text" in rows.modalities:
        texts, of_row = _distinct(rows.texts)

        def encode_texts(want_tokens: bool) -> Arrays:
            with progress("encoding texts", len(texts)) as advance:
                return _collect(_text_batches(model, texts, want_tokens), advance)

        for kind in ("text", "text_tokens")[: 1 + tokens]:
            arrays = _kept(kind, fingerprint, texts, lambda kind=kind: encode_texts(kind == "text_tokens"))
            tables[kind] = _tensor(arrays["features"])
            if kind == "text_tokens":
                tables["text_mask"] = torch.from_numpy(np.array(arrays["mask"]))
        index["text"] = torch.from_numpy(of_row)
    return FeatureRows(tables, index), broken


def _distinct(items: Sequence[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """Distinct items in order of first use, and each row's number among them (-1 for None)."""
    number: dict[Any, int] = {}
    of_row = [-1 if item is None else number.setdefault(item, len(number)) for item in items]
    return list(number), np.array(of_row, dtype=np.int64)


def _tensor(array: NDArray[Any]) -> Tensor:
    """The array in memory, writable, as float32 or what it is."""
    return torch.from_numpy(np.array(array))


def _picture_content(reader: PictureReader, picture: Picture) -> str:
    try:
        return reader.fingerprint(picture)
    except BrokenPicture as error:
        return f"broken: {error}"


def read_pixels(
    model: LoadedModel, pictures: Sequence[Picture], reader: PictureReader, max_pixels: int
) -> tuple[Tensor, list[str]]:
    """uint8 [n, 3, S, S], preprocessed as the model wants it, and why a picture is broken ("" if it is not;
    broken ones are white)."""
    preprocess, size = model.config["preprocess_cfg"], model.image_size
    pixels = torch.full((len(pictures), 3, size, size), 255, dtype=torch.uint8)
    reasons = [""] * len(pictures)
    for i, picture in enumerate(pictures):
        try:
            pixels[i] = eval_image(
                reader.read(picture),
                size,
                resize_mode=preprocess["resize_mode"],
                interpolation=preprocess["interpolation"],
                fill_color=preprocess["fill_color"],
                max_pixels=max_pixels,
            )
        except (BrokenPicture, DecodeError) as error:
            reasons[i] = " ".join(str(error).split())[:200]
    return pixels, reasons


def _picture_batches(
    model: LoadedModel,
    pictures: Sequence[Picture],
    reader: PictureReader,
    batch_size: int,
    max_pixels: int,
    tokens: bool,
) -> Generator[Arrays]:
    size = model.image_size
    for start in range(0, len(pictures), batch_size):
        pixels, reasons = read_pixels(model, pictures[start : start + batch_size], reader, max_pixels)
        features = image_tokens(model, pixels).half() if tokens else model.encode_images(pixels, batch_size)
        yield {"features": features.cpu().numpy(), "broken": np.array(reasons, dtype="U200")}
    if not pictures:
        features = (
            image_tokens(model, torch.zeros(1, 3, size, size, dtype=torch.uint8)).half() if tokens else None
        )
        empty = torch.zeros(0, model.embed_dim) if features is None else features[:0].cpu()
        yield {"features": empty.numpy(), "broken": np.array([], dtype="U200")}


def _text_batches(model: LoadedModel, texts: Sequence[str], tokens: bool) -> Generator[Arrays]:
    if not tokens:
        for start in range(0, max(1, len(texts)), TEXT_BATCH):
            part = list(texts[start : start + TEXT_BATCH])
            yield {"features": model.encode_captions(part).numpy(), "done": np.zeros(len(part), np.bool_)}
        return
    longest = 1
    parts: list[tuple[Tensor, Tensor]] = []
    for start in range(0, max(1, len(texts)), TEXT_BATCH):
        got, mask = text_tokens(model, list(texts[start : start + TEXT_BATCH]) or [""])
        keep = slice(0, len(texts) - start)
        parts.append((got[keep].half().cpu(), mask[keep].cpu()))
        longest = max(longest, mask.shape[1])
    for got, mask in parts:
        wide = longest - mask.shape[1]
        yield {
            "features": torch.nn.functional.pad(got, (0, 0, 0, wide)).numpy(),
            "mask": torch.nn.functional.pad(mask, (0, wide)).numpy(),
        }


def _collect(batches: Generator[Arrays], advance: Callable[[int], None]) -> Arrays:
    collected: dict[str, list[NDArray[Any]]] = {}
    for batch in batches:
        for name, array in batch.items():
            collected.setdefault(name, []).append(array)
        advance(len(batch["features"]))
    return {name: np.concatenate(arrays) for name, arrays in collected.items()}


def _kept(
    kind: str, fingerprint: str | None, content: Sequence[str], compute: Callable[[], Arrays]
) -> Arrays:
    """The arrays of an entry, memory-mapped from the cache, made first if they are not there."""
    if fingerprint is None:
        return compute()
    digest = hashlib.sha256(json.dumps([VERSION, kind, fingerprint]).encode())
    for item in content:
        digest.update(hashlib.sha256(item.encode("utf-8", "surrogatepass")).digest())
    folder = cache_dir() / "features" / f"{kind}-{digest.hexdigest()[:32]}"
    if not folder.is_dir():
        _write_entry(folder, compute())
    return {
        path.stem: np.load(path, mmap_mode="r", allow_pickle=False) for path in sorted(folder.glob("*.npy"))
    }


def _write_entry(folder: Path, arrays: Arrays) -> None:
    """Write a folder of arrays that is there whole or not at all."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.with_name(f".{folder.name}.{secrets.token_hex(6)}.tmp")
    temporary.mkdir()
    try:
        for name, array in arrays.items():
            with (temporary / f"{name}.npy").open("wb") as file:
                np.save(file, array, allow_pickle=False)
                os.fsync(file.fileno())
        fsync_folder(temporary)
        if not folder.exists():  # another process may have been first, with the same content
            temporary.rename(folder)
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
