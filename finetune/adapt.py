"""Training a head on frozen features, and with ``lp_ft`` the encoders after it.

One seed gives the initial weights, the order of the rows and the dropout. Early stopping looks at the inner
rows alone; test rows are not known here. Every trainable tensor must get a gradient in the first step: layers
that are silently never trained are a known defect of fusion code.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..pretrain.model import LoadedModel
from ..pretrain.optim import clip_gradients, decays, set_lr
from ..pretrain.schedule import ScheduleConfig, lr_at
from .cells import Picture, PictureReader
from .config import AdaptConfig, HeadConfig, StoppingConfig
from .encoding import read_pixels
from .fusion import Head, build_head
from .tasks import Floats, Task, calibrate, higher_is_better, log_loss, metric_value

__all__ = ["Fitted", "LiveRows", "Part", "Source", "fit", "logits_of"]

EVAL_BATCH = 4096
LIVE_EVAL_BATCH = 256
Log = Callable[[dict[str, Any]], None]


class Source(Protocol):
    """Where heads get features of rows from: tables (``FeatureRows``) or encoders at work (``LiveRows``)."""

    def __len__(self) -> int: ...

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Features and presence of some rows."""
        ...


@dataclass(frozen=True)
class Part:
    """Rows with class numbers int64 [n]."""

    rows: Source
    targets: Tensor


@dataclass(frozen=True)
class LiveRows:
    """Rows whose features are computed when they are asked for, with gradients where those are enabled."""

    model: LoadedModel
    images: Sequence[Picture | None]
    texts: Sequence[str | None]
    modalities: tuple[str, ...]
    max_pixels: int
    reader: PictureReader

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, rows: Tensor, *, tokens: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Embeddings of the rows; zeros where a modality is missing."""
        assert not tokens, "token features are not computed with gradients"
        numbers, root = rows.tolist(), self.model.model
        features: dict[str, Tensor] = {}
        present: dict[str, Tensor] = {}
        for k in self.modalities:
            items: Sequence[Any] = [(self.images if k == "image" else self.texts)[i] for i in numbers]
            there = torch.tensor([item is not None for item in items], dtype=torch.bool)
            out = torch.zeros(len(items), self.model.embed_dim, device=self.model.device)
            given = [item for item in items if item is not None]
            if given and k == "image":
                pixels, broken = read_pixels(self.model, given, self.reader, self.max_pixels)
                assert not any(broken), f"a picture changed while it was trained on: {broken}"
                out = out.index_put((there.nonzero()[:, 0].to(out.device),), root.encode_image(pixels))
            elif given:
                encoded = root.encode_text(*self.model.tokenizer.pack(given))
                out = out.index_put((there.nonzero()[:, 0].to(out.device),), encoded)
            features[k], present[k] = out, there.to(out.device)
        return features, present


@dataclass(frozen=True)
class Fitted:
    """A trained head, its own encoders if they were trained too, and the calibration ``scale * logits +
    shift``."""

    head: Head
    model: LoadedModel | None
    scale: float
    shift: float
    best_epoch: int


@torch.no_grad()
def logits_of(head: Head, rows: Source, *, batch_size: int = EVAL_BATCH) -> Tensor:
    """Logits float32 [n, C], on the CPU, in eval mode."""
    head.eval()
    parts = [
        head(*rows.batch(chunk, tokens=head.reads_tokens)).float().cpu()
        for chunk in torch.arange(len(rows)).split(batch_size)
    ]
    return torch.cat(parts)


def fit(
    config: HeadConfig,
    adapt: AdaptConfig,
    stopping: StoppingConfig,
    task: Task,
    train: Part,
    inner: Part,
    *,
    widths: dict[str, int],
    token_widths: dict[str, int] | None = None,
    seed: int,
    calibration: str = "none",
    live: tuple[LiveRows, LiveRows] | None = None,
    device: torch.device | None = None,
    log: Log = lambda row: None,
) -> Fitted:
    """Train one head with one seed and keep the weights of its best epoch on the inner rows.

    ``live``: the training and inner rows with a model that may be changed, for ``lp_ft``. ``log`` gets one
    row per epoch: ``epoch``, ``samples_seen``, ``loss``, ``lr``, ``inner_loss`` and ``inner_<metric>``.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        head = build_head(config, widths, task.outputs, token_widths).to(device)
        features, present = train.rows.batch(torch.arange(len(train.rows)), tokens=head.reads_tokens)
        head.fit_standard(features, present)
        del features, present
        run = _Run(head, task, adapt, stopping, seed, log)
        run.epochs(train, inner, _groups(head, adapt), adapt.lr, adapt.epochs, adapt.batch_size)
        rows, model = inner.rows, None
        if adapt.method == "lp_ft":
            assert live is not None
            model, rows = live[0].model, live[1]
            _open_encoders(model, head)
            groups = _groups(head, adapt) + _encoder_groups(model, adapt)
            run.also(model.clip)
            parts = Part(live[0], train.targets), Part(live[1], inner.targets)
            run.epochs(*parts, groups, adapt.lr, adapt.encoder_epochs, adapt.encoder_batch_size)
        run.restore()
        size = EVAL_BATCH if model is None else LIVE_EVAL_BATCH
        scale, shift = calibrate(
            task, logits_of(head, rows, batch_size=size), inner.targets.cpu(), calibration
        )
    return Fitted(head, model, scale, shift, run.best_epoch)


def _open_encoders(model: LoadedModel, head: Head) -> None:
    """Let the towers that the head reads be trained. They stay in eval mode: batch norms keep their
    statistics."""
    towers = {"image": model.clip.visual, "text": model.clip.text}
    for parameter in model.clip.parameters():
        parameter.requires_grad_(False)
    for k in head.modalities:
        for parameter in towers[k].parameters():
            parameter.requires_grad_(True)


def _groups(head: nn.Module, adapt: AdaptConfig) -> list[dict[str, Any]]:
    named = [(n, p) for n, p in head.named_parameters() if p.requires_grad]
    return [
        {
            "params": [p for n, p in named if decays(n, p)],
            "weight_decay": adapt.weight_decay,
            "lr_scale": 1.0,
        },
        {"params": [p for n, p in named if not decays(n, p)], "weight_decay": 0.0, "lr_scale": 1.0},
    ]


def _encoder_groups(model: LoadedModel, adapt: AdaptConfig) -> list[dict[str, Any]]:
    groups = _groups(model.clip, adapt)
    return [group | {"lr_scale": adapt.encoder_lr / adapt.lr} for group in groups]


class _Run:
    """One head's training: counts epochs over all phases and remembers the best weights."""

    def __init__(
        self, head: Head, task: Task, adapt: AdaptConfig, stopping: StoppingConfig, seed: int, log: Log
    ) -> None:
        self.head, self.task, self.adapt, self.stopping, self.log = head, task, adapt, stopping, log
        self.modules: list[nn.Module] = [head]
        self.metric = task.check_metric(stopping.metric)
        self.order = torch.Generator().manual_seed(seed)
        self.epoch, self.samples_seen, self.best_epoch = 0, 0, -1
        self.best_score = float("-inf")
        self.best: list[dict[str, Tensor]] = []

    def epochs(
        self,
        train: Part,
        inner: Part,
        groups: list[dict[str, Any]],
        lr: float,
        epochs: int,
        batch_size: int,
    ) -> None:
        """Train until the inner rows show no improvement for ``patience`` epochs, or ``epochs`` are over.

        A phase that does not beat the one before it changes nothing in the end.
        """
        self.restore()
        optimizer = torch.optim.AdamW(groups, lr=lr, fused=True)
        total = epochs * len(train.rows)
        warmup = round(self.adapt.warmup_fraction * total)
        schedule = ScheduleConfig(warmup_samples=warmup)
        seen = waited = 0
        for epoch in range(epochs):
            losses: list[float] = []
            self.head.train()
            for rows in self._order(len(train.rows), batch_size):
                rate = lr_at(schedule, lr, samples_seen=seen, total_samples=total, batch=len(rows))
                set_lr(optimizer, rate)
                losses.append(self._step(train, rows, optimizer, check=epoch == 0 and seen == 0))
                seen += len(rows)
                self.samples_seen += len(rows)
            waited = 0 if self._judge(inner, sum(losses) / len(losses), optimizer) else waited + 1
            if waited >= self.stopping.patience:
                break

    def _order(self, n: int, batch_size: int) -> Iterator[Tensor]:
        """Rows in a new order; a last batch of one row joins the one before it."""
        chunks = list(torch.randperm(n, generator=self.order).split(batch_size))
        if len(chunks) > 1 and len(chunks[-1]) == 1:
            chunks[-2:] = [torch.cat(chunks[-2:])]
        return iter(chunks)

    def _step(self, train: Part, rows: Tensor, optimizer: torch.optim.Optimizer, *, check: bool) -> float:
        features, present = train.rows.batch(rows, tokens=self.head.reads_tokens)
        present = self._drop(present)
        targets = train.targets[rows].to(next(iter(present.values())).device)
        losses = [
            self.task.loss(logits[counts], targets[counts], self.adapt.label_smoothing)
            for logits, counts in self.head.parts(features, present)
            if bool(counts.any())
        ]
        loss = torch.stack(losses).sum()
        optimizer.zero_grad()
        loss.backward()
        if check:
            self._assert_gradients()
        clip_gradients([p for g in optimizer.param_groups for p in g["params"]], self.adapt.clip_grad_norm)
        optimizer.step()
        return float(loss.detach())

    def _drop(self, present: dict[str, Tensor]) -> dict[str, Tensor]:
        """Modality dropout: of rows that have several modalities, one is taken away at random."""
        mask = torch.stack(list(present.values()), dim=1)
        if mask.shape[1] < 2 or self.adapt.modality_dropout == 0:
            return present
        chosen = torch.rand(len(mask)) < self.adapt.modality_dropout
        which = torch.randint(mask.shape[1], (len(mask),))
        hit = torch.nn.functional.one_hot(which, mask.shape[1]).bool() & chosen[:, None]
        mask = mask & ~(hit.to(mask.device) & mask.all(1)[:, None])
        return dict(zip(present, mask.unbind(1), strict=True))

    def _assert_gradients(self) -> None:
        for module in self.modules:
            for name, parameter in module.named_parameters():
                assert not parameter.requires_grad or parameter.grad is not None, (
                    f"{type(module).__name__}.{name} gets no gradient: it would never be trained"
                )

    def _judge(self, inner: Part, loss: float, optimizer: torch.optim.Optimizer) -> bool:
        """Score the inner rows, log, and keep the weights if they are the best so far."""
        size = EVAL_BATCH if len(self.modules) == 1 else LIVE_EVAL_BATCH
        p = self.task.probabilities(logits_of(self.head, inner.rows, batch_size=size))
        scores = inner_scores(self.task, inner.targets, p)
        score = scores[self.metric] if higher_is_better(self.metric) else -scores[self.metric]
        better = score > self.best_score + (self.stopping.min_delta if self.best else 0.0)
        row = {"epoch": self.epoch, "samples_seen": self.samples_seen, "loss": loss}
        row |= {"lr": optimizer.param_groups[0]["lr"]} | {f"inner_{k}": v for k, v in scores.items()}
        self.log(row)
        if better or not self.best:
            self.best_score, self.best_epoch = score, self.epoch
            self.best = [copy.deepcopy(m.state_dict()) for m in self.modules]
        self.epoch += 1
        return better

    def also(self, module: nn.Module) -> None:
        """Another module is trained from now on; until then it belongs to the best weights as it is."""
        self.restore()
        self.modules.append(module)
        self.best.append(copy.deepcopy(module.state_dict()))

    def restore(self) -> None:
        """Put the best weights back."""
        for module, state in zip(self.modules, self.best, strict=False):
            module.load_state_dict(state)


def inner_scores(task: Task, targets: Tensor, p: Floats) -> dict[str, float]:
    """Loss and all metrics of inner rows; an undefined metric counts as 0."""
    numbers = targets.cpu().numpy()
    values = {name: metric_value(name, numbers, p) for name in task.metrics}
    return {"loss": log_loss(numbers, p)} | {k: v if v == v else 0.0 for k, v in values.items()}
