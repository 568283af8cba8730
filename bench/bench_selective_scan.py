"""Room selective_scan against a loop of torch's operations, the way it is written without a fused kernel.

    pytest bench/bench_selective_scan.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_selective_scan.py    a lower one

Shapes are those of Mamba-130M (1536 channels of 16 states): a prompt of 512 tokens, and a batch of 4 x 256. The peer
steps through time with [batch, dim, state] tensors. The op is bound by exp, not by bytes; the share of the limit counts
x, delta, z, B, C and y, and for the gradients their gradients too.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from bench import goals
from bench.against_torch import DTYPES, compare, sides_of
from fastdl import ops

SHAPES = (*goals.scan_shapes("selective_scan"), (4, 256, 1536))
STATE = 16


def ours(x, delta, A, B, C, D, z, bias):
    return ops.selective_scan(x, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)


def theirs(x, delta, A, B, C, D, z, bias):
    wide = torch.promote_types(x.dtype, torch.float32)
    dt, now = F.softplus(delta.to(wide) + bias.to(wide)), x.to(wide)
    h, found, A = x.new_zeros(x.shape[0], *A.shape, dtype=wide), [], A.to(wide)
    for step, u, b, c in zip(
        dt.unbind(1), (dt * now).unbind(1), B.to(wide).unbind(1), C.to(wide).unbind(1), strict=True
    ):
        h = torch.exp(step[..., None] * A) * h + u[..., None] * b[:, None]
        found.append(torch.bmm(h, c[..., None])[..., 0])
    return ((torch.stack(found, 1) + D.to(wide) * now) * F.silu(z.to(wide))).to(x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
def test_selective_scan(benchmark, recorder, threads, rounds, gradients, shape, dtype):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    batch, length, dim = shape
    narrow = DTYPES[dtype]

    def normal(*size):
        return torch.randn(size, generator=generator)

    x, z, grad = (normal(*shape).to(narrow) for _ in range(3))
    B, C = (normal(batch, length, STATE).to(narrow) for _ in range(2))
    delta, bias = normal(*shape).to(narrow), normal(dim) - 3
    A = -torch.arange(1.0, STATE + 1).repeat(dim, 1)
    tensors = (x, delta, A, B, C, torch.ones(dim), z, bias)
    sides, exact = sides_of(ours, theirs, tensors, grad if gradients else None)
    moved = ((8 if gradients else 4) * x.numel() + (4 if gradients else 2) * B.numel()) * narrow.itemsize
    kind = goals.scan_kind("selective_scan", "gradients" if gradients else "forward", "loop")
    facts = {"kind": kind, "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(gradients):
        compare(benchmark, recorder, rounds, "selective_scan", facts, sides, exact, moved)
