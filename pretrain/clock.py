"""Speed of a run between two logs, without the time for evaluating and saving."""

import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

__all__ = ["Clock"]


class Clock:
    """Counts what this process has done since the last row."""

    def __init__(self, samples_seen: int) -> None:
        """``samples_seen``: global samples before the first step."""
        self._reset(samples_seen)

    def _reset(self, samples_seen: int) -> None:
        self._start = time.perf_counter()
        self._samples_seen = samples_seen
        self._steps = self._samples = self._tokens = self._cut = 0
        self._paused = self._waited = 0.0

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

    def count(self, batch: Mapping[str, Any]) -> None:
        """One step over this local batch is done."""
        self._steps += 1
        self._samples += len(batch["seq_lens"])
        self._tokens += len(batch["token_ids"])
        self._cut += batch["cut_captions"]

    def row(self, samples_seen: int, world_size: int) -> dict[str, float]:
        """Speeds since the last call: samples per second of the whole run and per device, seconds per step,
        the share of them spent waiting for data, real tokens per caption,
        and the share of captions that were longer than the context."""
        seconds = max(time.perf_counter() - self._start - self._paused, 1e-9)
        speed = (samples_seen - self._samples_seen) / seconds
        row = {
            "samples_per_s": speed,
            "samples_per_s_per_device": speed / world_size,
            "step_s": seconds / max(1, self._steps),
            "data_wait_fraction": self._waited / seconds,
            "tokens_per_sample": self._tokens / max(1, self._samples),
            "cut_captions_fraction": self._cut / max(1, self._samples),
        }
        self._reset(samples_seen)
        return {key: float(f"{value:.5g}") for key, value in row.items()}
