"""Room group_norm against torch's own ops: group norm alone, forward and with its gradients, and AdaGN.

    pytest bench/bench_group_norm.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_group_norm.py    a lower one

Shapes are those of a diffusion U-Net with 32 groups: 320 channels of 64 x 64 and 1280 of 8 x 8. The share of the limit
counts the bytes that the op must move: x and y, and for the gradients grad, x, y and dx.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import rooms_gpu
from bench.against_torch import DTYPES, compare, sides_of
from fastdl import ops

SHAPES = ((2, 320, 64, 64), (2, 1280, 8, 8))
GROUPS = 32
TENSORS_MOVED = {"group_norm": 2, "adagn": 2, "group_norm_gradients": 5}  # of the size of x: read and written


def torch_adagn(x, weight, bias, scale, shift):
    return F.group_norm(x, GROUPS, weight, bias) * scale[..., None, None] + shift[..., None, None]


def our_adagn(x, weight, bias, scale, shift):
    return ops.group_norm(x, GROUPS, weight, bias, scale=scale, shift=shift)


FUNCTIONS = {
    "adagn": (our_adagn, torch_adagn),
    "group_norm": (lambda x, w, b: ops.group_norm(x, GROUPS, w, b), lambda x, w, b: F.group_norm(x, GROUPS, w, b)),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kind", TENSORS_MOVED)
def test_group_norm(benchmark, recorder, threads, rounds, kind, shape, dtype):
    torch.set_num_threads(threads)
    generator, (n, c) = torch.Generator().manual_seed(0), shape[:2]
    tensors = [
        torch.randn(s, generator=generator).to(DTYPES[dtype]) for s in (shape, (c,), (c,), (n, c), (n, c), shape)
    ]
    *tensors, grad = tensors if kind == "adagn" else [*tensors[:3], tensors[-1]]
    ours, theirs = FUNCTIONS[kind.removesuffix("_gradients")]
    sides, exact = sides_of(ours, theirs, tensors, grad if kind.endswith("_gradients") else None)
    moved = TENSORS_MOVED[kind] * tensors[0].numel() * DTYPES[dtype].itemsize
    facts = {"kind": kind, "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(kind.endswith("_gradients")):
        compare(benchmark, recorder, rounds, "group_norm", facts, sides, exact, moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("kind", "shape"), rooms_gpu.cases("group_norm"))
def test_group_norm_on_gpu(benchmark, recorder, rounds, kind, shape):
    record = rooms_gpu.measure("group_norm", kind, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("group_norm", f"gpu/{kind}/{'x'.join(map(str, shape))}/bf16", record)
