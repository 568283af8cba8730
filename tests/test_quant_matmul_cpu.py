"""The CPU kernels of quant_matmul, level by level: every format, precision, number of rows, and odd sizes.

The answer is the torch back end's in float64 with the same rounding of x, so what is left is float32 accumulation. The
allowed error is 4 units in the last place of the largest sum of |x| |W|, an eighth of what 32 float32 sums in a row may
lose, plus the rounding of a 16-bit result.
"""

from __future__ import annotations

import functools

import pytest
import torch
from random_weights import random_weight

from fastdl import backend, ops, testing
from fastdl.ops.quant_matmul import ACTIVATIONS
from fastdl.quant import FORMATS

pytestmark = pytest.mark.usefixtures("native")

TOKENS = (1, 2, 5, 8, 17, 70)
ROWS = (1, 15, 17, 48)


def widths(name: str) -> tuple[int, ...]:
    return (256, 512) if name == "q6_k" else (32, 96, 576)


def sizes(name: str) -> list[tuple[int, int, int]]:
    """(tokens, rows, cols): each number of tokens with each width, the rows in turn."""
    pairs = [(tokens, cols) for tokens in TOKENS for cols in widths(name)]
    return [(tokens, ROWS[index % len(ROWS)], cols) for index, (tokens, cols) in enumerate(pairs)]


@functools.cache
def case(name: str, activation: str, dtype: torch.dtype, tokens: int, rows: int, cols: int):
    """x, packed weight, bias, the exact answers of forward and backward, and the allowed errors."""
    w = random_weight(name, rows, cols, seed=rows)
    x, bias, grad = torch.randn(tokens, cols).to(dtype), torch.randn(rows), torch.randn(tokens, rows).to(dtype)
    dense = w.dequantize(torch.float64)
    y = ops.quant_matmul(x.double(), w, bias, activation=activation, backend="torch")
    gx = grad.double() @ dense
    ulp = torch.finfo(torch.float32).eps
    allowed = 4 * ulp * float((x.double().abs() @ dense.abs().T).max())
    allowed_gx = 4 * ulp * float((grad.double().abs() @ dense.abs()).max())
    if dtype != torch.float32:
        allowed += torch.finfo(dtype).eps * float(y.abs().max())
        allowed_gx += torch.finfo(dtype).eps * float(gx.abs().max())
    return x, w.pack_(), bias, y, allowed, grad, gx, allowed_gx


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("name", FORMATS)
def test_forward(level, name, activation):
    for tokens, rows, cols in sizes(name):
        x, w, bias, exact, allowed, *_ = case(name, activation, torch.float32, tokens, rows, cols)
        with testing.poisoned():
            y = ops.quant_matmul(x, w, bias, activation=activation, backend="cpu")
        assert testing.largest_error(y, exact) <= allowed, (tokens, rows, cols)


@pytest.mark.parametrize("name", FORMATS)
def test_backward(level, name):
    for tokens, rows, cols in sizes(name):
        _, w, _, _, _, grad, exact, allowed = case(name, "fp32", torch.float32, tokens, rows, cols)
        with testing.poisoned():
            gx = torch.ops.fastdl.quant_matmul_backward(grad, w.data, w.fmt.ggml_id, cols)
        assert testing.largest_error(gx, exact) <= allowed, (tokens, rows, cols)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORMATS)
def test_half_precision(level, name, dtype):
    cols = widths(name)[-1]
    for activation in ACTIVATIONS:
        for tokens, rows in ((1, 17), (5, 48), (17, 15)):
            x, w, bias, y, allowed, grad, gx, allowed_gx = case(name, activation, dtype, tokens, rows, cols)
            with testing.poisoned():
                assert testing.largest_error(ops.quant_matmul(x, w, bias, activation=activation), y) <= allowed
                got = torch.ops.fastdl.quant_matmul_backward(grad, w.data, w.fmt.ggml_id, cols)
            assert got.dtype == dtype and testing.largest_error(got, gx) <= allowed_gx


@pytest.mark.parametrize("name", FORMATS)
def test_rows(level, name):
    """Dequantized rows are the same numbers at every level."""
    w = random_weight(name, 17, widths(name)[-1])
    dense, ids = w.dequantize(), torch.tensor([16, 0, 5, 0])
    w.pack_()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        with testing.poisoned():
            assert torch.equal(w.dequantize(dtype), dense.to(dtype))
            assert torch.equal(w.rows_at(ids, dtype), dense[ids].to(dtype))


def test_not_finite(level):
    """NaN and infinity spoil their own token and no other."""
    w = random_weight("q4_1", 33, 64)
    for bad in (float("nan"), float("inf"), -float("inf")):
        for activation in ACTIVATIONS:
            for tokens in (2, 20):
                for dtype in (torch.float32, torch.bfloat16):
                    x = torch.randn(tokens, 64).to(dtype)
                    x[1, 40] = bad
                    y = ops.quant_matmul(x, w, activation=activation, backend="cpu")
                    assert not torch.isfinite(y[1]).any(), (bad, activation, tokens, dtype)
                    assert torch.isfinite(torch.cat([y[:1], y[2:]])).all(), (bad, activation, tokens, dtype)


def test_extreme_magnitudes(level):
    """Blocks of zeros, denormals and large numbers beside ordinary ones."""
    w = random_weight("q8_0", 20, 160)
    x = torch.randn(3, 160)
    x[:, :32], x[:, 32:64], x[:, 64:96], x[:, 96:128] = 0, 1e-39, 2e-30, 1e20
    for activation in ACTIVATIONS:
        exact = ops.quant_matmul(x.double(), w, activation=activation, backend="torch")
        y = ops.quant_matmul(x, w, activation=activation, backend="cpu")
        testing.assert_accurate(y, exact, ulps=64)
        small = ops.quant_matmul(x[:, :96].contiguous(), random_weight("q8_0", 20, 96), activation=activation)
        assert torch.isfinite(small).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_threads_change_nothing(level, activation):
    before = torch.get_num_threads()
    try:
        for tokens in (1, 6, 70):
            w = random_weight("q4_1", 200, 576).pack_()
            x, grad = torch.randn(tokens, 576), torch.randn(tokens, 200)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                y = ops.quant_matmul(x, w, activation=activation, backend="cpu")
                gx = torch.ops.fastdl.quant_matmul_backward(grad, w.data, 3, 576)
                results.append((y, gx))
            for y, gx in results[1:]:
                assert torch.equal(y, results[0][0]) and torch.equal(gx, results[0][1])
    finally:
        torch.set_num_threads(before)


def test_levels_really_differ():
    """The cap reaches the kernels: float32 sums are ordered differently at different levels."""
    if backend.cpu_level() == "scalar":
        pytest.skip("this CPU has the scalar level only")
    w, x = random_weight("f32", 48, 576), torch.randn(4, 576)
    here = ops.quant_matmul(x, w, activation="fp32", backend="cpu")
    with backend.level_cap("scalar") as level:
        assert level == "scalar"
        there = ops.quant_matmul(x, w, activation="fp32", backend="cpu")
    assert not torch.equal(here, there)
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4)


BAD = {
    "packed size": lambda data: torch.ops.fastdl.quant_matmul(torch.ones(1, 64), data[:-1], None, 3, 20, 0),
    "width": lambda data: torch.ops.fastdl.quant_matmul(torch.ones(1, 96), data, None, 3, 20, 0),
    "rows": lambda data: torch.ops.fastdl.quant_matmul(torch.ones(1, 64), data, None, 3, 40, 0),
    "format": lambda data: torch.ops.fastdl.quant_matmul(torch.ones(1, 64), data, None, 99, 20, 0),
    "activation": lambda data: torch.ops.fastdl.quant_matmul(torch.ones(1, 64), data, None, 3, 20, 7),
    "bias": lambda data: torch.ops.fastdl.quant_matmul(torch.ones(1, 64), data, torch.ones(3), 3, 20, 0),
    "gradient": lambda data: torch.ops.fastdl.quant_matmul_backward(torch.ones(1, 40), data, 3, 64),
    "high id": lambda data: torch.ops.fastdl.quant_rows(data, torch.tensor([20]), 3, 20, 64, torch.float32),
    "low id": lambda data: torch.ops.fastdl.quant_rows(data, torch.tensor([-1]), 3, 20, 64, torch.float32),
    "bytes": lambda data: torch.ops.fastdl.quant_pack(torch.zeros(4, 39, dtype=torch.uint8), 3, 64),
    # 2**58 panels of 320 bytes are 0 bytes modulo 2**64
    "rows overflow": lambda data: torch.ops.fastdl.quant_rows(data[:0], torch.tensor([9]), 3, 2**62, 32, torch.float32),
    "cols overflow": lambda data: torch.ops.fastdl.quant_rows(data, torch.tensor([0]), 0, 1, 2**58, torch.float32),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_memory_safety_behind_the_public_functions(call):
    """The raw ops refuse sizes that do not fit, whatever Python checked."""
    data = random_weight("q4_1", 20, 64).pack_().data
    with pytest.raises(RuntimeError, match="fastdl"):
        call(data)
