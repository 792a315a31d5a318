"""Which samples of a shard set are trained on: bitmaps, so that no shard is written anew.

A filter is worked out once and kept in the cache, one bit a sample, memory-mapped: workers and ranks of a
node share it.
"""

import csv
import fcntl
import hashlib
import json
import logging
import re
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager, suppress
from functools import cached_property, lru_cache
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..configs.errors import UserError
from ..configs.files import cache_dir, resolve_data_path, temporary_beside
from ..configs.load import StrictModel
from .index import OK, key_hash, load_json
from .permutation import fold
from .reading import read_retrying
from .shards import DamagedSample, ShardSet
from .where import columns_of, evaluate, parse

__all__ = ["FilterConfig", "Selection", "read_keys", "select"]

log = logging.getLogger(__name__)

Ints = NDArray[np.int64]
Hashes = NDArray[np.uint64]
UID = np.dtype([("f0", "<u8"), ("f1", "<u8")])  # DataComp's files of 128-bit uids
OPEN = 64  # shards whose samples are listed in memory
TELL_S = 10.0  # how often long work says how far it is


class FilterConfig(StrictModel):
    """Which samples take part; all conditions must hold."""

    where: str | None = None
    """An expression over columns of the index: width, height, short, long (sides), aspect, text_len
    (characters), image_size (bytes), format."""
    keep: str | None = None
    """A file of the keys that take part: .txt (one a line), .jsonl, .csv or .parquet (column ``key``, and
    ``shard`` where keys repeat), or DataComp's .npy of uids."""
    drop: str | None = None
    """A file of the keys that do not take part; ``diptych data verify --against`` writes one."""

    @property
    def is_empty(self) -> bool:
        """Whether all samples take part."""
        return self.where is None and self.keep is None and self.drop is None


class Selection:
    """Chosen samples of a shard set. Pickles as the place of its files."""

    def __init__(self, path: Path, sizes: Ints, chosen: Ints | None = None) -> None:
        """``path``: what ``select`` wrote; ``sizes``: usable samples in each shard; ``chosen``: how many of
        them are chosen, counted if not given."""
        self._path, self._sizes = path, sizes
        self._bits: NDArray[np.uint8] = np.load(path, mmap_mode="r")
        starts = np.cumsum([0, *(-(-sizes // 8))])
        if self._bits.dtype != np.uint8 or self._bits.shape != (starts[-1],):
            raise ValueError(f"{path} is no filter of these shards")
        self._starts, self._base = starts, np.cumsum(sizes) - sizes
        if chosen is None:  # shard by shard: all at once would not fit where the bitmap is large
            counts = (np.bitwise_count(self._bits[a:b]).sum() for a, b in pairwise(starts.tolist()))
            chosen = np.fromiter(counts, dtype=np.int64, count=len(sizes))
        self.shard_sizes: Ints = chosen
        """Chosen samples per shard, int64 [shards]."""
        self._ends = np.cumsum(self.shard_sizes)
        self._chosen = lru_cache(maxsize=OPEN)(self._list)

    def __reduce__(self) -> tuple[Any, ...]:
        return Selection, (self._path, self._sizes, self.shard_sizes)

    @cached_property
    def digest(self) -> str:
        """Hash of the choice, in hexadecimal."""
        return hashlib.sha256(self._bits.data).hexdigest()

    def sample_ids(self, ordinals: Ints) -> Ints:
        """Sample ids int64 [n] of ordinals int64 [n] among the chosen."""
        shard = np.searchsorted(self._ends, ordinals, side="right")
        out = np.empty_like(ordinals)
        for number in np.unique(shard).tolist():
            mine = shard == number
            first = self._ends[number] - self.shard_sizes[number]
            out[mine] = self._base[number] + self._chosen(number)[ordinals[mine] - first]
        return out

    def _list(self, shard: int) -> Ints:
        bits = np.unpackbits(self._bits[self._starts[shard] : self._starts[shard + 1]])
        return np.flatnonzero(bits)


def select(shards: ShardSet, config: FilterConfig) -> Selection | None:
    """The samples that a filter chooses, None for all. Worked out once, kept in the cache's ``filters``.

    Raises UserError for an expression or a file that cannot be read, and if nothing is left.
    """
    if config.is_empty:
        return None
    tree = parse(config.where) if config.where is not None else None
    files = [_digest(path) for path in (config.keep, config.drop)]
    text = json.dumps([2, shards.fingerprint, config.where, *files])
    path = cache_dir() / "filters" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.npy"
    if (selection := _open(path, shards)) is None:
        with _alone(path):
            if (selection := _open(path, shards)) is None:
                bits = np.concatenate([np.packbits(chosen) for chosen in _choose(shards, config, tree)])
                _write(path, bits)
                selection = Selection(path, shards.shard_sizes)
    if not selection.shard_sizes.sum():
        given = ", ".join(f"{n}: {v}" for n in ("where", "keep", "drop") if (v := getattr(config, n)))
        raise UserError(f"data.train: of {len(shards)} samples of {shards.folder} none is left by {given}")
    return selection


@contextmanager
def _alone(path: Path) -> Generator[None]:
    """One process of a node works a filter out, the others wait for it."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_suffix(".lock").open("w")
    except OSError as error:
        raise _cannot_keep(path, error) from error
    with lock:
        with suppress(OSError):  # a file system without locks: several may do the same work
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, bits: NDArray[np.uint8]) -> None:
    try:
        with temporary_beside(path) as temporary, temporary.open("wb") as file:
            np.save(file, bits, allow_pickle=False)
    except OSError as error:
        raise _cannot_keep(path, error) from error


def _cannot_keep(path: Path, error: OSError) -> UserError:
    return UserError(
        f"the filter cannot be kept in {path.parent} ({error.strerror or error}); set DIPTYCH_CACHE to a "
        "folder that can be written"
    )


def _open(path: Path, shards: ShardSet) -> Selection | None:
    """What was worked out before; None if there is nothing, or not all of it."""
    try:
        return Selection(path, shards.shard_sizes)
    except OSError:  # there is none, or none that can be read
        return None
    except (ValueError, EOFError):
        log.warning("%s is damaged; the filter is worked out again", path)
        return None


def _choose(shards: ShardSet, config: FilterConfig, tree: Any) -> Iterator[NDArray[np.bool_]]:
    """Of each shard, which of its usable samples are chosen. Raises UserError in the end for a list of which
    no key is in the data."""
    lists = [(name, file, read_keys(file)) for name in ("keep", "drop") if (file := getattr(config, name))]
    matched = dict.fromkeys((name for name, _, _ in lists), 0)
    told = time.monotonic()
    for shard, (name, index) in enumerate(zip(shards.shard_names, shards.indexes(), strict=True)):
        if time.monotonic() - told > TELL_S:
            told = time.monotonic()
            log.warning("%s: filter: %d of %d shards", shards.folder, shard, len(shards.shard_names))
        records = index.records
        usable = records[(records["flags"] & OK) > 0]
        chosen = np.ones(len(usable), dtype=np.bool_)
        if tree is not None:
            chosen &= evaluate(tree, columns_of(usable))
        for which, _, keys in lists:
            matches = keys.matches(shards, shard, name, usable)
            matched[which] += int(matches.sum())
            chosen &= matches == (which == "keep")
        yield chosen
    for which, file, keys in lists:
        if keys and not matched[which]:
            raise UserError(f"{which}: none of the keys in {file} is in {shards.folder}; see {_FORMS}")


class _Keys:
    """Keys of samples as sorted hashes: of the key, of shard and key, or of a uid."""

    def __init__(self, hashes: Hashes, *, with_shards: bool = False, uids: bool = False) -> None:
        self._hashes = np.unique(hashes)
        self._with_shards, self._uids = with_shards, uids

    def __len__(self) -> int:
        return len(self._hashes)

    def matches(self, shards: ShardSet, shard: int, name: str, usable: NDArray[np.void]) -> NDArray[np.bool_]:
        """Which of a shard's usable samples are among the keys, bool [n]."""
        if not len(self._hashes):
            return np.zeros(len(usable), dtype=np.bool_)
        if self._uids:
            first = int(shards.shard_sizes[:shard].sum())
            hashes = _hash_uids([_uid_of(shards, first + i) for i in range(len(usable))])
        elif self._with_shards:
            keys = shards.index(shard).keys()
            ok = np.flatnonzero(shards.records(shard)["flags"] & OK)
            hashes = np.array([key_hash(f"{name}\0{keys[i]}") for i in ok], dtype=np.uint64)
        else:
            hashes = usable["key_hash"]
        place = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        return self._hashes[place] == hashes


def _uid_of(shards: ShardSet, sample_id: int) -> tuple[int, int]:
    """A sample's uid, its key if that is one, else ``uid`` of its JSON; zeros if there is none."""
    uid = shards.key_of(sample_id).rsplit("/", 1)[-1]
    if not re.fullmatch("[0-9a-f]{32}", uid):
        try:
            uid = str(read_retrying(shards, sample_id)[0].meta.get("uid"))
        except DamagedSample:
            uid = ""
    return (int(uid[:16], 16), int(uid[16:], 16)) if re.fullmatch("[0-9a-f]{32}", uid) else (0, 0)


def _hash_uids(uids: Any) -> Hashes:
    """64 bits of uids: a list of pairs, or an array of dtype UID."""
    pairs = np.array(uids, dtype=UID)
    return pairs["f0"] ^ fold(0, pairs["f1"])


def read_keys(file: str) -> _Keys:
    """The keys that a file lists. Raises UserError if it cannot be read or lists none."""
    path = resolve_data_path(file)
    try:
        if path.suffix.lower() == ".npy":
            uids = np.load(path, mmap_mode="r", allow_pickle=False)
            if uids.dtype != UID or uids.ndim != 1:
                raise ValueError(f"it holds {uids.dtype}, not DataComp's pairs of u8")
            keys, count = _Keys(_hash_uids(uids), uids=True), len(uids)
        else:
            rows = _READERS[path.suffix.lower()](path)
            first = next(rows, None)
            count = 0 if first is None else 1
            with_shards = first is not None and first[1] is not None
            every = chain([] if first is None else [first], rows)
            hashes = np.fromiter((_hash_row(row, with_shards) for row in every), dtype=np.uint64)
            keys = _Keys(hashes, with_shards=with_shards)
    except KeyError as error:
        raise UserError(f"{path}: a list of keys is one of {', '.join([*_READERS, '.npy'])}") from error
    except (OSError, ValueError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise UserError(f"{path} cannot be read as a list of keys ({reason}); give {_FORMS}") from error
    if not count and path.suffix.lower() != ".parquet":  # a table with no rows says what it means
        raise UserError(f"{path} lists no keys; give {_FORMS}")
    return keys


def _hash_row(row: "KeyRow", with_shards: bool) -> int:
    key, shard = row
    if (shard is not None) != with_shards:
        raise ValueError("some rows name a shard and some do not")
    return key_hash(f"{shard}\0{key}" if with_shards else key)


_FORMS = "keys line by line, or a table with a column key"
KeyRow = tuple[str, str | None]


def _lines(path: Path) -> Iterator[KeyRow]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for line in file:
            if key := line.strip():
                yield key, None


def _jsonl(path: Path) -> Iterator[KeyRow]:
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                yield _row(load_json(line))


def _csv(path: Path) -> Iterator[KeyRow]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        yield from map(_row, csv.DictReader(file))


def _parquet(path: Path) -> Iterator[KeyRow]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        names = [name for name in ("key", "shard") if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=names):
            yield from map(_row, batch.to_pylist())


def _row(row: dict[str, Any]) -> KeyRow:
    if not isinstance(key := row.get("key"), str):
        raise ValueError("a row has no text under key")
    shard = row.get("shard")
    if shard is None or shard == "":
        return key, None
    if not isinstance(shard, str):
        raise ValueError(f"shard {shard!r} is no text such as 00000.tar")
    return key, shard if shard.endswith(".tar") else f"{shard}.tar"


_READERS: dict[str, Callable[[Path], Iterator[KeyRow]]] = {
    ".txt": _lines,
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
}


def _digest(file: str | None) -> str | None:
    """Kind and hash of a file's bytes; UserError if there is none."""
    if file is None:
        return None
    path = resolve_data_path(file)
    try:
        with path.open("rb") as opened:
            return path.suffix.lower() + hashlib.file_digest(opened, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a list of keys") from error
