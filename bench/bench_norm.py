"""Room norm against torch's own ops: residual add + layer norm, layer norm alone forward and with its gradients.

    pytest bench/bench_norm.py -k "not gpu"                     best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_norm.py -k "not gpu"     a lower one
    pytest bench/bench_norm.py -k gpu                           the GPU: bench/norm_gpu.py has its sides

On the CPU shapes are those of a transformer of width 768: 4096 rows (a batch in training) and 128 (a short prompt).
Inputs are allocated once; outputs come from torch's allocator, as in a model. Every side is checked against float64
before it is timed. The share of the limit counts the bytes that the op must move (inputs and outputs once, and for the
gradients grad and s again).
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

import fastdl
from bench import norm_gpu
from bench.accuracy import IncorrectResult, relative_error
from bench.timing import calls_for, paired_ratio, seconds_per_call, spread, take_turns
from fastdl import ops

SHAPES = ((4096, 768), (128, 768))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}  # relative error of fastdl, norm over norm
PEER_ALLOWED = 0.1  # torch sums the bf16 gradients of weight and bias in bf16: 5 % off with 4096 rows
TENSORS_MOVED = {"add_norm": 4, "norm": 2, "norm_gradients": 5}  # of rows x cols: read and written
Side = Callable[[], tuple[torch.Tensor, ...]]


def sides(kind: str, dtype: torch.dtype, rows: int, cols: int) -> tuple[dict[str, Side], tuple[torch.Tensor, ...]]:
    """fastdl's and torch's call for a kind of work, and the exact answer in float64."""
    generator = torch.Generator().manual_seed(0)
    x, residual, grad = (torch.randn(rows, cols, generator=generator).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(cols, generator=generator).to(dtype) for _ in range(2))
    exact = [t.double() for t in (x, residual, grad, weight, bias)]

    def torch_add_norm(x, residual, weight, bias):
        s = residual + x
        return F.layer_norm(s, (cols,), weight, bias), s

    def gradients(norm, x, grad, weight, bias):
        leaves = [t.detach().requires_grad_() for t in (x, weight, bias)]
        y = norm(*leaves)
        return y, *torch.autograd.grad(y, leaves, grad)

    def torch_norm(x, weight, bias):
        return F.layer_norm(x, (cols,), weight, bias)

    xd, rd, gd, wd, bd = exact
    if kind == "add_norm":
        found = {
            "fastdl": lambda: ops.layer_norm(x, weight, bias, residual=residual, return_sum=True),
            "torch": lambda: torch_add_norm(x, residual, weight, bias),
        }
        return found, torch_add_norm(xd, rd, wd, bd)
    if kind == "norm":
        found = {"fastdl": lambda: (ops.layer_norm(x, weight, bias),), "torch": lambda: (torch_norm(x, weight, bias),)}
        return found, (torch_norm(xd, wd, bd),)
    found = {
        "fastdl": lambda: gradients(ops.layer_norm, x, grad, weight, bias),
        "torch": lambda: gradients(torch_norm, x, grad, weight, bias),
    }
    return found, gradients(torch_norm, xd, gd, wd, bd)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", TENSORS_MOVED)
def test_norm(benchmark, recorder, threads, rounds, kind, shape, dtype):
    torch.set_num_threads(threads)
    rows, cols = shape
    with torch.set_grad_enabled(kind == "norm_gradients"):
        found, exact = sides(kind, DTYPES[dtype], rows, cols)
        errors = {}
        for name, side in found.items():
            pairs = zip(exact, side(), strict=True)
            errors[name] = max(relative_error(e.detach().numpy(), got.detach().double().numpy()) for e, got in pairs)
            allowed = ALLOWED[dtype] if name == "fastdl" else PEER_ALLOWED
            if not errors[name] <= allowed:
                raise IncorrectResult(f"{name}: relative error {errors[name]:.3g} above {allowed}: not timed")
        calls = {name: calls_for(side) for name, side in found.items()}
        turns = {name: lambda side=side, n=calls[name]: seconds_per_call(side, n) for name, side in found.items()}
        seconds = take_turns(turns, rounds, benchmark)
    level, moved = fastdl.backend.cpu_level(), TENSORS_MOVED[kind] * rows * cols * DTYPES[dtype].itemsize
    limit = recorder.limits[str(threads)]
    read = limit["read_2000MB" if moved > 32e6 else "read_100MB"]
    record = {
        "level": level, "kind": kind, "dtype": dtype, "shape": [rows, cols], "missing": [],
        "ratio": paired_ratio(seconds["torch"], seconds["fastdl"]),
        "sides": {
            name: {
                "seconds": spread(values),
                "relative_error": float(f"{errors[name]:.3g}"),
                "gb_per_s": round(moved / spread(values)["median"] / 1e9, 2),
                "share_of_read_limit": round(moved / spread(values)["median"] / 1e9 / read, 3),
            }
            for name, values in seconds.items()
        },
    }  # fmt: skip
    recorder.add("norm", f"{level}/{kind}/{rows}x{cols}/{dtype}", record)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", norm_gpu.SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("op", norm_gpu.OPS)
@pytest.mark.parametrize("kind", norm_gpu.TENSORS_MOVED)
def test_norm_on_gpu(benchmark, recorder, rounds, kind, op, shape):
    record = norm_gpu.measure(kind, op, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("norm", f"gpu/{op}/{kind}/{shape[0]}x{shape[1]}/bf16", record)
