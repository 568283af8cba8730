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
from bench.against_torch import DTYPES, compare, with_gradients
from fastdl import ops

SHAPES = ((4096, 768), (128, 768))
# Of rows x cols, read and written. add_norm: y alone (post-norm blocks); add_norm_sum: s too (pre-norm blocks).
TENSORS_MOVED = {"add_norm": 3, "add_norm_sum": 4, "norm": 2, "norm_gradients": 5}


def torch_norm(x, weight, bias):
    return F.layer_norm(x, x.shape[-1:], weight, bias)


def torch_add_norm(x, residual, weight, bias):
    s = residual + x
    return F.layer_norm(s, x.shape[-1:], weight, bias), s


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("kind", TENSORS_MOVED)
def test_norm(benchmark, recorder, threads, rounds, kind, shape, dtype):
    torch.set_num_threads(threads)
    generator, cols = torch.Generator().manual_seed(0), shape[1]
    x, residual, grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(3))
    weight, bias = (torch.randn(cols, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    xd, rd, gd, wd, bd = (t.double() for t in (x, residual, grad, weight, bias))
    if kind == "norm_gradients":
        sides = {
            "fastdl": with_gradients(ops.layer_norm, (x, weight, bias), grad),
            "torch": with_gradients(torch_norm, (x, weight, bias), grad),
        }
        exact = with_gradients(torch_norm, (xd, wd, bd), gd)()
    elif kind == "norm":
        sides = {"fastdl": lambda: (ops.layer_norm(x, weight, bias),), "torch": lambda: (torch_norm(x, weight, bias),)}
        exact = (torch_norm(xd, wd, bd),)
    elif kind == "add_norm":
        sides = {
            "fastdl": lambda: (ops.layer_norm(x, weight, bias, residual=residual),),
            "torch": lambda: torch_add_norm(x, residual, weight, bias)[:1],
        }
        exact = torch_add_norm(xd, rd, wd, bd)[:1]
    else:
        sides = {
            "fastdl": lambda: ops.layer_norm(x, weight, bias, residual=residual, return_sum=True),
            "torch": lambda: torch_add_norm(x, residual, weight, bias),
        }
        exact = torch_add_norm(xd, rd, wd, bd)
    moved = TENSORS_MOVED[kind] * x.numel() * DTYPES[dtype].itemsize
    facts = {"kind": kind, "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(kind == "norm_gradients"):
        compare(benchmark, recorder, rounds, "norm", facts, sides, exact, moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", norm_gpu.SHAPES, ids=lambda s: f"{s[0]}x{s[1]}")
@pytest.mark.parametrize("op", norm_gpu.OPS)
@pytest.mark.parametrize("kind", norm_gpu.TENSORS_MOVED)
def test_norm_on_gpu(benchmark, recorder, rounds, kind, op, shape):
    record = norm_gpu.measure(kind, op, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("norm", f"gpu/{op}/{kind}/{shape[0]}x{shape[1]}/bf16", record)
