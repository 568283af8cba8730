"""Room attention_decode against torch's scaled_dot_product_attention over the same cache.

    pytest bench/bench_attention_decode.py -k "not gpu"
    pytest bench/bench_attention_decode.py -k gpu          the GPU: bench/decode_gpu.py has its sides

On the CPU one query of 9 heads against 4096 positions of 3 key heads of 64. torch gets the cache in the dtype of the
query, once with enable_gqa and once with the key heads repeated beforehand, which costs it nothing here; the faster
counts. fastdl reads the same cache, or one of 8-bit Q8_0 blocks, against torch's best on the cache of 16 or 32 bits.
The share of the limit is that of reading the cache once, from the cache level that holds it.
"""

from __future__ import annotations

import pytest
import torch

from bench import decode_gpu, goals
from bench.against_torch import ALLOWED, DTYPES, PEER_ALLOWED, check, play
from bench.attention_report import decode_key
from bench.limits import read_rate
from bench.timing import paired_ratio, spread
from fastdl import backend, ops
from fastdl.reference.attention_decode import from_q8_0, to_q8_0

sdpa = torch.nn.functional.scaled_dot_product_attention


@pytest.mark.parametrize(("shape", "dtype", "cache"), goals.DECODE, ids=lambda value: str(value))
def test_decode(benchmark, recorder, threads, rounds, shape, dtype, cache):
    torch.set_num_threads(threads)
    batch, heads, kv_heads, held, head_dim = shape
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(batch, heads, 1, head_dim, generator=generator).to(DTYPES[dtype])
    k, v = torch.randn(2, batch, kv_heads, held, head_dim, generator=generator).to(DTYPES[dtype])
    lens = torch.full((batch,), held, dtype=torch.int32)
    caches = (k, v) if cache == dtype else (to_q8_0(k), to_q8_0(v))
    repeated = [t.repeat_interleave(heads // kv_heads, 1) for t in (k, v)]
    sides = {
        "fastdl": lambda: (ops.attention_decode(q, *caches, lens),),
        "torch enable_gqa": lambda: (sdpa(q, k, v, enable_gqa=True),),
        "torch repeated": lambda: (sdpa(q, *repeated),),
    }
    exact = {name: (sdpa(q.double(), k.double(), v.double(), enable_gqa=True),) for name in sides}
    if cache != dtype:
        exact["fastdl"] = (sdpa(q.double(), *(from_q8_0(t).double() for t in caches), enable_gqa=True),)
    allowed = dict.fromkeys(sides, PEER_ALLOWED) | {"fastdl": ALLOWED[dtype]}
    with torch.inference_mode():
        errors = check(sides, exact, allowed)
        seconds = play(sides, rounds, benchmark)
    moved = 2 * caches[0].nbytes
    rate = read_rate(moved, threads)
    peers = [name for name in sides if name != "fastdl"]
    best = min(peers, key=lambda name: spread(seconds[name])["median"])
    level = backend.cpu_level()
    record = {
        "level": level, "shape": list(shape), "dtype": dtype, "cache": cache, "missing": [], "best": best,
        "ratio": paired_ratio(seconds[best], seconds["fastdl"]),
        "sides": {
            name: {
                "seconds": spread(values),
                "relative_error": float(f"{errors[name]:.3g}"),
                "gb_per_s": round(moved / spread(values)["median"] / 1e9, 2),
                "share_of_read_limit": round(moved / spread(values)["median"] / 1e9 / rate, 3) if rate else None,
            }
            for name, values in seconds.items()
        },
    }  # fmt: skip
    recorder.add("attention_decode", decode_key(level, shape, dtype, cache), record)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("shape", decode_gpu.SHAPES, ids=lambda s: "x".join(map(str, s)))
@pytest.mark.parametrize("cache", decode_gpu.CACHES)
def test_decode_on_gpu(benchmark, recorder, rounds, cache, shape):
    record = decode_gpu.measure(cache, shape, rounds, recorder.gpu_limits["copy_gb_per_s"], benchmark)
    recorder.add_gpu("attention_decode", decode_key("gpu", shape, "bf16", cache), record)
