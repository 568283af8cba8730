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

import pytest
import torch
import torch.nn.functional as F

from bench import norm_gpu
from bench.against_torch import DTYPES, compare, sides_of
from fastdl import ops

SHAPES = ((4096, 768), (128, 768))
# Of rows x cols, read and written. add_norm: y alone (post-norm blocks); add_norm_sum: s too (pre-norm blocks).
TENSORS_MOVED = {"add_norm": 3, "add_norm_sum": 4, "norm": 2, "norm_gradients": 5}


FUNCTIONS = {  # fastdl's and torch's
    "norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b)),
    "add_norm": (
        lambda x, w, b, residual: ops.layer_norm(x, w, b, residual=residual),
        lambda x, w, b, residual: F.layer_norm(residual + x, x.shape[-1:], w, b),
    ),
    "add_norm_sum": (
        lambda x, w, b, residual: ops.layer_norm(x, w, b, residual=residual, return_sum=True),
        lambda x, w, b, residual: (F.layer_norm(s := residual + x, x.shape[-1:], w, b), s),
    ),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", TENSORS_MOVED)
def test_norm(benchmark, recorder, threads, rounds, kind, shape, dtype):
    torch.set_num_threads(threads)
    generator, cols = torch.Generator().manual_seed(0), shape[1]
    x, residual, grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    weight, bias = (torch.randn(cols, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    tensors = (x, weight, bias, residual) if kind.startswith("add_norm") else (x, weight, bias)
    ours, theirs = FUNCTIONS[kind.removesuffix("_gradients")]
    sides, exact = sides_of(ours, theirs, tensors, grad if kind.endswith("_gradients") else None)
    moved = TENSORS_MOVED[kind] * x.numel() * DTYPES[dtype].itemsize
    facts = {"kind": kind, "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(kind.endswith("_gradients")):
        compare(benchmark, recorder, rounds, "norm", facts, sides, exact, moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", norm_gpu.SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("op", norm_gpu.OPS)
@pytest.mark.parametrize("kind", norm_gpu.TENSORS_MOVED)
def test_norm_on_gpu(benchmark, recorder, rounds, kind, op, shape):
    record = norm_gpu.measure(kind, op, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("norm", f"gpu/{op}/{kind}/{shape[0]}x{shape[1]}/bf16", record)
