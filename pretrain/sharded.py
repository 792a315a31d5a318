"""Tensors of a checkpoint in files: whole ones, or each process's part of sharded ones.

Tensors have a kind: ``weights`` (those in training), ``ema`` (their average) or ``optimizer``
(``PARAMETER/ENTRY``). Where one process holds everything, each kind is a file. Where parameters are sharded,
process r writes all its parts into ``part_0000r.safetensors`` and nothing is gathered; ``layout.json`` tells
shape, dtype and where the parts begin. Either is read by any number of processes, sharded or not, and each
reads only the rows that it holds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configs.documents import as_written
from ..configs.errors import UserError
from . import distributed
from .checkpoint import OPTIMIZER_NAME, read_document
from .tensor_file import MEND, FileFacts, Spec, TensorFile, write_tensors
from .tensor_file import specs as specs_of
from .weights import MODEL_NAME

__all__ = [
    "LAYOUT_NAME",
    "RAW_NAME",
    "Kinds",
    "SavedTensors",
    "file_names",
    "layout",
    "model_specs",
    "own_part",
    "part_name",
    "write_model",
]

RAW_NAME, LAYOUT_NAME = "train_model.safetensors", "layout.json"
Kinds = Mapping[str, Mapping[str, Tensor]]
"""Tensors by kind and name."""


def part_name(rank: int) -> str:
    """``part_00000.safetensors``."""
    return f"part_{rank:05d}.safetensors"


def file_names(averaged: bool) -> dict[str, str]:
    """The file of each kind where tensors are whole; open_clip's holds the average if there is one."""
    if averaged:
        return {"weights": RAW_NAME, "ema": MODEL_NAME, "optimizer": OPTIMIZER_NAME}
    return {"weights": MODEL_NAME, "optimizer": OPTIMIZER_NAME}


def own_part(kinds: Kinds) -> dict[str, Tensor]:
    """What this process writes of sharded tensors (still sharded), by ``KIND/NAME``: its rows, and on rank 0
    also what every process has whole."""
    out: dict[str, Tensor] = {}
    for kind, tensors in kinds.items():
        for name, tensor in tensors.items():
            rows = distributed.own_rows(tensor)
            if (rows is None and distributed.rank() == 0) or (rows is not None and rows[1] < rows[2]):
                out[f"{kind}/{name}"] = tensor
    return out


def layout(kinds: Kinds) -> dict[str, Any]:
    """What ``layout.json`` says: per tensor its shape, its dtype and, if it is sharded, the dimension and
    where each process's part begins, and the end."""
    tensors: dict[str, Any] = {}
    for kind, named in kinds.items():
        for name, tensor in named.items():
            entry: dict[str, Any] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
            if (rows := distributed.own_rows(tensor)) is not None:
                entry |= {"dim": rows[0], "starts": distributed.row_starts(tensor.shape[rows[0]])}
            tensors[f"{kind}/{name}"] = entry
    return {"world_size": distributed.world_size(), "tensors": tensors}


class SavedTensors:
    """The tensors of a checkpoint folder, read as they are asked for. Raises UserError for files that cannot
    be read or do not fit one another."""

    def __init__(self, folder: Path, *, averaged: bool) -> None:
        """``averaged``: whether the run had an average of weights."""
        self.folder = folder
        self._layout: dict[str, Any] = {}
        if (folder / LAYOUT_NAME).is_file():
            saved = read_document(folder / LAYOUT_NAME)
            self.names = {"optimizer": {}}
            with as_written(folder / LAYOUT_NAME, MEND):
                self._layout = {key: _entry(entry) for key, entry in saved["tensors"].items()}
                self._parts = [TensorFile(folder / part_name(r)) for r in range(int(saved["world_size"]))]
            for key in self._layout:
                kind, _, name = key.partition("/")
                self.names.setdefault(kind, {})[name] = key
        else:
            self._files = {
                kind: TensorFile(folder / name)
                for kind, name in file_names(averaged).items()
                if (folder / name).is_file()
            }
            self.names = {kind: {name: name for name in file.names} for kind, file in self._files.items()}

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        if self._layout:
            return tuple(self._layout[f"{kind}/{name}"]["shape"])
        return self._files[kind].shape(name)

    def read(self, kind: str, name: str, rows: tuple[int, int, int] | None = None) -> Tensor:
        """A whole tensor, on the CPU, or its ``rows``: (dimension, start, stop)."""
        if not self._layout:
            return self._files[kind].read(name, *(rows or ()))
        key = f"{kind}/{name}"
        with as_written(self.folder / LAYOUT_NAME, MEND):
            value = self._from_parts(key, rows)
            shape = list(self._layout[key]["shape"])
            if rows is not None:
                shape[rows[0]] = rows[2] - rows[1]
            if list(value.shape) != shape:
                raise ValueError(f"{key} has shape {list(value.shape)}, not {shape}")
        return value

    def _from_parts(self, key: str, rows: tuple[int, int, int] | None) -> Tensor:
        entry = self._layout[key]
        if "starts" not in entry:
            return self._parts[0].read(key, *(rows or ()))
        dim, starts = entry["dim"], entry["starts"]
        if rows is not None and rows[0] != dim:
            raise ValueError(f"{key} is cut along dimension {dim}")
        first, last = (0, starts[-1]) if rows is None else rows[1:]
        pieces = [
            file.read(key, dim, max(first, start) - start, min(last, stop) - start)
            for file, start, stop in zip(self._parts, starts, starts[1:], strict=False)
            if max(first, start) < min(last, stop)
        ]
        if not pieces:  # a process that holds no row of it
            shape = list(entry["shape"])
            shape[dim] = 0
            return self._like(key).new_empty(shape)
        rest = [[*piece.shape[:dim], *piece.shape[dim + 1 :]] for piece in pieces]
        if any(one != rest[0] for one in rest):
            raise ValueError(f"the parts of {key} do not fit one another")
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def _like(self, key: str) -> Tensor:
        """Some part of a tensor."""
        found = next((file for file in self._parts if key in file.names), None)
        if found is None:
            raise ValueError(f"no part holds {key}")
        return found.read(key)

    def like(self, kind: str, name: str, own: Tensor | None) -> Tensor:
        """A tensor, sharded as ``own`` is if it has its shape; then only this process's rows are read."""
        rows = None if own is None else distributed.own_rows(own)
        if own is None or rows is None or self.shape(kind, name) != tuple(own.shape):
            return self.read(kind, name)
        return distributed.from_own(own, self.read(kind, name, rows))

    def all_like(self, kind: str, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a kind, each sharded as its namesake in ``own``, whose names and shapes must be the
        same."""
        there = self.names.get(kind, {})
        odd = [*(n for n in own if n not in there), *(n for n in there if n not in own)]
        odd += [n for n in own if n in there and self.shape(kind, n) != tuple(own[n].shape)]
        if odd:
            raise UserError(
                f"{self.folder} holds another model ({len(odd)} tensors differ, {odd[0]} among them); set "
                "model as it was, or give this run another out folder"
            )
        return {name: self.like(kind, name, value) for name, value in own.items()}


def _entry(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What a layout says of a tensor. Raises ValueError, or what wrong types lead to, for what cannot be."""
    shape = [int(size) for size in entry["shape"]]
    out: dict[str, Any] = {"shape": shape}
    if "starts" in entry:
        dim, starts = int(entry["dim"]), [int(start) for start in entry["starts"]]
        if dim < 0 or starts != sorted(starts) or starts[0] != 0 or starts[-1] != shape[dim]:
            raise ValueError(f"parts from {starts[:9]} of {shape[:9]}")
        out |= {"dim": dim, "starts": starts}
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {shape[:9]}")
    return out


def write_model(folder: Path, what: Mapping[str, Spec], *, averaged: bool) -> dict[str, FileFacts]:
    """Write open_clip's file from the parts that lie in ``folder``, one tensor at a time."""
    saved = SavedTensors(folder, averaged=averaged)
    kind = "ema" if averaged else "weights"
    return {MODEL_NAME: write_tensors(folder / MODEL_NAME, what, lambda name: saved.read(kind, name))}


def model_specs(kinds: Kinds) -> dict[str, Spec]:
    """What ``write_model`` must know, from tensors that are sharded or not."""
    return specs_of(kinds.get("ema", kinds["weights"]))
