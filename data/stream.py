"""The training loader.

``Stream`` yields one rank's batches, endlessly over epochs, in an order that is the same for any number of
ranks and workers (``order``), and goes on from any step (docs/stream.md). Workers are plain torch DataLoader
processes: the loader keeps their batches in order, so the place in the order is all there is to store.
"""

import atexit
import copy
import errno
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from multiprocessing.process import BaseProcess
from typing import Any, Self
from weakref import WeakSet

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..configs.errors import UserError
from ..configs.parent import signal_at_end_of_parent
from .batches import Batch, BatchMaker, Failure, Recipe
from .config import DataConfig
from .datasets import (
    Source,
    check_keys,
    describe,
    fingerprint,
    make_order,
    open_sources,
    parts,
    resumed_order,
)
from .order import AnyOrder, Steps, rank_slice
from .stacks import Stacks, answer
from .stages import Shape, Shapes, StageConfig
from .text import Tokenizer

__all__ = ["Stream", "open_stream"]

HINT_STEPS = 16  # steps between looks ahead at the shards that come next
LOOK_S = 0.5  # seconds between calls of ``while_waiting``
PATIENCE_S = 2.0  # seconds that workers have to end


class Stream(Iterator[Batch]):
    """One rank's batches, endlessly over epochs; made by ``open_stream``.

    Each batch is a dict of b rows: ``image`` uint8 [b, 3, S, S], ``token_ids`` int32 [sum(seq_lens)],
    ``seq_lens`` int32 [b], ``valid`` bool [b], ``sample_id`` int64 [b], ``source`` int16 [b],
    ``caption_hash`` int64 [b], ``epoch`` and ``step`` (of the epoch) int, ``cut_captions`` int (captions
    longer than they may be), and ``bad``, a list of ``{shard, key, reason, source, sample_id, epoch, step}``.
    ``sample_id`` is the number of the sample in its source's index, whatever filters there are. Iterating
    raises UserError if data cannot be read. With ``data.weight_key`` there is ``weight`` float32 [b], too.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        order: AnyOrder,
        tokenizer: Tokenizer,
        recipe: Recipe,
        config: DataConfig,
        *,
        seed: int,
        pin_memory: bool = False,
        notes: Sequence[str] = (),
    ) -> None:
        """``notes``: what else ``describe`` is to say."""
        self.while_waiting: Callable[[], None] = _nothing
        """Called every half second while workers are waited for; what it raises ends the wait, and the batch
        is the next one all the same."""
        self.on_workers: Callable[[list[int]], object] = _nothing
        """Called with the process ids of the workers when they have been started."""
        self._sources, self._order, self._tokenizer = list(sources), order, tokenizer
        self._notes = list(notes)
        self._seed = seed
        self._recipe, self._config = recipe, config
        self._pin_memory = pin_memory
        self._epoch = self._step = 0
        self._batches: Iterator[Batch | Failure] | None = None
        self._stacks = Stacks()

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the same on all ranks."""
        return self._order.steps_per_epoch

    @property
    def num_samples(self) -> int:
        """Samples that take part, of all sources together."""
        return sum(int(source.shard_sizes.sum()) for source in self._sources)

    @property
    def order(self) -> AnyOrder:
        """The order of samples."""
        return self._order

    def describe(self) -> list[str]:
        """What is trained on, in lines for people: samples, shares, what an epoch leaves out, captions that
        are missing."""
        return [*describe(self._sources, self._order), *self._notes]

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
            self._hint()  # threads, so after the workers were forked
        batch = self._wait(self._batches)
        if isinstance(batch, Failure):
            self.close()
            raise UserError(batch.message)
        self._epoch, self._step = batch["epoch"], batch["step"] + 1
        if self._step == self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
        if self._step % HINT_STEPS == 0:
            self._hint()
        return batch

    def _wait(self, batches: Iterator[Batch | Failure]) -> Batch | Failure:
        while True:
            try:
                return next(batches)
            except Exception as error:
                if self._config.workers and str(error).startswith("DataLoader timed out"):
                    self.while_waiting()
                    continue
                if (dead := _dead_worker(batches)) is None:
                    raise
                self.close()
                raise UserError(
                    f"{dead}; give the machine more memory or shared memory "
                    "(/dev/shm), or lower data.workers or data.prefetch"
                ) from error

    def _hint(self) -> None:
        """Have the shards that come next brought into the cache, where they are remote."""
        if not any(source.shards.is_remote for source in self._sources):
            return
        recipe = self._recipe
        rows = rank_slice(recipe.rank, recipe.world_size, self._order.global_batch_size)
        ahead = self._order.shards_ahead(self._epoch, self._step, rows)
        for s, source in enumerate(self._sources):
            source.shards.prefetch([shard for own, shard in ahead if own == s])

    def worker_stacks(self) -> str:
        """What the worker processes are doing, in lines for people; "" without workers. For any thread."""
        return self._stacks.of([worker.pid for worker in getattr(self._batches, "_workers", [])])

    def shards_due(self) -> list[str]:
        """Names of the shards that this rank's next batch comes from, if they are known. For any thread."""
        if not self._sources:
            return []
        rows = rank_slice(self._recipe.rank, self._recipe.world_size, self._order.global_batch_size)
        places = copy.deepcopy(self._order).places(self._epoch, self._step, rows)
        names: dict[str, None] = {}
        for s, source in enumerate(self._sources):
            ids = source.sample_ids(places.ordinal[places.source == s])
            numbers = np.searchsorted(np.cumsum(source.shards.shard_sizes), ids, side="right")
            names |= dict.fromkeys(source.shards.shard_names[number] for number in numbers)
        return list(names)

    def _start(self) -> Iterator[Batch | Failure]:
        maker = BatchMaker(self._sources, self._order, self._tokenizer, self._recipe, self._seed)
        steps = Steps(self._epoch, self._step, self.steps_per_epoch)
        if self._config.workers == 0:
            return map(maker.__getitem__, steps)
        return self._load(maker, steps)

    def _load(self, dataset: Any, sampler: Any) -> Iterator[Batch | Failure]:
        """The items of a dataset, made by worker processes."""
        # torch would raise a worker's death wherever the training process is at that moment, which may be in
        # the middle of a checkpoint or a collective; the loader itself notices, too, when a batch is due
        handler = signal.getsignal(signal.SIGCHLD)
        in_main = threading.current_thread() is threading.main_thread()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores: meant
            loader = DataLoader(
                dataset,
                batch_size=None,  # an item is a whole batch
                sampler=sampler,
                num_workers=self._config.workers,
                prefetch_factor=self._config.prefetch,
                multiprocessing_context=self._config.start_method,
                collate_fn=_shared,
                worker_init_fn=partial(_start_worker, os.getpid() if in_main else None, self._stacks.path),
                generator=torch.Generator(),  # else a start draws one of the run's random numbers
                pin_memory=self._pin_memory,
                timeout=LOOK_S,
            )
            batches = _started(loader)
        _workers.update(_workers_of(batches))
        if in_main:
            signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
        self.on_workers([worker.pid for worker in _workers_of(batches) if worker.pid is not None])
        return batches

    @property
    def place(self) -> tuple[int, int]:
        """Epoch and step of the next batch. Set it back to take back a batch for ``state_dict``; the batches
        that come do not follow it before ``close``."""
        return self._epoch, self._step

    @place.setter
    def place(self, place: tuple[int, int]) -> None:
        self._epoch, self._step = place

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was yielded, as JSON; batches made ahead do not count. It is
        the same on all ranks."""
        place = {"epoch": self._epoch, "step": self._step}
        hashes: dict[str, Any] = {"fingerprint": fingerprint(self._sources)}
        if hashes["fingerprint"] != self._sources[0].shards.fingerprint:
            hashes["parts"] = parts(self._sources)
        return place | self._order.state() | hashes

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, of any number of ranks and workers. Lanes and window are the state's.

        Raises UserError if data, seed, global batch size or weights are not those of the state, which would
        not see the rest of its epoch.
        """
        order = resumed_order(self._order, self._sources, state)
        self.close()
        self._order = order
        self._epoch, self._step = state["epoch"], state["step"]

    def skip_to_next_epoch(self, state: Mapping[str, Any]) -> None:
        """Go on after a state of other data or another order: with the next epoch, unless one had just
        ended."""
        self.close()
        self.place = int(state["epoch"]) + (state["step"] > 0), 0

    def close(self) -> None:
        """Stop the workers. The stream may go on afterwards, with new ones, from where it is."""
        batches, self._batches = self._batches, None
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            # torch waits 5 seconds for each worker in turn, which one that waits for a server does not hear
            late = threading.Timer(PATIENCE_S, _kill, [_workers_of(batches)])
            late.start()
            shutdown()
            late.cancel()
        for source in self._sources:
            source.shards.prefetch([])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _dead_worker(batches: Any) -> str | None:
    """Which worker has ended and how, None if all run. One that is dying is waited for."""
    workers = _workers_of(batches)
    for patience in (0.0, 0.2):
        for number, worker in enumerate(workers):
            worker.join(patience)
            if (code := worker.exitcode) is not None:
                how = f"exit code {code}" if code >= 0 else f"signal {-code}"
                return f"data worker {number} (process {worker.pid}) died ({how})"
    return None


def _workers_of(batches: Any) -> list[BaseProcess]:
    return getattr(batches, "_workers", [])


def _kill(workers: Iterable[BaseProcess]) -> None:
    for worker in list(workers):
        worker.kill()


_workers: WeakSet[BaseProcess] = WeakSet()
atexit.register(_kill, _workers)  # of streams that nobody closed, and before multiprocessing waits for them


def _nothing(*_: object) -> None:
    pass


def _started(loader: Any) -> Any:
    """A loader's batches. Where a worker cannot be started, those that were are ended: nobody knows them."""
    before = set(multiprocessing.active_children())
    try:
        return iter(loader)
    except OSError as error:
        for worker in set(multiprocessing.active_children()) - before:
            worker.kill()
        how = "see that /dev/shm can be written, or set data.workers=0"
        if error.errno in (errno.EAGAIN, errno.ENOMEM, errno.EMFILE):
            how = "lower data.workers, or raise the limits of this machine (ulimit -a)"
        raise UserError(
            f"data.workers: a data worker cannot be started ({error.strerror or error}); {how}"
        ) from error


def _shared(batch: Any) -> Any:
    """Put a batch's tensors into shared memory. Left to torch a thread of the worker does so, and what fails
    there is a batch that never comes."""
    if isinstance(batch, Failure):
        return batch
    try:
        for value in batch.values():
            if isinstance(value, torch.Tensor):
                value.share_memory_()
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        how = "make /dev/shm larger (docker run --shm-size)"
        if os.strerror(errno.EMFILE) in reason:
            how = "raise the limit of open files (ulimit -n)"
        return Failure(
            f"data.workers: a batch cannot be put into shared memory ({reason}); {how}, or lower "
            "data.workers or data.prefetch"
        )
    return batch


def _start_worker(parent: int | None, stacks: str, _: int) -> None:
    """``parent``: the training process, if its main thread starts the worker; ``stacks``: where the
    worker writes what it does when asked."""
    answer(stacks)
    # what a terminal or Slurm sends to all processes is the training process's to handle; workers end with it
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if parent is not None and os.getppid() == parent:
        signal_at_end_of_parent(signal.SIGKILL, parent)


def open_stream(
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    image_size: int,
    tokenizer: Tokenizer,
    stages: Sequence[StageConfig] = (),
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Stream:
    """The stream of one rank, at the start of epoch 0.

    ``stages``: where images and captions are smaller than ``image_size`` and the tokenizer's context.
    ``pin_memory``: workers' batches arrive in page-locked memory, from which copies to a GPU need not wait.

    Raises UserError if the data cannot be opened or has fewer samples than a global batch, stages do not
    follow one another, or there are more ranks than rows.
    """
    if global_batch_size < world_size:
        raise UserError(
            f"train.global_batch_size: {global_batch_size} leaves some of {world_size} ranks without a row"
        )
    from .plain import is_plain, open_plain  # which builds on this module

    settings: dict[str, Any] = {"seed": seed, "global_batch_size": global_batch_size}
    recipe = Recipe(
        Shapes(Shape(image_size, tokenizer.context_length), stages),
        config.augment,
        config.captions,
        config.max_pixels,
        config.on_bad,
        config.weight_key,
        rank,
        world_size,
    )
    if any(is_plain(source.data) for source in config.sources):
        return open_plain(config, tokenizer, recipe, pin_memory=pin_memory, **settings)
    sources = open_sources(config)
    notes = [line for source in sources for line in check_keys(source, config.weight_key)]
    order = make_order(config, sources, **settings)
    return Stream(sources, order, tokenizer, recipe, config, seed=seed, pin_memory=pin_memory, notes=notes)
