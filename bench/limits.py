"""What the machine can do at most: read bandwidth and arithmetic rates, measured in the same run as the figures.

`bench/limits.c` is compiled on the spot by the C compiler that built fastdl; without one, torch's own products and
sums stand in (lower, so shares of the limit read higher; the results file says which was used).

Test: tests/test_bench.py
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

from bench import hardware
from bench.timing import calls_for, seconds_per_call

SOURCE = Path(__file__).with_name("limits.c")
RATES = ("fma", "int8", "bf16", "amx_int8", "amx_bf16")
MB100, GB2 = 100_000_000, 2_000_000_000


def compile_probe(folder: Path, *flags: str) -> Path | None:
    """Build limits.c with the machine's best instructions (and `flags`); None if that fails."""
    compiler = next((c for c in (os.environ.get("CC"), "cc", "gcc", "clang") if c and shutil.which(c)), None)
    if compiler is None:
        return None
    out = folder / ("limits" + "".join(flags))
    command = [compiler, "-O3", "-march=native", "-fopenmp", *flags, str(SOURCE), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return out if done.returncode == 0 else None


def reading(probe: Path, *arguments: object) -> float | None:
    """One number from the probe; None where the machine or the build has no such instruction."""
    done = subprocess.run([probe, *map(str, arguments)], capture_output=True, text=True, check=False, timeout=300)
    return float(done.stdout) if done.returncode == 0 else None


def probe_limits(probe: Path, narrow: Path | None, threads: int, big: int) -> dict[str, float]:
    """Readings of the native probe: GB/s for read_*, GFLOP/s or GOP/s for the rates."""
    found = {f"read_{MB100 // 10**6}MB": reading(probe, "read", MB100, threads)}
    if big:
        found[f"read_{big // 10**6}MB"] = reading(probe, "read", big, threads)
    found |= {rate: reading(probe, rate, threads) for rate in RATES}
    if narrow is not None:
        found |= {f"{rate}_avx2": reading(narrow, rate, threads) for rate in ("fma", "int8")}
    return {key: value for key, value in found.items() if value is not None}


def torch_limits(threads: int, size: int = 2048) -> dict[str, float]:
    """torch's own square products (GFLOP/s) and the sum of 100 MB (GB/s)."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = {}
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            a, b = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
            found[f"torch_matmul_{name}"] = 2 * size**3 / _best(lambda a=a, b=b: a @ b) / 1e9
        x = torch.ones(MB100 // 4)
        found["torch_sum_100MB"] = MB100 / _best(x.sum) / 1e9
    finally:
        torch.set_num_threads(before)
    return found


def _best(fn, tries: int = 5) -> float:
    with torch.inference_mode():
        calls = calls_for(fn)
        return min(seconds_per_call(fn, calls) for _ in range(tries))


def measure(threads: int) -> dict[str, dict[str, float]]:
    """Limits for 1 and for `threads` threads: {"1": {...}, "2": {...}}, rounded to 4 digits."""
    big = GB2 if hardware.memory_bytes("MemAvailable") > 3 * GB2 else 0
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        probe = compile_probe(Path(folder))
        narrow = compile_probe(Path(folder), "-mno-avx512f") if probe else None
        for count in sorted({1, threads}):
            values = torch_limits(count)
            if probe is not None:
                values |= probe_limits(probe, narrow, count, big)
            found[str(count)] = {key: float(f"{value:.4g}") for key, value in values.items()}
    return found


def read_limit(limits: dict[str, float], working_set: int) -> float:
    """GB/s for streaming `working_set` bytes over and over: the reading of the nearest size."""
    if working_set > 5 * MB100 and f"read_{GB2 // 10**6}MB" in limits:
        return limits[f"read_{GB2 // 10**6}MB"]
    small = f"read_{MB100 // 10**6}MB"
    return limits[small] if small in limits else limits["torch_sum_100MB"]


@functools.cache
def read_rate(nbytes: int, threads: int) -> float | None:
    """GB/s for reading `nbytes` over and over, from the cache that holds them; None without a C compiler."""
    with tempfile.TemporaryDirectory() as folder:
        probe = compile_probe(Path(folder))
        return None if probe is None else reading(probe, "read", nbytes, threads)


def product_limit(limits: dict[str, float], level: str, activation: str) -> float:
    """G operations/s that the level's own instruction for that activation precision reaches."""
    wanted = {
        ("amx", "int8"): "amx_int8", ("amx", "bf16"): "amx_bf16", ("avx512", "int8"): "int8",
        ("avx512", "bf16"): "bf16", ("avx2", "int8"): "int8_avx2",
    }  # fmt: skip
    fallback = "fma_avx2" if level == "avx2" else "fma"
    for key in (wanted.get((level, activation), fallback), fallback, "torch_matmul_fp32"):
        if key in limits:
            return limits[key]
    raise KeyError(f"no arithmetic rate among {sorted(limits)}")


def shares(
    seconds: float,
    weight_bytes: int,
    operations: float,
    working_set: int,
    limits: dict[str, float],
    level: str,
    activation: str,
) -> dict[str, float]:
    """GB/s of weights and GFLOP/s of one call, each with its share of the limit that could bind it."""
    gbs, gflops = weight_bytes / seconds / 1e9, operations / seconds / 1e9
    return {
        "weight_gb_per_s": round(gbs, 2),
        "share_of_read_limit": round(gbs / read_limit(limits, working_set), 3),
        "gflop_per_s": round(gflops, 1),
        "share_of_product_limit": round(gflops / product_limit(limits, level, activation), 3),
    }
