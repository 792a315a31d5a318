"""Speed of a run between two logs, without the time for evaluating and saving, and who is slow in it."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from . import distributed
from .flops import Costs
from .memory import host_memory
from .peaks import peak_flops

__all__ = ["Clock"]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Clock:
    """Counts what this process has done since the last row.

    On a GPU the parts of a step are timed by events on its stream, which nothing waits for but ``row``.
    """

    def __init__(
        self,
        samples_seen: int,
        *,
        device: str | torch.device = "cpu",
        costs: Costs | None = None,
        precision: str = "fp32",
    ) -> None:
        """``samples_seen``: global samples before the first step. ``costs`` adds rates of arithmetic to the
        rows; ``precision`` (fp32, bf16 or fp16) says which of the device's peaks they are held against."""
        self.device, self.costs = torch.device(device), costs
        self.peak = peak_flops(self.device, DTYPES[precision]) if costs is not None else None
        self._reset(samples_seen)

    def _reset(self, samples_seen: int) -> None:
        self._start = time.perf_counter()
        self._samples_seen = samples_seen
        self._steps = self._samples = self._tokens = self._cut = self._patches = 0
        self._paused = self._waited = self._computed = self._needed = self._dense = 0.0
        self._parts: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def paused(self) -> Generator[None]:
        """Time inside is not counted."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Generator[None]:
        """Time inside is time spent waiting for data."""
        start = time.perf_counter()
        yield
        self._waited += time.perf_counter() - start

    @contextmanager
    def part(self, name: str) -> Generator[None]:
        """Time inside belongs to this part of the step: ``forward``, ``backward``, ``optimizer`` .."""
        if self.device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((name, begin, end))
        else:
            start = time.perf_counter()
            yield
            self._parts[name] = self._parts.get(name, 0.0) + time.perf_counter() - start

    def count(self, batch: Mapping[str, Any], *, recomputed: bool = False) -> None:
        """One step over this local batch is done; ``recomputed`` where its forward ran twice (gradient cache,
        activation checkpointing)."""
        self._steps += 1
        self._samples += len(batch["seq_lens"])
        self._tokens += len(batch["token_ids"])
        self._cut += batch["cut_captions"]
        if self.costs is not None:
            work = self.costs.step(batch, recomputed=recomputed)
            self._patches += work.patches
            self._computed += work.computed
            self._needed += work.needed
            self._dense += work.dense

    def row(self, samples_seen: int, world_size: int) -> dict[str, float]:
        """Speeds since the last call, and a fresh start.

        ``samples_per_s`` is the whole run's, all else is per device or this process's: seconds per step, the
        share of them spent waiting for data, real tokens per caption, the share of captions that were longer
        than the context, tokens and (kept) patches per second, and the share of each part of the step
        (``share_forward``). With costs: ``tflops_computed`` and ``tflops_dense``, 10^12 FLOP per second
        really computed and those that a padded, uncut step would take, and, where the device's peak is
        known, ``mfu``, the share of it that goes into what is needed once.

        All processes call it at once: ``host_memory_gib`` is the largest one's. With several of them
        ``rank_s_min``, ``rank_s_median`` and ``rank_s_max`` are over the processes, the seconds per step in
        which one waits for no other (data, forward, update; with FSDP the last two only nearly so),
        ``slowest_rank`` is whose they are most, and ``data_wait_fraction_max`` is the largest of them.
        """
        self._settle()
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        speed = (samples_seen - self._samples_seen) / seconds
        row = {
            "samples_per_s": speed,
            "samples_per_s_per_device": speed / world_size,
            "step_s": seconds / max(1, self._steps),
            "data_wait_fraction": self._waited / seconds,
            "tokens_per_sample": self._tokens / max(1, self._samples),
            "cut_captions_fraction": self._cut / max(1, self._samples),
            "tokens_per_s": self._tokens / seconds,
        }
        if self.costs is not None:
            row["tflops_computed"] = self._computed / seconds / 1e12
            row["tflops_dense"] = self._dense / seconds / 1e12
        if self._patches:
            row["patches_per_s"] = self._patches / seconds
        if self.peak is not None:
            row["mfu"] = self._needed / seconds / self.peak
        row |= {f"share_{name}": part / seconds for name, part in self._parts.items()}
        row |= self._ranks(seconds)
        self._reset(samples_seen)
        return {key: float(f"{value:.5g}") for key, value in row.items()}

    def _ranks(self, seconds: float) -> dict[str, float]:
        """What the processes differ in, by one exchange of three numbers."""
        own = self._waited + self._parts.get("forward", 0.0) + self._parts.get("update", 0.0)
        mine = [own / max(1, self._steps), self._waited / seconds, host_memory()]
        everyone = distributed.stack(torch.tensor(mine, dtype=torch.float64))
        row = {"host_memory_gib": everyone[:, 2].max().item()}
        if len(everyone) > 1:
            times = everyone[:, 0]
            row |= {"rank_s_min": times.min().item(), "rank_s_median": times.median().item()}
            row |= {"rank_s_max": times.max().item(), "slowest_rank": int(times.argmax())}
            row["data_wait_fraction_max"] = everyone[:, 1].max().item()
        return row

    def _settle(self) -> None:
        """Read the events, once the last of them has happened."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, begin, end in self._events:
            self._parts[name] = self._parts.get(name, 0.0) + begin.elapsed_time(end) / 1e3
