"""The training loop of heads, and of whatever is trained with them.

The order of the rows comes from the seed alone. Early stopping looks at the inner rows; test rows are not
known here. Every trainable tensor must get a gradient in the first step: layers that are silently never
trained are a known defect of fusion code.

What takes long is kept after every epoch (``Keeper``), and goes on from there bit for bit. Where several
processes train one head, only the encoders' work is split (``live.LiveRows``): each holds the embeddings of
the whole batch, draws the same numbers and does the rest alike. So masks, dropout, weights, uneven last
batches and losses that compare rows are those of one process, and gradients differ by rounding alone.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from ...configs.errors import UserError
from ...pretrain import distributed
from ...pretrain.optim import clip_gradients, set_lr
from ...pretrain.schedule import ScheduleConfig, lr_at
from ..config import AdaptConfig, StoppingConfig
from ..encoders.live import LiveRows, Part, Source
from ..fusion.operators import Head
from ..tasks.task import Floats, Task, higher_is_better
from .lengths import parts_by_length

__all__ = [
    "EVAL_BATCH",
    "LIVE_EVAL_BATCH",
    "Diverged",
    "Keeper",
    "Log",
    "Tensors",
    "Training",
    "below",
    "eval_batch",
    "eval_chunks",
    "inner_score",
    "inner_scores",
    "logits_of",
]

EVAL_BATCH = 4096
LIVE_EVAL_BATCH = 256
TOKEN_EVAL_BATCH = 512  # at most: a row's tokens are hundreds of times its embedding
COUNTERS = ("epoch", "samples_seen", "best_epoch", "best_score", "best_loss")
WHOLE_ROWS = 8  # of a batch, so that modality dropout leaves some
Log = Callable[[dict[str, Any]], None]
Tensors = dict[str, Tensor]


class Keeper(Protocol):
    """Where a training is kept while it goes on."""

    def save_epoch(self, tensors: Tensors, facts: dict[str, Any]) -> None:
        """Keep this state in the place of the one before."""
        ...

    def load_epoch(self) -> tuple[Tensors, dict[str, Any]] | None:
        """The state that was kept, if there is one."""
        ...


class Diverged(UserError):
    """A training came to answers that are no finite numbers."""


@torch.no_grad()
def logits_of(head: Head, rows: Source, *, batch_size: int = EVAL_BATCH) -> Tensor:
    """Logits float32 [n, C], on the CPU, in eval mode."""
    head.eval()
    parts = [
        head(*rows.batch(chunk, tokens=head.reads_tokens)).float().cpu()
        for chunk in eval_chunks(head, len(rows), batch_size)
    ]
    return torch.cat(parts)


def eval_chunks(head: Head, rows: int, batch_size: int) -> Sequence[Tensor]:
    """Numbers of the rows that a head answers at once."""
    return torch.arange(rows).split(min(batch_size, TOKEN_EVAL_BATCH) if head.reads_tokens else batch_size)


class Training:
    """One head's training: counts epochs over all phases and remembers the best weights."""

    def __init__(
        self, head: Head, task: Task, adapt: AdaptConfig, stopping: StoppingConfig, seed: int, log: Log
    ) -> None:
        self.head, self.task, self.adapt, self.stopping, self.log = head, task, adapt, stopping, log
        self.modules: list[nn.Module] = [head]
        self.metric = task.check_metric(stopping.metric)
        self.seed, self.order = seed, torch.Generator().manual_seed(seed)
        self.note: dict[str, Any] = {}  # stands in every row of the log
        self.epoch, self.samples_seen, self.best_epoch = 0, 0, -1
        self.best_score, self.best_loss = float("-inf"), float("inf")
        self.best: list[dict[str, Tensor]] = []
        self._checked = False
        self._told: list[dict[str, Any]] = []  # rows of this phase in the log

    def epochs(
        self,
        train: Part,
        inner: Part,
        groups: list[dict[str, Any]],
        lr: float,
        epochs: int,
        batch_size: int,
        keeper: Keeper | None = None,
    ) -> None:
        """Train until the inner rows show no improvement for ``patience`` epochs, or ``epochs`` are over.

        A phase that does not beat the one before it changes nothing in the end. ``keeper`` takes the state
        after every epoch; where it has one, this phase goes on from it.
        """
        self.restore()
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        total = epochs * len(train.rows)
        warmup = round(self.adapt.warmup_fraction * total)
        schedule = ScheduleConfig(warmup_samples=warmup)
        done = seen = waited = 0
        self._checked, self._told = False, []
        if self.best:
            self.best_loss = float("-inf")  # what an earlier phase made is beaten by its score alone
        if keeper is not None and (kept := keeper.load_epoch()) is not None:
            done, seen, waited = self._load(*kept, optimizer)
        while done < epochs and waited < self.stopping.patience:
            losses: list[float] = []
            self.head.train()
            for rows in self._order(train, batch_size):
                rate = lr_at(schedule, lr, samples_seen=seen, total_samples=total, batch=len(rows))
                set_lr(optimizer, rate)
                losses.append(self._step(train, rows, optimizer))
                seen += len(rows)
                self.samples_seen += len(rows)
            try:
                better = self._judge(inner, sum(losses) / len(losses), optimizer)
            except Diverged as error:
                if not self.best:
                    raise Diverged(f"{error} with lr {lr:g}; set a smaller adapt.lr") from error
                break
            waited = 0 if better else waited + 1
            done += 1
            if keeper is not None:
                keeper.save_epoch(*self._state(optimizer, done, seen, waited))

    def _order(self, train: Part, batch_size: int) -> Iterator[Tensor]:
        """Rows in a new order, or drawn with replacement so that classes come up equally often; a last batch
        of one row joins the one before it."""
        if self.adapt.sampling == "balanced":
            classes = train.targets.cpu()
            chance = 1 / torch.bincount(classes)[classes].double()
            order = torch.multinomial(chance, len(chance), replacement=True, generator=self.order)
        else:
            order = torch.randperm(len(train.rows), generator=self.order)
        chunks = list(order.split(batch_size))
        if len(chunks) > 1 and len(chunks[-1]) == 1:
            chunks[-2:] = [torch.cat(chunks[-2:])]
        return iter(chunks)

    def _step(self, train: Part, rows: Tensor, optimizer: torch.optim.Optimizer) -> float:
        features, present = train.rows.batch(rows, tokens=self.head.reads_tokens)
        targets = train.targets[rows].to(next(iter(present.values())).device)
        weights = None if train.weights is None else train.weights[rows].to(targets.device)
        loss = self.loss(features, present, targets, weights)
        optimizer.zero_grad()
        loss.backward()
        if isinstance(train.rows, LiveRows) and train.rows.together:
            heads = {id(p) for p in self.head.parameters()}
            trained = [p for g in optimizer.param_groups for p in g["params"]]
            split = [p for p in trained if id(p) not in heads]
            distributed.sum_gradients(split, [p for p in trained if id(p) in heads])
        if not self._checked:
            self._assert_gradients(present)
        clip_gradients([p for g in optimizer.param_groups for p in g["params"]], self.adapt.clip_grad_norm)
        optimizer.step()
        return float(loss.detach())

    def loss(
        self,
        features: dict[str, Tensor],
        present: dict[str, Tensor],
        targets: Tensor,
        weights: Tensor | None = None,
    ) -> Tensor:
        """Loss of a batch: the sum over the head's parts, each over the rows that count for it."""
        present = self._drop(present)
        losses = [
            self.task.loss(
                logits[counts],
                targets[counts],
                self.adapt.label_smoothing,
                None if weights is None else weights[counts],
            )
            for logits, counts in parts_by_length(self.head, features, present)
            if bool(counts.any())
        ]
        return torch.stack(losses).sum()

    def _drop(self, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Modality dropout: of rows that have several modalities, one is taken away at random; of more than
        two, each other one with probability 1/2, as any may be missing together."""
        mask = torch.stack(list(present.values()), dim=1)
        rows, count = mask.shape
        if count < 2 or self.adapt.modality_dropout == 0:
            return present
        chosen = torch.rand(rows) < self.adapt.modality_dropout
        which = torch.randint(count, (rows,))
        hit = one_hot(which, count).bool()
        if count > 2:
            kept = (which + torch.randint(1, count, (rows,))) % count
            hit |= (torch.rand(rows, count) < 0.5) & ~one_hot(kept, count).bool()
        left = mask & ~(hit & chosen[:, None]).to(mask.device)
        mask = torch.where(left.any(1, keepdim=True), left, mask)  # never all
        return dict(zip(present, mask.unbind(1), strict=True))

    def _assert_gradients(self, present: dict[str, Tensor]) -> None:
        """In the first batch with several whole rows: one without pictures trains nothing that reads them."""
        whole = torch.stack([present[k] for k in self.head.modalities], dim=1).all(1)
        if int(whole.sum()) < min(WHOLE_ROWS, len(whole)):
            return
        self._checked = True
        for module in self.modules:
            for name, parameter in module.named_parameters():
                assert not parameter.requires_grad or parameter.grad is not None, (
                    f"{type(module).__name__}.{name} gets no gradient: it would never be trained"
                )

    def _judge(self, inner: Part, loss: float, optimizer: torch.optim.Optimizer) -> bool:
        """Score the inner rows, log, and keep the weights if they are the best so far."""
        score, scores = self.score(inner)
        better = score > self.best_score + (self.stopping.min_delta if self.best else 0.0)
        # while one class alone is predicted, an accuracy or a kappa stands still and only the loss tells
        better |= score == self.best_score and scores["loss"] < self.best_loss
        row = {"epoch": self.epoch, "samples_seen": self.samples_seen, "loss": loss}
        row |= (
            {"lr": optimizer.param_groups[0]["lr"]} | self.note | {f"inner_{k}": v for k, v in scores.items()}
        )
        self.log(row)
        self._told.append(row)
        if better or not self.best:
            self.best_score, self.best_loss, self.best_epoch = score, scores["loss"], self.epoch
            self.best = [copy.deepcopy(m.state_dict()) for m in self.modules]
        self.epoch += 1
        return better

    def score(self, inner: Part) -> tuple[float, dict[str, float]]:
        """As ``inner_score``, by the metric of early stopping."""
        return inner_score(self.task, self.metric, self.head, inner)

    def also(self, module: nn.Module) -> None:
        """Another module is trained from now on; until then it belongs to the best weights as it is."""
        self.restore()
        self.modules.append(module)
        if self.best:
            self.best.append(copy.deepcopy(module.state_dict()))

    def count_on(self, earlier: "Training") -> None:
        """Number epochs and samples behind those of an earlier training."""
        self.epoch, self.samples_seen, self.best_epoch = (
            earlier.epoch,
            earlier.samples_seen,
            earlier.best_epoch,
        )

    def begin_with_best(self, inner: Part) -> None:
        """Take the weights as they are for the best so far."""
        self.best_score = self.score(inner)[0]
        self.best = [copy.deepcopy(m.state_dict()) for m in self.modules]

    def _state(
        self, optimizer: torch.optim.Optimizer, done: int, seen: int, waited: int
    ) -> tuple[Tensors, dict[str, Any]]:
        """What changes while a phase goes on: weights, the best ones, moments, random states, counters."""
        tensors: Tensors = {"random/cpu": torch.get_rng_state(), "random/order": self.order.get_state()}
        if torch.cuda.is_initialized():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        for i, module in enumerate(self.modules):
            tensors |= {f"now/{i}/{name}": value for name, value in module.state_dict().items()}
            tensors |= {f"best/{i}/{name}": value for name, value in self.best[i].items()}
        moments: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
        tensors |= {f"optimizer/{i}/{k}": v for i, entry in moments.items() for k, v in entry.items()}
        facts = {name: getattr(self, name) for name in COUNTERS}
        return tensors, facts | {"done": done, "seen": seen, "waited": waited, "told": self._told}

    def _load(
        self, tensors: Tensors, facts: dict[str, Any], optimizer: torch.optim.Optimizer
    ) -> tuple[int, int, int]:
        """Take back what ``_state`` gave, log the epochs again, and return how far the phase has come."""
        for i, module in enumerate(self.modules):
            module.load_state_dict(below(tensors, f"now/{i}/"))
        self.best = [below(tensors, f"best/{i}/") for i in range(len(self.modules))]
        moments: dict[int, dict[str, Tensor]] = {}
        for name, value in below(tensors, "optimizer/").items():
            number, _, kind = name.partition("/")
            moments.setdefault(int(number), {})[kind] = value
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
        torch.set_rng_state(tensors["random/cpu"])
        self.order.set_state(tensors["random/order"])
        if "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"])
        for name in COUNTERS:
            setattr(self, name, facts[name])
        for row in facts["told"]:
            self.log(row)
            self._told.append(row)
        return facts["done"], facts["seen"], facts["waited"]

    def restore(self) -> None:
        """Put the best weights back."""
        for module, state in zip(self.modules, self.best, strict=False):
            module.load_state_dict(state)


def below(tensors: Tensors, prefix: str) -> Tensors:
    """The tensors whose names begin so, without that."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def eval_batch(rows: Source) -> int:
    """Rows scored at once: fewer where encoders work for them."""
    return LIVE_EVAL_BATCH if isinstance(rows, LiveRows) else EVAL_BATCH


def inner_score(task: Task, metric: str, head: Head, inner: Part) -> tuple[float, dict[str, float]]:
    """How good a head is on the inner rows by a metric, more being better, and all its scores there. Raises
    Diverged for answers that are no finite numbers."""
    p = task.probabilities(logits_of(head, inner.rows, batch_size=eval_batch(inner.rows)))
    if not np.isfinite(p).all():
        raise Diverged("training came to no finite answers")
    scores = inner_scores(task, inner.targets, p)
    return (scores[metric] if higher_is_better(metric) else -scores[metric]), scores


def inner_scores(task: Task, targets: Tensor, p: Floats) -> dict[str, float]:
    """Loss and all metrics of inner rows; an undefined metric counts as 0."""
    numbers = targets.cpu().numpy()
    values = {name: task.value(name, numbers, p) for name in task.metrics}
    return {"loss": task.log_loss(numbers, p)} | {k: v if v == v else 0.0 for k, v in values.items()}
