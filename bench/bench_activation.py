"""Room activation against torch's own ops: bias + GELU, bias + ReLU + residual, and SwiGLU, with and without gradients.

    pytest bench/bench_activation.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_activation.py    a lower one

Shapes are those of the feed-forward layer of a transformer of width 768. Every side is checked against float64 before
it is timed. The share of the limit counts the bytes that the op must move.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import fastdl
from bench.accuracy import IncorrectResult, relative_error
from bench.timing import calls_for, paired_ratio, seconds_per_call, spread, take_turns
from fastdl import ops

SHAPES = ((1024, 3072), (32, 3072))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALLOWED = {"fp32": 1e-5, "bf16": 1e-2}  # relative error of fastdl, norm over norm
PEER_ALLOWED = 0.1
MOVED = {"bias_gelu": 2, "bias_relu_residual": 3, "swiglu": 3, "bias_gelu_gradients": 5, "swiglu_gradients": 8}


def functions(kind: str) -> dict:
    """fastdl's and torch's function of (x, other, bias)."""
    if kind == "bias_gelu":
        return {"fastdl": lambda x, y, b: ops.activation(x, "gelu", b), "torch": lambda x, y, b: F.gelu(x + b)}
    if kind == "bias_relu_residual":
        return {
            "fastdl": lambda x, y, b: ops.activation(x, "relu", b, residual=y),
            "torch": lambda x, y, b: y + F.relu(x + b),
        }
    return {"fastdl": lambda x, y, b: ops.swiglu(x, y), "torch": lambda x, y, b: F.silu(x) * y}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", MOVED)
def test_activation(benchmark, recorder, threads, rounds, kind, shape, dtype):
    torch.set_num_threads(threads)
    rows, cols = shape
    generator = torch.Generator().manual_seed(0)
    x, other, grad = (torch.randn(rows, cols, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    bias = torch.randn(cols, generator=generator).to(DTYPES[dtype])
    with_gradients = kind.endswith("_gradients")

    def side(function, *tensors):
        x, other, bias, grad = tensors
        if not with_gradients:
            return (function(x, other, bias),)
        leaves = [t.detach().requires_grad_() for t in ((x, other) if kind.startswith("swiglu") else (x, bias))]
        y = function(leaves[0], leaves[1], bias) if kind.startswith("swiglu") else function(leaves[0], other, leaves[1])
        return y, *torch.autograd.grad(y, leaves, grad)

    found = functions(kind.removesuffix("_gradients"))
    exact = side(found["torch"], *(t.double() for t in (x, other, bias, grad)))
    sides = {name: lambda f=function: side(f, x, other, bias, grad) for name, function in found.items()}
    errors = {}
    with torch.set_grad_enabled(with_gradients):
        for name, call in sides.items():
            pairs = zip(exact, call(), strict=True)
            errors[name] = max(relative_error(e.detach().numpy(), got.detach().double().numpy()) for e, got in pairs)
            allowed = ALLOWED[dtype] if name == "fastdl" else PEER_ALLOWED
            if not errors[name] <= allowed:
                raise IncorrectResult(f"{name}: relative error {errors[name]:.3g} above {allowed}: not timed")
        calls = {name: calls_for(call) for name, call in sides.items()}
        turns = {name: lambda call=call, n=calls[name]: seconds_per_call(call, n) for name, call in sides.items()}
        seconds = take_turns(turns, rounds, benchmark)
    level, moved = fastdl.backend.cpu_level(), MOVED[kind] * rows * cols * DTYPES[dtype].itemsize
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
    recorder.add("activation", f"{level}/{kind}/{rows}x{cols}/{dtype}", record)
