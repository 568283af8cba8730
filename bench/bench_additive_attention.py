"""Room additive_attention against what one writes with torch, eager and compiled: forward, and with gradients; memory.

    pytest bench/bench_additive_attention.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_additive_attention.py    a lower one

Peers: `eager` makes the tensor [batch, queries, keys, hidden]; `compile` is the same under torch.compile, which may
fuse it (skipped by name where it cannot compile). A case "step" is one query of a decoder whose keys are projected. The
operations counted are the fewest that the method of the CPU kernels takes an element of that tensor: 5 multiply-adds
forward, and with gradients 5 again for tanh and 4 for the sums. Cases and promises: bench/goals.py.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

from bench import additive_memory, goals
from bench.against_torch import ALLOWED, DTYPES, PEER_ALLOWED, check, play, with_gradients
from bench.attention_report import additive_key
from bench.gpu import compiled
from bench.limits import product_limit
from bench.plain import plain_additive_attention
from bench.timing import paired_ratio, spread, take_turns
from fastdl import backend, ops

MULTIPLY_ADDS = {"forward": 5, "step": 5, "gradients": 14}


def made(shape, dtype):
    """q, k, v, w and the gradient of the output."""
    batch, queries, keys, hidden = shape
    generator = torch.Generator().manual_seed(0)
    rows, columns = (batch, queries, hidden), (batch, keys, hidden)
    sizes = (rows, columns, columns, (hidden,), rows)
    return [torch.randn(size, generator=generator).to(DTYPES[dtype]) for size in sizes]


def side_of(kind, function, tensors, grad):
    if kind == "gradients":
        return with_gradients(function, tensors, grad)
    return lambda: (function(*tensors),)


@functools.lru_cache(maxsize=1)
def exact(kind, shape, dtype):
    """In float64 by the reference, which goes in chunks of queries."""
    *tensors, grad = (t.double() for t in made(shape, dtype))
    with torch.set_grad_enabled(kind == "gradients"):
        return side_of(kind, functools.partial(ops.additive_attention, backend="torch"), tensors, grad)()


@pytest.mark.parametrize(("kind", "shape", "dtype", "peer"), goals.ADDITIVE, ids=str)
def test_additive_attention(benchmark, recorder, threads, rounds, kind, shape, dtype, peer):
    torch.set_num_threads(threads)
    *tensors, grad = made(shape, dtype)
    theirs = plain_additive_attention if peer == "eager" else compiled(plain_additive_attention)
    sides = {
        "fastdl": side_of(kind, ops.additive_attention, tensors, grad),
        "torch": side_of(kind, theirs, tensors, grad),
    }
    level = backend.cpu_level()
    record = {"level": level, "kind": kind, "shape": list(shape), "dtype": dtype, "best": peer, "missing": []}
    key = additive_key(level, kind, shape, dtype, peer)
    with torch.set_grad_enabled(kind == "gradients"):
        if peer == "compile":
            try:
                sides["torch"]()
            except Exception as error:  # torch.compile raises whatever its back end raises
                record["missing"] = [f"torch.compile: {type(error).__name__}: {str(error)[:200]}"]
                recorder.add("additive_attention", key, record)
                pytest.skip(record["missing"][0])
        wanted = dict.fromkeys(sides, exact(kind, shape, dtype))
        errors = check(sides, wanted, {"fastdl": ALLOWED[dtype], "torch": PEER_ALLOWED})
        turns = rounds if kind == "step" else max(1, rounds // 5)  # eager torch takes seconds
        seconds = play(sides, turns, benchmark)
    operations = 2 * MULTIPLY_ADDS[kind] * math.prod(shape)
    limit = product_limit(recorder.limits[str(threads)], level, "fp32")
    record["ratio"] = paired_ratio(seconds["torch"], seconds["fastdl"])
    record["sides"] = {
        name: {
            "seconds": spread(values),
            "relative_error": float(f"{errors[name]:.3g}"),
            "gflop_per_s": round(operations / spread(values)["median"] / 1e9, 1),
            "share_of_product_limit": round(operations / spread(values)["median"] / 1e9 / limit, 3),
        }
        for name, values in seconds.items()
    }
    recorder.add("additive_attention", key, record)


def test_additive_attention_memory(recorder, threads):
    """Peak of a step with gradients, each side in a process of its own."""
    shape, level = goals.ADDITIVE_SHAPE, backend.cpu_level()
    names = ("fastdl", "eager")
    turns = {name: functools.partial(additive_memory.peak, name, shape, threads) for name in names}
    found = take_turns(turns, 2)
    record = {"level": level, "kind": "memory", "shape": list(shape), "dtype": "fp32", "missing": []}
    record["bytes"] = {name: spread(values) for name, values in found.items()}
    record["over_eager"] = paired_ratio(found["fastdl"], found["eager"])
    recorder.add("additive_attention", additive_key(level, "memory", shape, "fp32", "eager"), record)
