"""Timing on a GPU: CUDA events around one call at a time, with a cold L2 cache; the copy bandwidth of the same run.

The GPU is kept busy while the host launches (``torch.cuda._sleep``), so that an event pair holds the kernels and not
the Python around them. A figure is the median over the calls of a turn; turns and ratios are those of bench/timing.py.

Test: tests/test_bench_gpu.py
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable

import torch
from torch import Tensor

FLUSH_BYTES = 256_000_000  # written before every call: more than the L2 cache of any GPU of today
BUSY_CYCLES = 1_000_000  # about half a millisecond: longer than the host takes to launch a forward or a backward
COPY_BYTES = 1_000_000_000


@functools.cache
def flush_buffer() -> Tensor:
    return torch.empty(FLUSH_BYTES, dtype=torch.int8, device="cuda")


def seconds_per_call(fn: Callable[[], object], calls: int = 50) -> float:
    """Median GPU seconds of one call, each from a cold cache."""
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(calls)]
    for begin, end in pairs:
        flush_buffer().zero_()
        torch.cuda._sleep(BUSY_CYCLES)
        begin.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs) / 1e3


def warm_up(fn: Callable[[], object], calls: int = 3) -> None:
    """Compile and allocate what the first calls need."""
    for _ in range(calls):
        fn()
    torch.cuda.synchronize()


def copy_gb_per_s(nbytes: int = COPY_BYTES) -> float:
    """GB/s of ``y.copy_(x)``, bytes read and written: the limit of everything that is bound by memory."""
    x = torch.zeros(nbytes, dtype=torch.int8, device="cuda")
    y = torch.empty_like(x)
    warm_up(lambda: y.copy_(x))
    return 2 * nbytes / min(seconds_per_call(lambda: y.copy_(x)) for _ in range(3)) / 1e9


def measure() -> dict[str, float]:
    """Limits of this run, GB/s."""
    return {"copy_gb_per_s": float(f"{copy_gb_per_s():.4g}")}


def relative_error(exact: Tensor, tested: Tensor) -> float:
    """Norm of the difference over the norm of the exact answer, in float64, where the tensors are."""
    exact = exact.detach().double()
    return float((tested.detach().double() - exact).norm() / exact.norm())
