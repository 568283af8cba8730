"""Room attention_decode on a GPU: one query a head over a long cache in bfloat16 or Q8_0, of back ends cuda and triton
against every back end of torch's scaled_dot_product_attention that takes the case. Part of
bench/bench_attention_decode.py.

Cases are (batch, heads, key heads, keys, head_dim). torch reads a bfloat16 cache either way. Every side is checked
against the reference in float64, a sequence at a time, before it is timed. Bytes are those of the cache that is read.

Test: tests/test_bench_gpu.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from bench import gpu
from bench.attention_gpu import PEERS
from fastdl import ops
from fastdl.reference.attention_decode import from_q8_0, to_q8_0

SHAPES = tuple((batch, 32, 8, 8192, 128) for batch in (1, 8, 32))
CACHES = ("bf16", "q8_0")


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The answer in float64, sequence by sequence."""
    wide = (tuple(t[b : b + 1].double() for t in (q, k, v)) for b in range(q.shape[0]))
    return torch.cat([ops.attention(*one, backend="torch") for one in wide])


def measure(
    cache: str,
    shape: tuple[int, int, int, int, int],
    rounds: int,
    copy_limit: float,
    benchmark=None,
    *,
    device: str = "cuda",
    backends: tuple[str, ...] = ("cuda", "triton"),
    seconds_per_call: Callable[[gpu.Side], float] = gpu.seconds_per_call,
) -> dict:
    """The record of one case (gpu.compare), with the fastest of torch's back ends, or None."""
    torch.manual_seed(0)
    batch, heads, kv_heads, held, head_dim = shape
    q = torch.randn(batch, heads, 1, head_dim, device=device).bfloat16()
    k, v = (torch.randn(batch, kv_heads, held, head_dim, device=device).bfloat16() for _ in range(2))
    lens = torch.full((batch,), held, dtype=torch.int32, device=device)
    caches = (k, v)
    if cache == "q8_0":  # torch then reads, in bfloat16, what the cache says
        caches = tuple(to_q8_0(t) for t in caches)
        k, v = (from_q8_0(t).bfloat16() for t in caches)

    def ours(backend: str) -> gpu.Side:
        return lambda: (ops.attention_decode(q, *caches, lens, backend=backend),)

    def torchs(name: str) -> gpu.Side:
        def side():
            with sdpa_kernel(PEERS[name]):
                return (F.scaled_dot_product_attention(q, k, v, enable_gqa=True),)

        return side

    makers = {f"fastdl {b}": functools.partial(ours, b) for b in backends}
    makers |= {name: functools.partial(torchs, name) for name in PEERS}
    moved = sum(t.nbytes for t in caches)
    found = gpu.compare(makers, lambda: (exact(q, k, v),), moved, k, rounds, copy_limit, benchmark, seconds_per_call)
    peers = [name for name in found["sides"] if not name.startswith("fastdl")]
    best = min(peers, key=lambda name: found["sides"][name]["seconds"]["median"], default=None)
    facts = {"level": "gpu", "kind": "decode", "op": "attention_decode", "dtype": "bf16", "cache": cache}
    return {**facts, "shape": list(shape), "best_peer": best, **found}
