"""Room attention against torch's scaled_dot_product_attention: forward, and forward with gradients.

    pytest bench/bench_attention.py -k "not gpu"                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_attention.py -k "not gpu"    a lower one
    pytest bench/bench_attention.py -k gpu                          the GPU: bench/attention_gpu.py has its sides

The shapes are [batch, heads, length, head_dim], as many queries as keys. A mask, a bias or lengths reach torch as its
attn_mask; the lengths go from a quarter of the keys to all. The operations counted are the products of the scores that
are needed: half of them when causal. Cases and promises: bench/goals.py.
"""

from __future__ import annotations

import pytest
import torch

from bench import attention_gpu, goals
from bench.against_torch import ALLOWED, DTYPES, PEER_ALLOWED, check, play, with_gradients
from bench.attention_report import case_key
from bench.limits import product_limit
from bench.timing import paired_ratio, spread
from fastdl import backend, ops

sdpa = torch.nn.functional.scaled_dot_product_attention


def arguments(option: str, shape: tuple[int, int, int, int], dtype: torch.dtype):
    """Arguments of ops.attention, those of torch's, and the share of the scores that is needed."""
    batch, heads, length, _ = shape
    generator = torch.Generator().manual_seed(1)
    if option == "causal":
        return {"causal": True}, {"is_causal": True}, (length + 1) / (2 * length)
    if option == "bias":
        bias = torch.randn(1, heads, length, length, generator=generator).to(dtype)
        return {"bias": bias}, {"attn_mask": bias}, 1.0
    if option == "mask":
        mask = torch.rand(batch, 1, length, length, generator=generator) < 0.7
        return {"mask": mask}, {"attn_mask": mask}, 1.0
    if option == "valid_lens":
        lens = (
            torch.linspace(length / 4, length, batch + 1)[:batch].long() if batch > 1 else torch.tensor([length // 2])
        )
        mask = (torch.arange(length) < lens[:, None])[:, None, None]
        return {"valid_lens": lens}, {"attn_mask": mask}, float(lens.float().mean() / length)
    return {}, {}, 1.0


def widened(options: dict) -> dict:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in options.items()}


@pytest.mark.parametrize(("kind", "option", "shape", "dtype"), goals.ATTENTION, ids=lambda value: str(value))
def test_attention(benchmark, recorder, threads, rounds, kind, option, shape, dtype):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(shape, generator=generator).to(DTYPES[dtype]) for _ in range(4))
    mine, theirs, needed = arguments(option, shape, DTYPES[dtype])
    functions = {
        "fastdl": lambda q, k, v: ops.attention(q, k, v, **mine),
        "torch": lambda q, k, v: sdpa(q, k, v, **theirs),
    }
    double = [t.double() for t in (q, k, v)]

    def exact(q, k, v):
        return sdpa(q, k, v, **widened(theirs))

    if kind == "gradients":
        sides = {name: with_gradients(f, (q, k, v), grad) for name, f in functions.items()}
        wanted = with_gradients(exact, double, grad.double())()
    else:
        sides = {name: lambda f=f: (f(q, k, v),) for name, f in functions.items()}
        wanted = (exact(*double),)
    with torch.set_grad_enabled(kind == "gradients"):
        errors = check(sides, dict.fromkeys(sides, wanted), {"fastdl": ALLOWED[dtype], "torch": PEER_ALLOWED})
        seconds = play(sides, rounds, benchmark)
    batch, heads, length, head_dim = shape
    operations = 4 * batch * heads * length * length * head_dim * needed * (3.5 if kind == "gradients" else 1)
    level = backend.cpu_level()
    limit = product_limit(recorder.limits[str(threads)], level, "bf16" if dtype == "bf16" else "fp32")
    record = {
        "level": level, "kind": kind, "option": option, "shape": list(shape), "dtype": dtype, "missing": [],
        "ratio": paired_ratio(seconds["torch"], seconds["fastdl"]),
        "sides": {
            name: {
                "seconds": spread(values),
                "relative_error": float(f"{errors[name]:.3g}"),
                "gflop_per_s": round(operations / spread(values)["median"] / 1e9, 1),
                "share_of_product_limit": round(operations / spread(values)["median"] / 1e9 / limit, 3),
            }
            for name, values in seconds.items()
        },
    }  # fmt: skip
    recorder.add("attention", case_key(level, kind, option, shape, dtype), record)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", attention_gpu.SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("kind", attention_gpu.KINDS)
def test_attention_on_gpu(benchmark, recorder, rounds, kind, shape):
    record = attention_gpu.measure(kind, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("attention", case_key("gpu", kind, "causal", shape, "bf16"), record)
