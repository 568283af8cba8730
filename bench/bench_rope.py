"""Room rope against torch's formula, and against transformers' apply_rotary_pos_emb: q and k of a layer, and the
gradient of one.

    pytest bench/bench_rope.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_rope.py    a lower one

q and k are [batch, n, heads, head_dim] transposed, as projections give them: 9 and 3 heads of 64 in 2048 tokens, 32 and
8 of 128 in 512, and one token of the latter. Every side is checked against float64 before it is timed. The share of the
limit counts the bytes that must move: q and k read and written once.
"""

from __future__ import annotations

import pytest
import torch

from bench import rooms_gpu
from bench.against_torch import DTYPES, compare, sides_of
from bench.plain import plain_rope
from fastdl import ops

SHAPES = ((2048, 9, 3, 64), (512, 32, 8, 128), (1, 32, 8, 128))  # n, heads of q, of k, head_dim
KINDS = ("qk_interleaved", "qk_half", "qk_half_over_transformers", "interleaved_gradients", "half_gradients")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kind", KINDS)
def test_rope(benchmark, recorder, threads, rounds, kind, shape, dtype):
    torch.set_num_threads(threads)
    generator, (n, heads, kv_heads, head_dim) = torch.Generator().manual_seed(0), shape
    q, k, grad = (
        torch.randn(1, n, h, head_dim, generator=generator).to(DTYPES[dtype]).transpose(1, 2)
        for h in (heads, kv_heads, heads)
    )
    pairs = "half" if "half" in kind else "interleaved"
    table = ops.rope_table(head_dim, 10000.0, n)
    if kind.endswith("_gradients"):
        ours, theirs = lambda q: ops.rope(q, table, pairs=pairs), lambda q: plain_rope(q, table, pairs)
        sides, exact = sides_of(ours, theirs, (q,), grad)
        moved = 4 * q.numel()
    else:
        ours = lambda q, k: ops.rope_qk(q, k, table, pairs=pairs)  # noqa: E731
        theirs = lambda q, k: (plain_rope(q, table, pairs), plain_rope(k, table, pairs))  # noqa: E731
        if kind.endswith("_transformers"):
            theirs = transformers_rope(table)
        sides, exact = sides_of(ours, theirs, (q, k))
        moved = 2 * (q.numel() + k.numel())
    facts = {"kind": kind, "dtype": dtype, "shape": list(shape)}
    with torch.set_grad_enabled(kind.endswith("_gradients")):
        compare(benchmark, recorder, rounds, "rope", facts, sides, exact, moved * DTYPES[dtype].itemsize)


def transformers_rope(table):
    """apply_rotary_pos_emb with cos and sin made before, as a model does once for all its layers."""
    modeling = pytest.importorskip("transformers.models.llama.modeling_llama")
    angles = {
        dtype: [torch.cat((t, t), -1)[None].to(dtype) for t in (table[:, 0::2], table[:, 1::2])]
        for dtype in (*DTYPES.values(), torch.float64)
    }
    return lambda q, k: modeling.apply_rotary_pos_emb(q, k, *angles[q.dtype])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("kind", "shape"), rooms_gpu.cases("rope"))
def test_rope_on_gpu(benchmark, recorder, rounds, kind, shape):
    record = rooms_gpu.measure("rope", kind, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("rope", f"gpu/{kind}/{'x'.join(map(str, shape))}/bf16", record)
