"""Frozen features: encoded once per distinct picture and text, and kept by content.

A cache entry is named by the sha256 of the encoder's weights and preprocessing and of the content of every
item in order. Never by a name: another checkpoint in the same place, other pixels behind the same path or
another order is another entry. Entries are written batch by batch, are there whole or not at all, and are
used memory-mapped: a table of tokens may be larger than memory.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...configs.files import cache_dir, fsync_folder, temporary_folder
from ...pretrain import distributed
from ...pretrain.model import Encoders
from ..fusion.joint import check_joint
from ..fusion.pooling import mean_pool
from ..tables.cells import BrokenPicture, Picture, PictureReader
from ..tables.manifest import Rows
from .encoding import TEXT_BATCH, Arrays, encode_pictures, encode_texts, longest_text
from .exchange import in_turn, share_of

__all__ = ["TOKEN_PARTS", "FeatureRows", "Progress", "encoder_fingerprint", "extract", "silent"]

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``with progress(what, total) as advance: advance(done)``."""
VERSION = 3  # of what is stored; part of every entry's name
TOKEN_PARTS = ("tokens", "inputs", "mask")
"""What tables of a modality there may be beside its embeddings, in ``FeatureRows`` and in batches of them."""
SETS = 4096  # pooled at once


def silent(what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
    """Progress that shows nothing."""
    return nullcontext(lambda done: None)


@dataclass(frozen=True)
class FeatureRows:
    """Features of rows: tables over distinct items, and which item each row has (-1: missing).

    tables: ``image``, ``text`` and further modalities float32 [items, D]; where asked for, ``image_tokens``
    and ``text_tokens`` [items, P, W], ``image_inputs`` and ``text_inputs``, and ``text_mask`` bool
    [items, L]. index: int64 [n] per modality. groups: int64 [n], equal for rows that belong together, or
    None. sets: where rows have several pictures, ``image`` int64 [items, P], the pictures of an item, -1 for
    no further one; ``image_tokens`` and, for heads that pool, ``image_set`` float32 [pictures, D] are then
    tables of pictures.
    """

    tables: dict[str, Tensor]
    index: dict[str, Tensor]
    groups: Tensor | None = None
    sets: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    def __len__(self) -> int:
        return len(next(iter(self.index.values())))

    def take(self, rows: NDArray[np.int64] | Tensor) -> "FeatureRows":
        """The given rows over the same tables."""
        rows = torch.as_tensor(rows)
        groups = None if self.groups is None else self.groups[rows]
        return replace(self, index={k: index[rows] for k, index in self.index.items()}, groups=groups)

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features and presence of some rows, as heads take them; missing slots hold zeros. ``group`` is
        their groups, if those are known."""
        features: dict[str, Tensor] = {} if self.groups is None else {"group": self.groups[rows]}
        present: dict[str, Tensor] = {}
        for k, index in self.index.items():
            item = index[rows]
            present[k] = item >= 0
            if k in self.tables:
                features[k] = _pick(self.tables[k], item)
            if k in self.sets:
                features |= self.several(k, item, tokens=tokens)
            elif tokens:
                names = [name for part in TOKEN_PARTS if (name := f"{k}_{part}") in self.tables]
                features |= {name: _pick(self.tables[name], item) for name in names}
        if tokens and "text_mask" in features:  # no wider than this batch's longest text
            longest = max(1, int(features["text_mask"].sum(1).max()) if len(rows) else 1)
            for name in {f"text_{part}" for part in TOKEN_PARTS} & features.keys():
                features[name] = features[name][:, :longest]
        return features, present

    def several(self, k: str, item: Tensor, *, tokens: bool) -> dict[str, Tensor]:
        """Of every picture of the items its embedding [b, P, D] and its tokens [b, P * N, W], with masks."""
        numbers = torch.where(item[:, None] >= 0, _pick(self.sets[k], item), -1)
        most = max(1, int((numbers >= 0).sum(1).max()) if len(numbers) else 1)
        numbers = numbers[:, :most]
        found: dict[str, Tensor] = {}
        if f"{k}_set" in self.tables:
            found[f"{k}_set"] = _pick(self.tables[f"{k}_set"], numbers)
            found[f"{k}_set_mask"] = numbers >= 0
        if tokens and f"{k}_tokens" in self.tables:
            every = _pick(self.tables[f"{k}_tokens"], numbers)  # [b, P, N, W]
            found[f"{k}_tokens"] = every.flatten(1, 2)
            found[f"{k}_mask"] = (numbers >= 0).repeat_interleave(every.shape[2], dim=1)
        return found

    def beside(self, other: "FeatureRows") -> "FeatureRows":
        """These rows with further modalities of the same rows."""
        tables, index = self.tables | other.tables, self.index | other.index
        return replace(self, tables=tables, index=index, sets=self.sets | other.sets)

    def to(self, device: torch.device) -> "FeatureRows":
        """The same on another device. Tables of tokens stay where they are, for batches to be taken from."""
        return FeatureRows(
            {k: v.to(device) if k in self.index else v for k, v in self.tables.items()},
            {k: v.to(device) for k, v in self.index.items()},
            None if self.groups is None else self.groups.to(device),
            {k: v.to(device) for k, v in self.sets.items()},
        )


def _pick(table: Tensor, items: Tensor) -> Tensor:
    """Rows of a table by number, of any shape; zeros for -1."""
    if len(table) == 0:
        return table.new_zeros((*items.shape, *table.shape[1:]), device=items.device)
    got = table[items.clamp_min(0).to(table.device)].to(items.device)
    got[items < 0] = 0
    return got


def encoder_fingerprint(model: Encoders) -> str:
    """sha256 over every tensor of the encoders, the preprocessing and what the tokenizer does."""
    digest = hashlib.sha256()
    tokenizer = model.tokenizer.sha256() if "text" in model.widths else None
    digest.update(json.dumps([VERSION, model.config, tokenizer], sort_keys=True, default=str).encode())
    for name, value in sorted(model.clip.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def extract(
    model: Encoders,
    rows: Rows,
    *,
    tokens: bool = False,
    inputs: bool = False,
    fingerprint: str | None = None,
    batch_size: int = 256,
    max_pixels: int = 89_478_485,
    progress: Progress = silent,
    together: bool = False,
) -> tuple[FeatureRows, dict[int, tuple[Picture, str]]]:
    """Features of all rows as the towers give them, and the rows with a broken picture: the first one of the
    row, and why (its features are zeros). Modalities without encoder: see ``columns``.

    ``fingerprint``: the encoder's; with it features are taken from and kept in the cache. ``tokens``: also
    the token tables. ``inputs``: also those of what the towers' first blocks read; UserError if they cannot
    be had. ``together``: all processes ask for the same; each encodes a share of the batches, and all get the
    features that one process would make, bit for bit.
    """
    if inputs:
        check_joint(model)
    tables: dict[str, Tensor] = {}
    index: dict[str, Tensor] = {}
    sets: dict[str, Tensor] = {}
    broken: dict[int, tuple[Picture, str]] = {}
    depth = 2 if inputs else int(tokens)
    if "image" in rows.modalities:
        cells: list[tuple[Picture, ...] | None] = rows.cells["image"]
        pictures = list(dict.fromkeys(picture for cell in cells for picture in cell or ()))
        reader = PictureReader()

        def from_pictures() -> Iterator[Arrays]:
            own = share_of(pictures, batch_size, together)
            with progress("encoding pictures", len(own)) as advance:
                yield from encode_pictures(
                    model,
                    own,
                    reader,
                    tokens=depth > 0,
                    inputs=inputs,
                    batch_size=batch_size,
                    max_pixels=max_pixels,
                    advance=advance,
                )

        content = [_picture_content(reader, picture) for picture in pictures] if fingerprint else []
        make = from_pictures
        if together:
            make = partial(in_turn, from_pictures, len(pictures), batch_size)
        known = fingerprint and f"{fingerprint} {max_pixels}"  # the limit decides what is broken
        arrays = _kept("image", depth, known, content, make, together)
        _add(tables, "image", arrays)
        number = {picture: i for i, picture in enumerate(pictures)}
        items, of_row = _distinct([cell and tuple(number[picture] for picture in cell) for cell in cells])
        if pool := rows.declared["image"].pool:
            sets["image"] = _padded(items)
            every = tables["image"]
            tables["image"] = _pooled(every, sets["image"])
            tables |= {"image_set": every} if pool == "attention" else {}
        index["image"] = torch.from_numpy(of_row)
        reasons = {p: reason for p, reason in zip(pictures, arrays["broken"].tolist(), strict=True) if reason}
        for row, cell in enumerate(cells if reasons else []):
            bad = next((picture for picture in cell or () if picture in reasons), None)
            if bad is not None:
                broken[row] = (bad, str(reasons[bad]))
    if "text" in rows.modalities:
        texts, of_row = _distinct(rows.cells["text"])

        def from_texts() -> Iterator[Arrays]:
            length = longest_text(model, texts) if depth else 0
            own = share_of(texts, TEXT_BATCH, together)
            with progress("encoding texts", len(own)) as advance:
                yield from encode_texts(
                    model, own, tokens=depth > 0, inputs=inputs, length=length, advance=advance
                )

        make = from_texts
        if together:
            make = partial(in_turn, from_texts, len(texts), TEXT_BATCH)
        _add(tables, "text", _kept("text", depth, fingerprint, texts, make, together))
        index["text"] = torch.from_numpy(of_row)
    groups = torch.tensor([_number(name) for name in rows.groups]) if rows.groups else None
    return FeatureRows(tables, index, groups, sets), broken


def _padded(items: Sequence[tuple[int, ...]]) -> Tensor:
    """Pictures of each item int64 [items, P], -1 behind the last."""
    most = max(map(len, items), default=1)
    padded = [[*item, *[-1] * (most - len(item))] for item in items]
    return torch.tensor(padded, dtype=torch.int64).reshape(len(items), most)


def _pooled(every: Tensor, sets: Tensor) -> Tensor:
    """The mean embedding [items, D] of each item's pictures."""
    parts = [mean_pool(_pick(every, some), some >= 0) for some in sets.split(SETS)]
    return torch.cat([every[:0], *parts])


def _add(tables: dict[str, Tensor], modality: str, arrays: Arrays) -> None:
    """Put an entry's arrays among the tables, without a copy."""
    names = {"features": modality} | {k: f"{modality}_{k}" for k in TOKEN_PARTS}
    for name, table in names.items():
        if name in arrays:
            tables[table] = torch.from_numpy(arrays[name])


def _number(name: str) -> int:
    """A number of 64 bits that depends on the name alone, not on which other rows there are."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _distinct(items: Sequence[Any]) -> tuple[list[Any], NDArray[np.int64]]:
    """Distinct items in order of first use, and each row's number among them (-1 for None)."""
    number: dict[Any, int] = {}
    of_row = [-1 if item is None else number.setdefault(item, len(number)) for item in items]
    return list(number), np.array(of_row, dtype=np.int64)


def _picture_content(reader: PictureReader, picture: Picture) -> str:
    try:
        return reader.fingerprint(picture)
    except BrokenPicture as error:
        return f"broken: {error}"


def _kept(
    kind: str,
    depth: int,
    fingerprint: str | None,
    content: Sequence[str],
    compute: Callable[[], Iterator[Arrays]],
    together: bool,
) -> Arrays:
    """The arrays of an entry, memory-mapped from the cache, made first if they are not there. ``depth``: 0
    embeddings, 1 also tokens, 2 also inputs; a deeper entry serves too."""
    if fingerprint is None:
        batches = list(compute())
        return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}
    digest = hashlib.sha256(json.dumps([VERSION, kind, fingerprint]).encode())
    for item in content:
        digest.update(hashlib.sha256(item.encode("utf-8", "surrogatepass")).digest())
    plain = cache_dir() / "features" / f"{kind}-{digest.hexdigest()[:32]}"
    folders = [plain.with_name(plain.name + suffix) for suffix in ("", "-tokens", "-inputs")][depth:]
    folder = next((one for one in folders if one.is_dir()), folders[0])
    missing = torch.tensor([float(not folder.is_dir())])
    if bool(distributed.all_reduce_max(missing) if together else missing):
        if not together or distributed.local_rank() == 0:
            _write_entry(folder, len(content), compute())
        else:
            for _ in compute():  # its share; the machine's first process writes
                pass
        if together:
            distributed.barrier()
    deeper = (("tokens", "mask"), ("inputs",))[depth:]
    files = [path for path in sorted(folder.glob("*.npy")) if all(path.stem not in some for some in deeper)]
    # copy on write: torch takes arrays that it could write into, and the file stays as it is
    return {path.stem: np.load(path, mmap_mode="c", allow_pickle=False) for path in files}


def _write_entry(folder: Path, rows: int, batches: Iterable[Arrays]) -> None:
    """Write a folder of arrays [rows, ..] from their batches; it is there whole or not at all."""
    with temporary_folder(folder) as temporary:
        with ExitStack() as stack:
            files: dict[str, IO[bytes]] = {}
            for batch in batches:
                for name, array in batch.items():
                    if name not in files:
                        files[name] = stack.enter_context((temporary / f"{name}.npy").open("wb"))
                        _write_header(files[name], (rows, *array.shape[1:]), array.dtype)
                    files[name].write(array.tobytes())
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
        fsync_folder(temporary)
        if not folder.exists():  # another process may have been first, with the same content
            temporary.rename(folder)
        fsync_folder(folder.parent)


def _write_header(file: IO[bytes], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    """What stands before the numbers in an .npy file."""
    descr = np.lib.format.dtype_to_descr(dtype)
    np.lib.format.write_array_header_1_0(file, {"descr": descr, "fortran_order": False, "shape": shape})
