"""The training loader and the evaluation loader.

``Stream`` yields one rank's batches, endlessly over epochs, in an order that is the same for any number of
ranks and workers (``order``), and goes on from any step (docs/stream.md). Workers are plain torch DataLoader
processes: the loader keeps their batches in order, so the place in the order is all there is to store.
"""

import logging
import signal
import threading
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.utils.data import DataLoader

from ..configs.errors import UserError
from ..configs.files import resolve_data_path
from ..configs.load import StrictModel
from .augment import AugmentConfig
from .batches import Batch, BatchMaker, Failure, Recipe, decode_sample, read_retrying
from .captions import CaptionConfig
from .decode import Interpolation, ResizeMode, eval_image
from .image_header import MAX_PIXELS
from .order import Order, Steps
from .shards import DamagedSample, RawSample, ShardSet, open_shards
from .text import Tokenizer

__all__ = ["CaptionConfig", "DataConfig", "EvalBatch", "Stream", "eval_batches", "open_stream"]

log = logging.getLogger(__name__)


class DataConfig(StrictModel):
    """What is trained on and how it is read."""

    train: str
    """Folder of shards, or corpus:NAME/SPLIT for a corpus that Diptych fetched."""
    captions: CaptionConfig = CaptionConfig()
    augment: AugmentConfig = AugmentConfig()
    workers: int = Field(default=0, ge=0)
    """Processes per rank that decode; 0 decodes in the training process. The order does not depend on it."""
    prefetch: int = Field(default=2, ge=1)
    """Batches that each worker has ready."""
    start_method: Literal["fork", "spawn", "forkserver"] | None = None
    """How workers start; null for the platform's default."""
    lanes: int | None = Field(default=None, ge=1)
    """Lanes of the order; must divide the global batch. Null takes 1 for up to 262,144 samples, else up to
    one for every eight shards. Stored with the run: a resumed one keeps its own."""
    window: int | None = Field(default=None, ge=1)
    """Samples of a lane that are shuffled among each other. Null takes four shards' worth and at least
    262,144 over all lanes, so that small data is shuffled as a whole. Stored with the run, too."""
    max_pixels: int = Field(default=MAX_PIXELS, ge=1)
    """Images with more pixels count as damaged and are not decoded."""
    on_bad: Literal["mask", "raise"] = "mask"
    """What a damaged sample does: its row is masked out of the loss, or the run stops."""
    max_bad_fraction: float = Field(default=0.001, ge=0, le=1)
    """Distinct damaged samples, as a fraction of those seen, past which a run stops; see ``bad_allowed``."""

    def bad_allowed(self, samples_seen: int, num_samples: int) -> int:
        """How many distinct samples may be damaged after ``samples_seen`` of a set of ``num_samples``.

        The fraction of the distinct samples seen, plus three standard deviations and one sample, so that
        neither chance nor a single sample of a tiny set stops a run. None at all for a fraction of 0.
        """
        mean = self.max_bad_fraction * min(samples_seen, num_samples)
        return int(1 + mean + 3 * mean**0.5) if self.max_bad_fraction else 0


class Stream(Iterator[Batch]):
    """One rank's batches, endlessly over epochs; made by ``open_stream``.

    Each batch is a dict of b rows: ``image`` uint8 [b, 3, S, S], ``token_ids`` int32 [sum(seq_lens)],
    ``seq_lens`` int32 [b], ``valid`` bool [b], ``sample_id`` int64 [b], ``source`` int16 [b],
    ``caption_hash`` int64 [b], ``epoch`` and ``step`` (of the epoch) int, and ``bad``, a list of
    ``{shard, key, reason, sample_id, epoch, step}``. Iterating raises UserError if data cannot be read.
    """

    def __init__(
        self,
        shards: ShardSet,
        order: Order,
        tokenizer: Tokenizer,
        recipe: Recipe,
        config: DataConfig,
        *,
        pin_memory: bool = False,
    ) -> None:
        self._shards, self._order, self._tokenizer = shards, order, tokenizer
        self._recipe, self._config = recipe, config
        self._pin_memory = pin_memory
        self._epoch = self._step = 0
        self._batches: Iterator[Batch | Failure] | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches in an epoch, the same on all ranks."""
        return self._order.steps_per_epoch

    @property
    def num_samples(self) -> int:
        """Usable samples in the data."""
        return self._order.num_samples

    @property
    def order(self) -> Order:
        """The order of samples."""
        return self._order

    def __next__(self) -> Batch:
        if self._batches is None:
            self._batches = self._start()
        try:
            batch = next(self._batches)
        except Exception as error:
            if (code := _dead_worker(self._batches)) is None:
                raise
            self.close()
            raise UserError(
                f"a data worker died (exit code {code}); give the machine more memory or shared memory "
                "(/dev/shm), or lower data.workers or data.prefetch"
            ) from error
        if isinstance(batch, Failure):
            self.close()
            raise UserError(batch.message)
        self._epoch, self._step = batch["epoch"], batch["step"] + 1
        if self._step == self.steps_per_epoch:
            self._epoch, self._step = self._epoch + 1, 0
        return batch

    def _start(self) -> Iterator[Batch | Failure]:
        maker = BatchMaker(self._shards, self._order, self._tokenizer, self._recipe)
        steps: Any = Steps(self._epoch, self._step, self.steps_per_epoch)
        if self._config.workers == 0:
            return map(maker.__getitem__, steps)
        # torch would raise a worker's death wherever the training process is at that moment, which may be in
        # the middle of a checkpoint or a collective; the loader itself notices, too, when a batch is due
        handler = signal.getsignal(signal.SIGCHLD)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # more than cores: meant
            loader = DataLoader(
                maker,
                batch_size=None,  # an item is a whole batch
                sampler=steps,
                num_workers=self._config.workers,
                prefetch_factor=self._config.prefetch,
                multiprocessing_context=self._config.start_method,
                collate_fn=_unchanged,
                worker_init_fn=_start_worker,
                pin_memory=self._pin_memory,
            )
            batches = iter(loader)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler if handler is not None else signal.SIG_DFL)
        return batches

    def state_dict(self) -> dict[str, Any]:
        """The place after the last batch that was yielded, as JSON; batches made ahead do not count. It is
        the same on all ranks."""
        order = self._order
        return {
            "epoch": self._epoch,
            "step": self._step,
            "seed": order.seed,
            "global_batch_size": order.global_batch_size,
            "lanes": order.lanes,
            "window": order.window,
            "fingerprint": self._shards.fingerprint,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, of any number of ranks and workers. Lanes and window are the state's.

        Raises UserError if data, seed or global batch size are not those of the state, which would not see
        the rest of its epoch.
        """
        mine = self.state_dict()
        told = {
            "fingerprint": "data.train: the data is not that of the checkpoint; give the same shards",
            "seed": f"seed: {mine['seed']} is not the checkpoint's {state['seed']}; set it back",
            "global_batch_size": f"global_batch_size: {mine['global_batch_size']} is not the checkpoint's "
            f"{state['global_batch_size']}; set it back",
        }
        for key, message in told.items():
            if state[key] != mine[key]:
                raise UserError(f"{message}, or start a new run from its weights")
        self.close()
        self._order = Order(
            self._shards.shard_sizes,
            seed=state["seed"],
            global_batch_size=state["global_batch_size"],
            lanes=state["lanes"],
            window=state["window"],
        )
        self._epoch, self._step = state["epoch"], state["step"]

    def close(self) -> None:
        """Stop the workers. The stream may go on afterwards, with new ones, from where it is."""
        batches, self._batches = self._batches, None
        shutdown = getattr(batches, "_shutdown_workers", None)
        if shutdown is not None:
            shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _dead_worker(batches: Any) -> int | None:
    """The exit code of a worker that has ended, None if all run. One that is dying is waited for."""
    workers: list[Any] = getattr(batches, "_workers", [])
    for patience in (0.0, 0.2):
        for worker in workers:
            worker.join(patience)
            if worker.exitcode is not None:
                return int(worker.exitcode)
    return None


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    # Ctrl-C is the training process's to handle; workers follow when it ends
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def open_stream(
    config: DataConfig,
    *,
    seed: int,
    global_batch_size: int,
    image_size: int,
    tokenizer: Tokenizer,
    rank: int = 0,
    world_size: int = 1,
    pin_memory: bool = False,
) -> Stream:
    """The stream of one rank, at the start of epoch 0.

    ``pin_memory``: workers' batches arrive in page-locked memory, from which copies to a GPU need not wait.

    Raises UserError if the data cannot be opened, has fewer samples than a global batch, or there are more
    ranks than rows.
    """
    if global_batch_size < world_size:
        raise UserError(
            f"global_batch_size: {global_batch_size} leaves some of {world_size} ranks without a row"
        )
    shards = open_shards(resolve_data_path(config.train))
    order = Order(
        shards.shard_sizes,
        seed=seed,
        global_batch_size=global_batch_size,
        lanes=config.lanes,
        window=config.window,
    )
    recipe = Recipe(
        image_size, config.augment, config.captions, config.max_pixels, config.on_bad, rank, world_size
    )
    return Stream(shards, order, tokenizer, recipe, config, pin_memory=pin_memory)


@dataclass
class EvalBatch:
    """Some samples as evaluation sees them: image uint8 [b, 3, S, S], captions and metas as stored, keys,
    sample_ids int64 [b]."""

    image: Tensor
    captions: list[str]
    metas: list[dict[str, Any]]
    keys: list[str]
    sample_ids: NDArray[np.int64]


def eval_batches(
    shards: ShardSet,
    *,
    image_size: int,
    batch_size: int = 256,
    sample_ids: Any = None,
    resize_mode: ResizeMode = "shortest",
    interpolation: Interpolation = "bicubic",
    fill_color: int = 0,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[EvalBatch]:
    """All samples of a shard set in order, or those of ``sample_ids`` (integers [n]), for evaluation.

    Damaged samples are left out; one warning at the end names them. Raises UserError if a file cannot be
    read.
    """
    ids = np.arange(len(shards)) if sample_ids is None else np.asarray(sample_ids, dtype=np.int64)
    damaged: list[str] = []
    for start in range(0, len(ids), batch_size):
        samples: list[RawSample] = []
        images: list[Tensor] = []
        for sample_id in ids[start : start + batch_size].tolist():
            try:
                raw, shards = read_retrying(shards, sample_id)
                image = decode_sample(raw, max_pixels=max_pixels)
            except DamagedSample as error:
                damaged.append(f"{error.shard}: {error.key} ({error.reason})")
                continue
            images.append(
                eval_image(
                    image,
                    image_size,
                    resize_mode=resize_mode,
                    interpolation=interpolation,
                    fill_color=fill_color,
                )
            )
            samples.append(raw)
        if samples:
            yield EvalBatch(
                torch.stack(images),
                [raw.caption for raw in samples],
                [raw.meta for raw in samples],
                [raw.key for raw in samples],
                np.array([raw.sample_id for raw in samples], dtype=np.int64),
            )
    if damaged:
        names = ", ".join(damaged[:20]) + (", ..." if len(damaged) > 20 else "")
        log.warning("%s: %d damaged samples left out: %s", shards.folder, len(damaged), names)
