"""Timing on a GPU: CUDA events around one call at a time, with a cold L2 cache; the copy bandwidth of the same run.

The GPU is kept busy while the host launches (``torch.cuda._sleep``), so that an event pair holds the kernels and not
the Python around them. A figure is the median over the calls of a turn; turns and ratios are those of bench/timing.py.

Test: tests/test_bench_gpu.py
"""

from __future__ import annotations

import contextlib
import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from bench.accuracy import IncorrectResult
from bench.timing import paired_ratio, spread, take_turns

Side = Callable[[], Sequence[Tensor]]
ALLOWED = 1e-2  # relative error of fastdl in bfloat16, norm over norm
PEER_ALLOWED = 0.1

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


def compiled(function: Callable) -> Callable:
    torch.compiler.reset()  # else the ninth case would meet dynamo's limit of compilations of one function
    return torch.compile(function, fullgraph=True, dynamic=False)


@contextlib.contextmanager
def kept_graphs() -> Iterator[None]:
    """torch.compile frees a graph's buffers in its backward unless told that it will be called again."""
    from torch._functorch import config

    with config.patch(donated_buffer=False), torch.no_grad():
        yield


def compare(
    makers: Mapping[str, Callable[[], Side]],
    exact: Side,
    moved: int,
    x: Tensor,
    rounds: int,
    copy_limit: float,
    benchmark=None,
    seconds_per_call: Callable[[Side], float] = seconds_per_call,
) -> dict:
    """Check every side against float64, time them in turn, with a copy of ``x`` among them.

    makers      side -> what makes it; those named "fastdl ..." must work and be right, a peer that fails is listed
    exact       the answer in float64
    moved       bytes that a call must read and write
    copy_limit  GB/s of a large copy in this run; that of x counts where it is faster

    Returns missing, copy_gb_per_s, and sides with seconds, errors, shares of the copy and ratios to the peers.
    """
    missing, errors, sides = [], {}, {}
    with kept_graphs():
        wanted = exact()
        for name, maker in makers.items():
            ours = name.startswith("fastdl")
            try:
                sides[name] = maker()
                errors[name] = max(relative_error(e, got) for e, got in zip(wanted, sides[name](), strict=True))
            except Exception as error:  # a peer may be absent, or of another version, or not take this GPU
                if ours:
                    raise
                missing.append(f"{name}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
                sides.pop(name, None)
                continue
            if not errors[name] <= (ALLOWED if ours else PEER_ALLOWED):
                if ours:
                    raise IncorrectResult(f"{name}: relative error {errors[name]:.3g} above {ALLOWED}: not timed")
                missing.append(f"{name}: relative error {errors.pop(name):.3g} above {PEER_ALLOWED}: not timed")
                sides.pop(name)
        del wanted
        target = torch.empty_like(x)
        turns = {name: functools.partial(seconds_per_call, call) for name, call in sides.items()}
        turns["copy"] = lambda: seconds_per_call(lambda: target.copy_(x))
        for call in sides.values():
            call(), call()
        seconds = take_turns(turns, rounds, benchmark)
    nbytes = x.numel() * x.element_size()
    limit = max(copy_limit, 2 * nbytes / spread(seconds.pop("copy"))["median"] / 1e9)
    return {
        "missing": missing,
        "copy_gb_per_s": float(f"{limit:.4g}"),
        "sides": {
            name: {
                "seconds": spread(values),
                "relative_error": float(f"{errors[name]:.3g}"),
                "gb_per_s": round(moved / spread(values)["median"] / 1e9, 1),
                "share_of_copy": round(moved / spread(values)["median"] / 1e9 / limit, 3),
                "speedup_over": {
                    peer: paired_ratio(seconds[peer], values) for peer in seconds if not peer.startswith("fastdl")
                } if name.startswith("fastdl") else {},
            }
            for name, values in seconds.items()
        },
    }  # fmt: skip
