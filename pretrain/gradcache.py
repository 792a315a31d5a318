"""One step's forward and backward, for a whole local batch or for micro-batches with the same gradient.

A contrastive loss needs the features of all samples, but not all activations at once (GradCache: Gao, Zhang,
Han and Callan, 2021, arXiv 2101.06983):

1. features of every micro-batch, without a graph;
2. the loss over all of them, and its gradient by each feature;
3. every micro-batch once more, with a graph, through which that gradient is sent back.

The second forward draws the random numbers of the first, so dropout is the same; gradients of the logit scale
and bias come from the whole loss and are added once; only the last micro-batch's backward communicates. Batch
norms see a micro-batch in place of the batch (``inexact``), and count it once.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

# torch has no public base
from torch.nn.modules.batchnorm import _BatchNorm  # pyright: ignore[reportPrivateUsage]

__all__ = ["cut", "forward_backward", "inexact", "trains_batchnorm"]

Features = dict[str, Tensor]
PER_SAMPLE = ("image_features", "text_features")


def forward_backward(
    model: Callable[[Mapping[str, Any]], Features],
    batch: Mapping[str, Any],
    loss_of: Callable[[Features], Tensor],
    *,
    micro_batches: int = 1,
    backward: Callable[[Tensor], None] = Tensor.backward,
    no_sync: Callable[[], AbstractContextManager[None]] = nullcontext,
    part: Callable[[str], AbstractContextManager[None]] = nullcontext,
) -> Features:
    """Add the gradients of ``loss_of(model(batch))`` to the parameters'.

    model: a ``ContrastiveModel``, plain or wrapped. loss_of: the loss of the whole local batch, which may
    join other processes. backward: of the loss; it may scale it first. micro_batches: into how many the batch
    is cut, the same number on every process, at most its rows. no_sync: inside, backward passes keep
    gradients to this process. part: a context that times ``forward``, ``loss`` and ``backward``.

    Returns what the model does, with ``loss``, all detached.
    """
    if micro_batches == 1:
        with part("forward"):
            out = model(batch)
        with part("loss"):
            loss = loss_of(out)
        with part("backward"):
            backward(loss)
        return {key: value.detach() for key, value in out.items()} | {"loss": loss.detach()}
    pieces = cut(batch, micro_batches)
    with part("forward"):
        out, states = _features(model, pieces)
    with part("loss"):
        loss = loss_of(out)
        backward(loss)
    with part("backward"):
        _send_back(model, pieces, states, out, no_sync)
    return {key: value.detach() for key, value in out.items()} | {"loss": loss.detach()}


def _features(
    model: Callable[[Mapping[str, Any]], Features], pieces: Sequence[Mapping[str, Any]]
) -> tuple[Features, list[dict[str, Tensor]]]:
    """All features, as leaves of a new graph, and the random state before each micro-batch."""
    states: list[dict[str, Tensor]] = []
    outs: list[Features] = []
    modules = model.modules() if isinstance(model, nn.Module) else ()
    with torch.no_grad(), _statistics_kept([m for m in modules if isinstance(m, _BatchNorm)]):
        for piece in pieces:
            states.append(_random_state())
            outs.append(model(piece))
    whole = {key: torch.cat([out[key] for out in outs]) for key in PER_SAMPLE}
    return {key: value.detach().clone().requires_grad_() for key, value in (outs[-1] | whole).items()}, states


def _send_back(
    model: Callable[[Mapping[str, Any]], Features],
    pieces: Sequence[Mapping[str, Any]],
    states: Sequence[dict[str, Tensor]],
    out: Features,
    no_sync: Callable[[], AbstractContextManager[None]],
) -> None:
    """Each micro-batch's forward once more, and the features' gradients back through it."""
    start = 0
    for piece, state in zip(pieces, states, strict=True):
        last = piece is pieces[-1]
        rows = slice(start, start := start + len(piece["seq_lens"]))
        _set_random_state(state)
        with nullcontext() if last else no_sync():
            again = model(piece)
            gradients: list[tuple[Tensor, Tensor]] = []
            for key, value in again.items():
                whole = out[key].grad
                if whole is not None and value.requires_grad and (last or key in PER_SAMPLE):
                    gradients.append((value, whole[rows] if key in PER_SAMPLE else whole))
            if gradients:  # none where both towers are locked
                values, grads = zip(*gradients, strict=True)
                torch.autograd.backward(values, grads)


def cut(batch: Mapping[str, Any], parts: int) -> list[dict[str, Any]]:
    """A batch in ``parts`` of consecutive rows, as equal as can be; entries that are not per row go to each.

    Raises AssertionError for more parts than rows.
    """
    b = len(batch["seq_lens"])
    assert 1 <= parts <= b, f"{b} rows cannot be cut in {parts}"
    rows = [b // parts + (part < b % parts) for part in range(parts)]
    tokens = [int(lens.sum()) for lens in batch["seq_lens"].split(rows)]
    pieces: list[dict[str, Any]] = [{} for _ in rows]
    for key, value in batch.items():
        if key == "token_ids":
            values = value.split(tokens)
        elif isinstance(value, Tensor) and value.ndim and len(value) == b:
            values = value.split(rows)
        else:
            values = [value] * parts
        for piece, own in zip(pieces, values, strict=True):
            piece[key] = own
    return pieces


def inexact(model: nn.Module) -> str | None:
    """None if micro-batches give the gradient of the whole batch, else the reason why not."""
    if trains_batchnorm(model):
        return "batch norms take the statistics of a micro-batch, so gradients are not the whole batch's"
    return None


def trains_batchnorm(model: nn.Module) -> bool:
    """Whether a sample's gradient depends on the samples beside it; locked batch norms stay as they are."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    return any(own.requires_grad for norm in norms for own in norm.parameters())


@contextmanager
def _statistics_kept(norms: Sequence[_BatchNorm]) -> Generator[None]:
    """Batch norms have their running statistics back afterwards."""
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    yield
    for norm, values in zip(norms, before, strict=True):
        for buffer, value in zip(norm.buffers(), values, strict=True):
            buffer.copy_(value)


def _random_state() -> dict[str, Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()  # a copy from host memory: no wait
    return state


def _set_random_state(state: Mapping[str, Tensor]) -> None:
    torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
