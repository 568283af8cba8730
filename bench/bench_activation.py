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

from bench import rooms_gpu
from bench.against_torch import DTYPES, compare, sides_of
from fastdl import ops

SHAPES = ((1024, 3072), (32, 3072))
# kind -> tensors of rows x cols that are read and written
TENSORS_MOVED = {
    "bias_gelu": 2, "bias_relu_residual": 3, "swiglu": 3, "bias_gelu_gradients": 5, "swiglu_gradients": 8,
}  # fmt: skip
FUNCTIONS = {  # fastdl's and torch's
    "bias_gelu": (lambda x, b: ops.activation(x, "gelu", b), lambda x, b: F.gelu(x + b)),
    "bias_relu_residual": (
        lambda x, b, residual: ops.activation(x, "relu", b, residual=residual),
        lambda x, b, residual: residual + F.relu(x + b),
    ),
    "swiglu": (ops.swiglu, lambda gate, up: F.silu(gate) * up),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", TENSORS_MOVED)
def test_activation(benchmark, recorder, threads, rounds, kind, shape, dtype):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    x, other, grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    bias = torch.randn(shape[1], generator=generator).to(DTYPES[dtype])
    what = kind.removesuffix("_gradients")
    tensors = {"bias_gelu": (x, bias), "bias_relu_residual": (x, bias, other), "swiglu": (x, other)}[what]
    ours, theirs = FUNCTIONS[what]
    sides, exact = sides_of(ours, theirs, tensors, grad if kind.endswith("_gradients") else None)
    moved = TENSORS_MOVED[kind] * x.numel() * DTYPES[dtype].itemsize
    facts = {"kind": kind, "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(kind.endswith("_gradients")):
        compare(benchmark, recorder, rounds, "activation", facts, sides, exact, moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("kind", "shape"), rooms_gpu.cases("activation"))
def test_activation_on_gpu(benchmark, recorder, rounds, kind, shape):
    record = rooms_gpu.measure("activation", kind, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("activation", f"gpu/{kind}/{'x'.join(map(str, shape))}/bf16", record)
