"""Training on tars without an index: they are streamed from front to back, as webdataset does.

Nothing is counted beforehand. An epoch is as long as ``data.epoch_samples`` says, and a run that goes on
begins with the next epoch, not within one.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from ..configs.errors import UserError
from ..configs.files import cache_dir
from .batches import Batch, BatchMaker, Failure, Recipe
from .cache import FileCache
from .config import DataConfig
from .index import MANIFEST
from .order import rank_slice
from .permutation import fold, hash_words
from .plain_tars import Opener, Tar, deal, expand, read_tar, shuffled
from .remote import as_url
from .shards import DamagedSample, RawSample
from .stages import Shape
from .stream import Stream
from .text import Tokenizer

__all__ = ["PlainStream", "is_plain", "open_plain"]

log = logging.getLogger(__name__)

_SHARDS, _SAMPLES = 11, 12  # what random numbers are for
_NO_ORDER: Any = None  # samples come as the tars have them
NO_INDEX = (
    "without an index samples are not counted or checked: an epoch does not see each exactly once, and a run "
    "that goes on begins with its next epoch; `diptych data index` mends that"
)


def is_plain(train: str) -> bool:
    """Whether ``data.train`` means tars that are streamed: a tar, a list of them in braces, or a local folder
    with tars but no manifest."""
    if train.startswith("pipe:"):
        return True  # and will be refused
    if train.startswith("corpus:"):
        return False
    if "{" in train or train.partition("?")[0].endswith((".tar", ".tar.gz", ".tgz")):
        return True  # compressed ones will be refused
    folder = Path(train).expanduser()
    return as_url(train) is None and not (folder / MANIFEST).is_file() and any(folder.glob("*.tar"))


class PlainStream(Stream):
    """One rank's batches of tars that have no index; made by ``open_plain``.

    Batches are those of ``Stream``. ``sample_id`` is the tar's number in the list times 2^32, plus the
    sample's number in the tar; ``bad`` also names where a tar breaks, once, with the reason "truncated",
    "damaged" or "trailing". While no tar is damaged, all ranks and workers together see every sample once
    before any of them sees one again; they reach that point after different numbers of batches.
    """

    def __init__(
        self,
        tars: Sequence[Tar],
        opener: Opener,
        tokenizer: Tokenizer,
        recipe: Recipe,
        config: DataConfig,
        *,
        seed: int,
        global_batch_size: int,
        pin_memory: bool = False,
    ) -> None:
        super().__init__([], _NO_ORDER, tokenizer, recipe, config, seed=seed, pin_memory=pin_memory)
        self._tars, self._opener, self._global_batch_size = list(tars), opener, global_batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in what the config calls an epoch."""
        return self.num_samples // self._global_batch_size

    @property
    def num_samples(self) -> int:
        """``data.epoch_samples``: nobody has counted what there is."""
        assert self._config.epoch_samples is not None
        return self._config.epoch_samples

    def describe(self) -> list[str]:
        """What is trained on, in lines for people."""
        return [f"{len(self._tars)} tars without an index; {self.num_samples} samples are called an epoch"]

    def close(self) -> None:
        """Stop the workers. What goes on afterwards begins this pass through the tars anew."""
        super().close()

    def _hint(self) -> None:
        """Workers look ahead themselves."""

    def _start(self) -> Iterator[Batch | Failure]:
        batches = _PlainBatches(
            self._tars,
            self._opener,
            _PlainMaker(self._tokenizer, self._recipe, self._seed),
            self._seed,
            (self._epoch, self._step, self.steps_per_epoch),
            self._global_batch_size,
        )
        return self._load(batches, None) if self._config.workers else iter(batches)

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was yielded, as JSON, the same on all ranks."""
        names = "\n".join(str(tar) for tar in self._tars)
        return {
            "epoch": self._epoch,
            "step": self._step,
            "seed": self._seed,
            "global_batch_size": self._global_batch_size,
            "fingerprint": "tars " + hashlib.sha256(names.encode()).hexdigest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after a state: with the next epoch, unless one had just ended.

        Raises UserError if tars, seed or global batch size are not those of the state.
        """
        mine = self.state_dict()
        for key, name in (("fingerprint", "data.train"), ("seed", "seed"), ("global_batch_size",) * 2):
            if state.get(key) != mine[key]:
                raise UserError(
                    f"{name}: it is not the checkpoint's; set it back, or start a new run from its weights"
                )
        self.close()
        self._epoch, self._step = state["epoch"] + (state["step"] > 0), 0


class _PlainBatches(IterableDataset[Any]):
    """What a worker runs: its share of the tars, without end."""

    def __init__(
        self,
        tars: list[Tar],
        opener: Opener,
        maker: "_PlainMaker",
        seed: int,
        place: tuple[int, int, int],
        global_batch_size: int,
    ) -> None:
        self._tars, self._opener, self._maker, self._seed = tars, opener, maker, seed
        self._place, self._global_batch_size = place, global_batch_size
        self._told: set[int] = set()  # tars whose faults were named
        self._lost: list[DamagedSample] = []
        self._now = "data.train"  # the tar that is read

    def __iter__(self) -> Iterator[Batch | Failure]:
        try:
            yield from self._batches()
        except UserError as error:
            yield Failure(str(error))
        except OSError as error:
            yield Failure(f"{self._now} cannot be read: {error.strerror or error}; check the file system")

    def _batches(self) -> Iterator[Batch]:
        info, recipe = get_worker_info(), self._maker.recipe
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        rows = rank_slice(recipe.rank, recipe.world_size, self._global_batch_size)
        epoch, step, steps_per_epoch = self._place
        # the loader takes the workers' batches in turn
        number = epoch * steps_per_epoch + step + worker
        samples = self._samples(recipe.rank * workers + worker, recipe.world_size * workers, epoch)
        while True:
            taken = list(itertools.islice(samples, rows.stop - rows.start))
            if self._lost and recipe.on_bad == "raise":
                raise UserError(f"{self._lost[0]}; set data.on_bad: mask to go on without what is lost")
            shape = recipe.shapes.at(number * self._global_batch_size)
            yield self._maker.plain_batch(taken, shape, *divmod(number, steps_per_epoch), self._lost)
            self._lost.clear()
            number += workers

    def _samples(self, consumer: int, consumers: int, first: int) -> Iterator[tuple[int, RawSample]]:
        """(number of the pass through the tars, sample), pass after pass."""
        for turn in itertools.count(first):
            empty = True
            rng = np.random.default_rng([self._seed, _SAMPLES, turn, consumer])
            for sample in shuffled(self._pass(turn, consumer, consumers), rng):
                empty = False
                yield turn, sample
            if empty:
                raise UserError(
                    f"data.train: worker {consumer + 1} of {consumers} found no sample with an image and a "
                    "'.txt' in its tars; index them with `diptych data index` (--caption-key where captions "
                    "are in the JSON), or lower data.workers"
                )

    def _pass(self, turn: int, consumer: int, consumers: int) -> Iterator[RawSample]:
        keys = fold(hash_words(self._seed, _SHARDS, turn), np.arange(len(self._tars)))
        order = [self._tars[i] for i in np.argsort(keys, kind="stable").tolist()]
        mine = deal(order, consumer, consumers)
        for (tar, part, parts), (following, _, _) in zip(mine, [*mine[1:], mine[-1]], strict=True):
            self._now = str(tar)
            with self._opener.open(tar) as file:
                if following is not tar:
                    self._opener.ahead(following)
                tell = part == 0 and tar.number not in self._told
                self._told.add(tar.number)
                samples = read_tar(file, tar, self._lost if tell else None)
                yield from itertools.islice(samples, part, None, parts)


class _PlainMaker(BatchMaker):
    """Makes batches of samples that were read already."""

    def __init__(self, tokenizer: Tokenizer, recipe: Recipe, seed: int) -> None:
        super().__init__([], _NO_ORDER, tokenizer, recipe, seed)
        self._raws: dict[int, RawSample | DamagedSample] = {}

    def _read(self, sources: list[int], ids: list[int]) -> list[RawSample | DamagedSample]:
        return [self._raws[sample_id] for sample_id in ids]

    def plain_batch(
        self,
        taken: list[tuple[int, RawSample]],
        shape: Shape,
        epoch: int,
        step: int,
        lost: list[DamagedSample],
    ) -> Batch:
        """A batch of these (pass, sample); ``lost`` goes to its ``bad``."""
        self._raws = {raw.sample_id: raw for _, raw in taken}
        ids = [raw.sample_id for _, raw in taken]
        made = self._make(shape, [0] * len(ids), [turn for turn, _ in taken], ids)
        place: dict[str, Any] = {"epoch": epoch, "step": step}
        batch = self._batch(made, np.zeros(len(ids), dtype=np.int16), np.array(ids), epoch, step)
        batch["bad"] += [
            {"shard": one.shard, "key": one.key, "reason": one.reason, "source": 0, "sample_id": -1} | place
            for one in lost
        ]
        return batch


def open_plain(
    config: DataConfig,
    tokenizer: Tokenizer,
    recipe: Recipe,
    *,
    seed: int,
    global_batch_size: int,
    pin_memory: bool = False,
) -> PlainStream:
    """The stream of one rank over tars without an index; see ``is_plain`` for how ``data.train`` names them.

    Raises UserError if there are none, if they cannot be streamed (compressed ones, commands, mixtures), or
    ``data.epoch_samples`` is missing or less than a global batch.
    """
    if not isinstance(config.train, str):
        raise UserError("data.train: tars without an index cannot be mixed or filtered; index them first")
    if config.lanes is not None or config.window is not None:
        raise UserError("data.lanes and data.window: tars without an index have neither; leave them out")
    if config.epoch_samples is None or config.epoch_samples < global_batch_size:
        given = "it must be given" if config.epoch_samples is None else f"{config.epoch_samples} is too few"
        raise UserError(
            f"data.epoch_samples: {given}, at least the global batch of {global_batch_size}, since nobody "
            f"has counted the tars of {config.train}; or index them with `diptych data index`"
        )
    tars = _tars(config.train)
    remote = any(as_url(tar.place) is not None for tar in tars)
    cache: FileCache | None = None
    if remote and config.cache_gb > 0:
        folder = Path(config.cache).expanduser() if config.cache else cache_dir() / "shards"
        cache = FileCache(folder, int(config.cache_gb * 1e9))
    if recipe.rank == 0:
        log.warning("%s: %s", config.train, NO_INDEX)
    return PlainStream(
        tars,
        Opener(cache),
        tokenizer,
        recipe,
        config,
        seed=seed,
        global_batch_size=global_batch_size,
        pin_memory=pin_memory,
    )


def _tars(train: str) -> list[Tar]:
    """The tars that ``data.train`` names; UserError if one is not to be read."""
    as_url(train)  # refuses commands
    folder = Path(train).expanduser()
    places = [str(path) for path in sorted(folder.glob("*.tar"))] if folder.is_dir() else expand(train)
    for place in places:
        url = as_url(place)
        if not place.partition("?")[0].endswith(".tar"):
            raise UserError(f"data.train: '{place}' is no '.tar'; unpack compressed ones")
        if url is None and not Path(place).expanduser().is_file():
            raise UserError(f"data.train: there is no {place}; check the list '{train}'")
    if not places:
        raise UserError(f"data.train: '{train}' names no tars")
    return [Tar(number, place) for number, place in enumerate(places)]
