"""The most that a device can do: dense matrix FLOP/s, tabulated for GPUs, measured on a CPU."""

import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["gemm_peak", "peak_flops"]

# Dense tensor-core TFLOP/s (never the figures "with sparsity", which are twice these), accumulated in fp32:
# 16-bit floats, then fp32 as torch computes it by default (TF32 off). Sources: NVIDIA's data sheet of each
# card (H100 2023, H200 2024, A100 2021, L40S 2023, L4 2023, A10 2021, V100 2020, T4 2019, DGX B200 2024)
# and the white papers of the Ada (RTX 4090) and Ampere GA102 (RTX 3090) architectures. A card counts if all
# words of its name are in the device's; the first that does, so the longer ones stand first.
GPUS: dict[str, tuple[float, float]] = {
    "B200": (2250.0, 75.0),
    "H200": (989.4, 66.9),
    "H100 PCIe": (756.0, 51.2),
    "H100 NVL": (835.0, 60.0),
    "H100": (989.4, 66.9),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "L4": (121.0, 30.3),
    "A10": (125.0, 31.2),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
}
SHAPES = ((1024, 1024, 1024), (2048, 512, 2048))
"""(m, k, n) of the products that are tried on a CPU; the best counts."""


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """Dense FLOP/s of the device for this dtype (the autocast dtype, else fp32), None where nobody knows.

    A CPU is measured once per process and number of threads, in fp32: half a second.
    """
    if device.type == "cpu":
        return _measured(torch.get_num_threads()) if dtype == torch.float32 else None
    return tabulated(torch.cuda.get_device_name(device), dtype) if device.type == "cuda" else None


def tabulated(name: str, dtype: torch.dtype) -> float | None:
    """FLOP/s of the GPU of this name; None for a card that is not in the table, or another dtype."""
    column = {torch.float16: 0, torch.bfloat16: 0, torch.float32: 1}.get(dtype)
    words = name.replace("-", " ").split()
    for card, peaks in GPUS.items():
        if set(card.split()) <= set(words) and column is not None:
            too_old = card in ("V100", "T4") and dtype == torch.bfloat16  # bf16 is emulated there
            return None if too_old else peaks[column] * 1e12
    return None


@cache
def _measured(threads: int) -> float:
    return gemm_peak()


def gemm_peak(
    *,
    seconds: float = 0.5,
    timer: Callable[[], float] = time.perf_counter,
    dtype: torch.dtype = torch.float32,
) -> float:
    """FLOP/s of the best matrix product on this process's CPU threads, by ``timer``, of torch's own (MKL) and
    oneDNN's.

    Spends about ``seconds`` by that clock; the fastest single product counts, so that a moment in which
    others use the machine does no harm.
    """
    best = 0.0
    for m, k, n in SHAPES:
        # ones, not random numbers: a run's own generator is to be left alone
        a, b = torch.ones(m, k, dtype=dtype), torch.ones(n, k, dtype=dtype)
        for product in _products(a, b):
            product()
            end = timer() + seconds / len(SHAPES) / 2
            while (start := timer()) < end:
                product()
                best = max(best, 2 * m * k * n / (timer() - start))
    return best


def _products(a: Tensor, b: Tensor) -> list[Callable[[], object]]:
    """Ways to a b^T."""
    out = torch.empty(len(a), len(b), dtype=a.dtype)
    one_dnn: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    ways: list[Callable[[], object]] = [lambda: torch.mm(a, b.t(), out=out)]
    if one_dnn is not None and a.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        ways.append(lambda: one_dnn(a, b, None, "none", [], ""))
    return ways
