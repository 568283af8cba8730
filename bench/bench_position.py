"""Room position against torch's formula: scale * x + table[positions], with and without the gradients of both.

    pytest bench/bench_position.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_position.py    a lower one

Shapes are batches of a transformer of width 768. Every side is checked against float64 before it is timed. The share of
the limit counts the bytes that must move: x read and y written once, with gradients grad read and dx written too.
"""

from __future__ import annotations

import pytest
import torch

from bench import rooms_gpu
from bench.against_torch import DTYPES, compare, sides_of
from fastdl import ops

SHAPES = ((8, 512, 768), (1, 128, 768))  # batch, n, dim
SCALE = 768**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kind", ("add", "add_at", "add_gradients", "add_at_gradients"))
def test_position(benchmark, recorder, threads, rounds, kind, shape, dtype):
    """add: positions 0, 1, ...; add_at: int64 [batch, n], each sequence from a place of its own."""
    torch.set_num_threads(threads)
    generator, (batch, n, dim) = torch.Generator().manual_seed(0), shape
    x, grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(2))
    table = torch.randn(2 * n, dim, generator=generator).to(DTYPES[dtype])
    positions = 0
    if kind.startswith("add_at"):
        positions = torch.randint(n, (batch, 1), generator=generator) + torch.arange(n)
    rows = slice(0, n) if isinstance(positions, int) else positions
    ours = lambda x, table: ops.add_positions(x, table, scale=SCALE, positions=positions)  # noqa: E731
    theirs = lambda x, table: x * SCALE + table[rows]  # noqa: E731
    gradients = kind.endswith("_gradients")
    sides, exact = sides_of(ours, theirs, (x, table), grad if gradients else None)
    moved = (4 if gradients else 2) * x.numel() * DTYPES[dtype].itemsize
    facts = {"kind": kind, "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(gradients):
        compare(benchmark, recorder, rounds, "position", facts, sides, exact, moved)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("kind", "shape"), rooms_gpu.cases("position"))
def test_position_on_gpu(benchmark, recorder, rounds, kind, shape):
    record = rooms_gpu.measure("position", kind, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("position", f"gpu/{kind}/{'x'.join(map(str, shape))}/bf16", record)
