"""Room linear_scan against what one writes with torch: forward, and forward with gradients.

    pytest bench/bench_linear_scan.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_linear_scan.py    a lower one

Peers: `loop`, a step of torch.addcmul at a time; `chunked`, the best formulation of torch found: chunks of 64 steps
side by side, a loop over the steps of all of them, a loop over their ends, and one product that brings the states
in (products of a may underflow, but nothing is divided, so it is correct); `associative_scan`, that of
torch._higher_order_ops run eagerly, depth O(log T). h = P cumsum(b / P) with P = cumprod(a), by logarithms or not,
is no peer: P underflows after some hundred steps. With gradients, autograd differentiates them.

The first shape is that of the goal in bench/goals.py, 4096 steps of 512 channels; the second is a batch whose tensors
fit in no cache. The share of the limit counts a, b and h once, and for the gradients grad, a, h, da and db too.
"""

from __future__ import annotations

import pytest
import torch

from bench import goals
from bench.against_torch import DTYPES, compare, sides_of
from fastdl import ops

SHAPES = (*goals.scan_shapes("linear_scan"), (16, 1024, 1024))
CHUNK = 64


def loop(a, b):
    state, found = torch.zeros_like(b[:, 0]), []
    for x, y in zip(a.unbind(1), b.unbind(1), strict=True):
        state = torch.addcmul(y, x, state)
        found.append(state)
    return torch.stack(found, 1)


def chunked(a, b):
    """a, b [batch, length, channels], length a multiple of CHUNK."""
    batch, _, channels = b.shape
    steps_a, steps_b = (t.view(batch, -1, CHUNK, channels).unbind(2) for t in (a, b))
    products, ends = [steps_a[0]], [steps_b[0]]
    for x, y in zip(steps_a[1:], steps_b[1:], strict=True):
        products.append(products[-1] * x)
        ends.append(torch.addcmul(y, x, ends[-1]))
    state, before = torch.zeros_like(b[:, 0]), []
    for product, end in zip(products[-1].unbind(1), ends[-1].unbind(1), strict=True):
        before.append(state)
        state = torch.addcmul(end, product, state)
    states = torch.stack(before, 1).unsqueeze(2)
    return torch.addcmul(torch.stack(ends, 2), torch.stack(products, 2), states).view(b.shape)


def associative_scan(a, b):
    from torch._higher_order_ops.associative_scan import associative_scan as scan

    def compose(x, y):
        return x[0] * y[0], y[0] * x[1] + y[1]

    return scan(compose, (a, b), 1, combine_mode="generic")[1]


PEERS = {"loop": loop, "chunked": chunked, "associative_scan": associative_scan}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("peer", PEERS)
def test_linear_scan(benchmark, recorder, threads, rounds, peer, gradients, shape, dtype):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(shape, generator=generator).to(DTYPES[dtype])  # forget gates
    b, grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    theirs = PEERS[peer]
    sides, exact = sides_of(ops.linear_scan, theirs, (a, b), grad if gradients else None)
    moved = (8 if gradients else 3) * b.numel() * DTYPES[dtype].itemsize
    kind = goals.scan_kind("linear_scan", "gradients" if gradients else "forward", peer)
    facts = {"kind": kind, "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(gradients):
        compare(benchmark, recorder, rounds, "linear_scan", facts, sides, exact, moved)
