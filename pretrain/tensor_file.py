"""Files of a checkpoint, written so that the hash of what was meant is known when the last byte is out.

``write_tensors`` writes the same bytes as ``safetensors`` (https://github.com/huggingface/safetensors), in
pieces: neither writing nor hashing a piece holds the interpreter, so a training goes on beside it, and
nothing is read back. ``TensorFile`` reads a tensor or some rows of it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..configs.errors import UserError

__all__ = ["FileFacts", "Spec", "TensorFile", "hash_file", "specs", "write_tensors", "write_text"]

FileFacts = dict[str, Any]
"""What a manifest knows of a file: ``{"bytes": size, "sha256": hex}``."""

# names of the format, in its order: the file holds the last of these first
_DTYPES: dict[torch.dtype, str] = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}
_ORDER = {dtype: number for number, dtype in enumerate(_DTYPES)}
_PIECE = 4 << 20


@dataclass(frozen=True)
class Spec:
    """A tensor without its values."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the values."""
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def specs(tensors: Mapping[str, Tensor]) -> dict[str, Spec]:
    """What ``write_tensors`` must know before the first value."""
    return {name: Spec(t.dtype, tuple(t.shape)) for name, t in tensors.items()}


class _Hashed:
    """A file being written whose size and hash are known at the end; synced then."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._digest, self._size = file, hashlib.sha256(), 0

    def write(self, data: bytes | memoryview) -> None:
        for start in range(0, len(data), _PIECE):
            piece = data[start : start + _PIECE]
            self._file.write(piece)
            self._digest.update(piece)
        self._size += len(data)

    def finish(self) -> FileFacts:
        self._file.flush()
        os.fsync(self._file.fileno())
        return {"bytes": self._size, "sha256": self._digest.hexdigest()}


def write_tensors(path: Path, what: Mapping[str, Spec], read: Callable[[str], Tensor]) -> FileFacts:
    """Write the tensors that ``read`` gives, one at a time, as safetensors; synced. Raises OSError."""
    names = sorted(what, key=lambda name: (-_ORDER[what[name].dtype], name))
    header: dict[str, Any] = {}
    at = 0
    for name in names:
        end = at + what[name].nbytes
        header[name] = {
            "dtype": _DTYPES[what[name].dtype],
            "shape": list(what[name].shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb", buffering=0) as file:
        out = _Hashed(file)
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            value = read(name)
            assert (value.dtype, tuple(value.shape)) == (what[name].dtype, what[name].shape), name
            if value.numel():
                flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                out.write(flat.numpy().data)
        return out.finish()


def write_text(path: Path, text: str) -> FileFacts:
    """Write UTF-8 text; synced. Raises OSError."""
    with path.open("wb") as file:
        out = _Hashed(file)
        out.write(text.encode())
        return out.finish()


def hash_file(path: Path) -> FileFacts:
    """Size and hash of a file as it lies on disk. Raises OSError."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


class TensorFile:
    """An open .safetensors file; tensors come to the CPU when they are asked for."""

    def __init__(self, path: Path) -> None:
        """Raises UserError if it cannot be read."""
        self.path = path
        try:
            self._file = cast(Any, safe_open)(path, framework="pt")
        except (OSError, SafetensorError) as error:
            raise unreadable(path, error) from error
        self.names: frozenset[str] = frozenset(self._file.keys())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._file.get_slice(name).get_shape())

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """A tensor, or its part from ``start`` to ``stop`` along ``dim``: a copy, not a view of the file,
        which may be removed. Raises UserError if it cannot be read."""
        try:
            if stop is None:
                return self._file.get_tensor(name).clone()
            where = (slice(None),) * dim + (slice(start, stop),)
            return self._file.get_slice(name)[where].clone()
        except (OSError, SafetensorError) as error:
            raise unreadable(self.path, error) from error


MEND = "remove its folder to use an older one"
"""What to do about a file of a checkpoint that cannot be used."""


def unreadable(path: Path, error: Exception) -> UserError:
    """What to say of a file of a checkpoint that cannot be read."""
    return UserError(f"{path} cannot be read ({error}); {MEND}")
