"""Room quant_matmul against torch's bf16 and fp32 linear and torchao's int4: shapes of real models, 1, 8, 512 rows.

    pytest bench/bench_quant_matmul.py                    best level of this machine
    FASTDL_ISA=avx2 pytest bench/bench_quant_matmul.py    a lower one; its records stand beside the others

A decoder streams its weights: between two uses of a matrix all others pass through the caches. So every side rotates
through copies of its weight, at least 128 MB and twice the L3 cache in all (at most 1 GB); 576 x 1536 in Q4_1 then
comes from memory, as in the demo model, and not from L2. Each side is checked before it is timed: against float64
products with its own weights (fastdl, torch), or with the weights before quantization (torchao: its codes are its own).
Inputs: float32 for fastdl and torch fp32, bf16 for activation bf16, torch bf16 and torchao.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

import fastdl
from bench import hardware, limits
from bench.accuracy import IncorrectResult, relative_error
from bench.peers import MissingPeer, torchao_int4
from bench.timing import calls_for, paired_ratio, seconds_per_call, spread, take_turns

SHAPES = ((1536, 576), (4096, 4096), (14336, 4096))  # (rows, cols) of W: the 576x1536, 4096x4096, 4096x14336
INPUT_ROWS = (1, 8, 512)
ALLOWED = {"fp32": 1e-5, "bf16": 1e-2, "int8": 2e-2, "int4": 0.12}  # relative error, norm over norm
PEERS = ("torch bf16", "torch fp32", "torchao int4")


@dataclass
class Side:
    """weights: copies to rotate through; product(weight) -> output; allowed: relative error; bytes_: of one weight."""

    weights: list
    product: Callable[[object], torch.Tensor]
    exact: torch.Tensor
    allowed: float
    bytes_: int
    activation: str
    turn: int = 0

    def __call__(self) -> torch.Tensor:
        self.turn = (self.turn + 1) % len(self.weights)
        return self.product(self.weights[self.turn])

    def check(self) -> float:
        error = relative_error(self.exact.numpy(), self().double().numpy())
        if not error <= self.allowed:
            raise IncorrectResult(f"relative error {error:.3g} above {self.allowed}: not timed")
        return error


def copies(nbytes: int) -> int:
    """How many copies of a weight of `nbytes` the rotation needs."""
    wanted = min(max(128_000_000, 2 * hardware.cache_bytes(3)), 1_000_000_000)
    return max(2, math.ceil(wanted / nbytes))


def fastdl_side(w: torch.Tensor, x: torch.Tensor, fmt: str, activation: str) -> Side:
    first = fastdl.ops.quantize(w, fmt)
    nbytes = first.nbytes
    weights = [fastdl.quant.QuantTensor.from_gguf(first.to_gguf().clone(), fmt).pack_() for _ in range(copies(nbytes))]
    chosen = activation
    if activation == "auto":
        chosen = fastdl.ops.auto_activation(fastdl.backend.cpu_level(), x.dtype, len(x))
    x = x.bfloat16() if chosen == "bf16" else x
    exact = x.double() @ first.dequantize(torch.float64).T

    def product(weight):
        return fastdl.ops.quant_matmul(x, weight, activation=activation)

    return Side(weights, product, exact, ALLOWED[chosen], nbytes, chosen)


def torch_side(w: torch.Tensor, x: torch.Tensor, dtype: torch.dtype) -> Side:
    name = "bf16" if dtype == torch.bfloat16 else "fp32"
    first, x = w.to(dtype), x.to(dtype)
    weights = [first.clone() for _ in range(copies(first.nbytes))]
    exact = x.double() @ first.double().T
    return Side(weights, lambda weight: F.linear(x, weight), exact, ALLOWED[name], first.nbytes, name)


def torchao_side(w: torch.Tensor, x: torch.Tensor) -> Side:
    first, x16 = torchao_int4(w.bfloat16()), x.bfloat16()
    try:
        F.linear(x16, first)
    except (NotImplementedError, RuntimeError) as error:
        raise MissingPeer(f"torchao int4 on the CPU: {str(error)[:200]}") from error
    nbytes = first.qdata.nbytes + first.scale_and_zero.nbytes
    weights = [
        type(first)(first.qdata.clone(), first.scale_and_zero.clone(), first.block_size, first.shape)
        for _ in range(copies(nbytes))
    ]
    exact = x16.double() @ w.double().T
    return Side(weights, lambda weight: F.linear(x16, weight), exact, ALLOWED["int4"], nbytes, "bf16")


def make_sides(w: torch.Tensor, x: torch.Tensor) -> tuple[dict[str, Side], list[str]]:
    """All sides that this machine has, and why the others are missing."""
    sides = {f"fastdl q4_1 {a}": fastdl_side(w, x, "q4_1", a) for a in ("auto", "int8", "bf16", "fp32")}
    chosen = sides["fastdl q4_1 auto"].activation
    del sides[f"fastdl q4_1 {chosen}"]  # auto is the same call
    sides["fastdl q8_0 auto"] = fastdl_side(w, x, "q8_0", "auto")
    sides["torch bf16"] = torch_side(w, x, torch.bfloat16)
    sides["torch fp32"] = torch_side(w, x, torch.float32)
    missing = []
    try:
        sides["torchao int4"] = torchao_side(w, x)
    except MissingPeer as error:
        missing.append(str(error))
    return sides, missing


@pytest.mark.parametrize("rows", INPUT_ROWS)
@pytest.mark.parametrize(("out", "width"), SHAPES, ids=lambda v: str(v))
def test_quant_matmul(benchmark, recorder, threads, rounds, out, width, rows):
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(out, width, generator=generator) * 0.02
    x = torch.randn(rows, width, generator=generator)
    level = fastdl.backend.cpu_level()
    with torch.inference_mode():
        sides, missing = make_sides(w, x)
        errors = {name: side.check() for name, side in sides.items()}  # nothing is timed before all are right
        calls = {name: calls_for(side) for name, side in sides.items()}
        turns = {name: lambda side=side, n=calls[name]: seconds_per_call(side, n) for name, side in sides.items()}
        seconds = take_turns(turns, rounds, benchmark)
    limit = recorder.limits[str(threads)]
    record = {"level": level, "rows": rows, "shape": [out, width], "missing": missing, "sides": {}}
    for name, side in sides.items():
        typical, pool = spread(seconds[name]), side.bytes_ * len(side.weights)
        work = 2 * rows * out * width
        record["sides"][name] = {
            "seconds": typical,
            "relative_error": float(f"{errors[name]:.3g}"),
            "activation": side.activation,
            **limits.shares(typical["median"], side.bytes_, work, pool, limit, level, side.activation),
            "speedup_over": {p: paired_ratio(seconds[p], seconds[name]) for p in PEERS if p in sides and p != name},
        }
    recorder.add("quant_matmul", f"{level}/{out}x{width}/{rows}", record)
