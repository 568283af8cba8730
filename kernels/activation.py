"""Room activation in Triton (contract: fastdl/ops/activation.py; meaning: fastdl/reference/activation.py).

    y = residual + dropout(f(x + bias)),  dx = dropout's mask of grad * f'(x + bias),  y = f(gate) * up

A program takes a tile of columns and walks over rows; in the backward it keeps its own sums for dbias and dbeta, which
are added afterwards in the order of the programs. Every element is read and written once. A missing tensor is None,
which the compiler takes for a constant. Floor: (reads of x, residual or grad + writes) / bandwidth.

Test: pytest tests/test_activation.py, make triton-compile        Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, as_rows, capability, case, dropout, dropout_scale, on, processors, sigmoid, tanh
from .configs import block_for, blocks, config

__all__ = ["activation_backward", "activation_forward", "compile_cases", "glu_backward", "glu_forward"]

# A kind's number is its place here, as in fastdl/reference/activation.py.
KINDS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "swish", "tanh", "sigmoid", "identity")
RELU, LEAKY_RELU, GELU, GELU_TANH, SWISH, TANH, SIGMOID = (tl.constexpr(number) for number in range(7))


@triton.jit
def _sigmoid_slope(t):
    """g (1 - g), without the cancellation of 1 - g."""
    e = tl.exp(-tl.abs(t))
    return e / ((1.0 + e) * (1.0 + e))


@triton.jit
def _normal(t):
    return 0.5 + 0.5 * tl.erf(t * 0.7071067811865476)


@triton.jit
def _value(t, alpha, KIND: tl.constexpr):
    """f(t)."""
    if KIND == RELU:
        return tl.where(t <= 0, 0.0, t)
    elif KIND == LEAKY_RELU:
        return tl.where(t <= 0, t * alpha, t)
    elif KIND == GELU:
        return t * _normal(t)
    elif KIND == GELU_TANH:  # (1 + tanh(u)) / 2 = sigmoid(2 u)
        return t * sigmoid(t * (1.5957691216 + 0.0713548163 * t * t))
    elif KIND == SWISH:
        return t * sigmoid(t * alpha)
    elif KIND == TANH:
        return tanh(t)
    elif KIND == SIGMOID:
        return sigmoid(t)
    else:
        return t


@triton.jit
def _slope(t, alpha, KIND: tl.constexpr):
    """f'(t)."""
    if KIND == RELU:
        return tl.where(t <= 0, 0.0, 1.0)
    elif KIND == LEAKY_RELU:
        return tl.where(t <= 0, alpha, 1.0)
    elif KIND == GELU:
        return _normal(t) + t * 0.3989422804 * tl.exp(-0.5 * t * t)
    elif KIND == GELU_TANH:
        v = t * (1.5957691216 + 0.0713548163 * t * t)
        return sigmoid(v) + t * _sigmoid_slope(v) * (1.5957691216 + 0.2140644488 * t * t)
    elif KIND == SWISH:
        return sigmoid(t * alpha) + alpha * t * _sigmoid_slope(t * alpha)
    elif KIND == TANH:
        return 4.0 * _sigmoid_slope(2.0 * t)  # 1 - tanh(t)^2, which cancels
    elif KIND == SIGMOID:
        return _sigmoid_slope(t)
    else:
        return t * 0.0 + 1.0


@triton.jit
def _biased(x, bias, row, col, mask, rows, cols, x_stride, channels, BY_ROW: tl.constexpr):
    tile = tl.load(x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        if BY_ROW:
            tile += tl.load(bias + row % channels, mask=row < rows, other=0.0).to(tl.float32)
        else:
            tile += tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)
    return tile


@triton.jit
def _masked(tile, seed, row, col, cols, p, scale, BY_ROW: tl.constexpr):
    if seed is None:
        return tile
    elif BY_ROW:
        return dropout(tile, tl.load(seed), row + col * 0, p, scale)
    else:
        return dropout(tile, tl.load(seed), row * cols + col, p, scale)


@triton.jit
def forward(
    x, bias, residual, beta, seed, y, rows, cols, x_stride, other_stride, channels, alpha, p, scale,
    KIND: tl.constexpr, BIAS_BY_ROW: tl.constexpr, MASK_BY_ROW: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    col = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    if beta is not None:
        alpha = tl.load(beta)
    # 64 bits: the last step may go past 2^31
    for first in range(tl.program_id(1).to(tl.int64) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (col < cols)
        t = _biased(x, bias, row, col, mask, rows, cols, x_stride, channels, BIAS_BY_ROW)
        v = _masked(_value(t, alpha, KIND), seed, row, col, cols, p, scale, MASK_BY_ROW)
        if residual is not None:
            v = tl.load(residual + row * other_stride + col, mask=mask, other=0.0).to(tl.float32) + v
        tl.store(y + row * cols + col, v.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    grad, x, bias, beta, seed, dx, bias_parts, beta_parts, rows, cols, x_stride, other_stride, channels, alpha, p,
    scale, KIND: tl.constexpr, BIAS_BY_ROW: tl.constexpr, MASK_BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """bias_parts: [programs along the rows, cols], by row [rows, tiles]; beta_parts [programs along rows, tiles]."""
    tile, tiles = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    col = (tile * BLOCK + tl.arange(0, BLOCK))[None, :]
    if beta is not None:
        alpha = tl.load(beta)
    columns = tl.zeros([ROWS, BLOCK], tl.float32)
    by_beta = tl.zeros([ROWS, BLOCK], tl.float32)
    # 64 bits: the last step may go past 2^31
    for first in range(tl.program_id(1).to(tl.int64) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (col < cols)
        t = _biased(x, bias, row, col, mask, rows, cols, x_stride, channels, BIAS_BY_ROW)
        d = tl.load(grad + row * other_stride + col, mask=mask, other=0.0).to(tl.float32)
        d = _masked(d, seed, row, col, cols, p, scale, MASK_BY_ROW)
        dt = tl.where(mask, d * _slope(t, alpha, KIND), 0.0)
        tl.store(dx + row * cols + col, dt.to(dx.dtype.element_ty), mask=mask)
        if bias_parts is not None:
            if BIAS_BY_ROW:
                tl.store(bias_parts + row * tiles + tile, tl.sum(dt, 1)[:, None], mask=row < rows)
            else:
                columns += dt
        if beta_parts is not None:
            by_beta += tl.where(mask, d * t * t * _sigmoid_slope(t * alpha), 0.0)
    if bias_parts is not None and not BIAS_BY_ROW:
        tl.store(bias_parts + tl.program_id(1) * cols + col, tl.sum(columns, 0)[None, :], mask=col < cols)
    if beta_parts is not None:
        tl.store(beta_parts + tl.program_id(1) * tiles + tile, tl.sum(tl.sum(by_beta, 1), 0))


@triton.jit
def glu(
    grad, gate, up, y, dgate, dup, rows, cols, gate_stride, up_stride, other_stride,
    KIND: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Forward without grad (y), backward with it (dgate, dup)."""
    col = (tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    # 64 bits: the last step may go past 2^31
    for first in range(tl.program_id(1).to(tl.int64) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (first + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (col < cols)
        g = tl.load(gate + row * gate_stride + col, mask=mask, other=0.0).to(tl.float32)
        u = tl.load(up + row * up_stride + col, mask=mask, other=0.0).to(tl.float32)
        if grad is None:
            tl.store(y + row * cols + col, (_value(g, 1.0, KIND) * u).to(y.dtype.element_ty), mask=mask)
        else:
            d = tl.load(grad + row * other_stride + col, mask=mask, other=0.0).to(tl.float32)
            dg = d * u * _slope(g, 1.0, KIND)
            tl.store(dgate + row * cols + col, dg.to(dgate.dtype.element_ty), mask=mask)
            tl.store(dup + row * cols + col, (d * _value(g, 1.0, KIND)).to(dup.dtype.element_ty), mask=mask)


@triton.jit
def sums(parts, total, outer, channels, inner, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """total[c] = sum over i < outer and j < inner of parts[i, c, j]."""
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(0, outer * inner, ROWS):
        part = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        at = (part // inner * channels + col[None, :]) * inner + part % inner
        tile += tl.load(parts + at, mask=(part < outer * inner) & (col[None, :] < channels), other=0.0)
    tl.store(total + col, tl.sum(tile, 0), mask=col < channels)


FLAT = 4096  # columns that a contiguous tensor is cut into, where nothing depends on columns


def _rows(tensors: tuple[Tensor, ...], inner: int, by_column: bool) -> tuple[list[Tensor], list[int], int, int]:
    """Tensors of one shape as rows: (tensors, distances, rows, cols)."""
    x = tensors[0]
    if inner > 1:
        return [t.contiguous() for t in tensors], [inner] * len(tensors), x.numel() // inner, inner
    if not by_column and all(t.is_contiguous() for t in tensors):
        cols = FLAT if x.numel() % FLAT == 0 else x.shape[-1] if x.dim() else 1
        return list(tensors), [cols] * len(tensors), x.numel() // cols, cols
    pairs = [as_rows(t) for t in tensors]
    return [t for t, _ in pairs], [stride for _, stride in pairs], x.numel() // x.shape[-1], x.shape[-1]


def _grid(kernel: str, device: torch.device, rows: int, cols: int) -> tuple[tuple[int, int], int, Any]:
    """(tiles of columns, programs along the rows), the tile's width, the configuration."""
    block = block_for(kernel, cols) or blocks(kernel)[-1]
    c = config(kernel, capability(device), block)
    tiles = triton.cdiv(cols, block)
    most = min(triton.cdiv(processors(device) * c.programs, tiles), 65535)
    return (tiles, min(triton.cdiv(rows, c.rows), most)), block, c


def activation_forward(x, bias, residual, beta, seed, kind, alpha, p, inner, by_channel) -> Tensor:
    """Arguments and result: fastdl/reference/activation.py."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    given = (x,) if residual is None else (x, residual)
    tensors, strides, rows, cols = _rows(given, inner, bias is not None)
    grid, block, c = _grid("activation_forward", x.device, rows, cols)
    with on(x.device):
        forward[grid](
            tensors[0], None if bias is None else bias.contiguous(), None if residual is None else tensors[1], beta,
            seed, y, rows, cols, strides[0], strides[-1], 1 if bias is None else bias.numel(), alpha, p,
            dropout_scale(p), KIND=kind, BIAS_BY_ROW=inner > 1, MASK_BY_ROW=by_channel and inner > 1, BLOCK=block,
            ROWS=c.rows, **c.options,
        )  # fmt: skip
    return y


def activation_backward(
    grad, x, bias, beta, seed, kind, alpha, p, inner, by_channel, need_bias, need_beta
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/activation.py."""
    dx, empty = x.new_empty(x.shape), x.new_empty(0, dtype=torch.float32)
    if x.numel() == 0:
        dbias = empty.new_zeros(bias.numel()) if need_bias else empty
        return dx, dbias, empty.new_zeros(1) if need_beta else empty.clone()
    (x, grad), strides, rows, cols = _rows((x, grad), inner, bias is not None)
    grid, block, c = _grid("activation_backward", x.device, rows, cols)
    shape = (rows, grid[0]) if inner > 1 else (grid[1], cols)
    bias_parts = empty.new_empty(shape) if need_bias else None
    beta_parts = empty.new_empty((grid[1], grid[0])) if need_beta else None
    with on(x.device):
        backward[grid](
            grad, x, None if bias is None else bias.contiguous(), beta, seed, dx, bias_parts, beta_parts, rows, cols,
            strides[0], strides[1], 1 if bias is None else bias.numel(), alpha, p, dropout_scale(p), KIND=kind,
            BIAS_BY_ROW=inner > 1, MASK_BY_ROW=by_channel and inner > 1, BLOCK=block, ROWS=c.rows, **c.options,
        )  # fmt: skip
        dbias, dbeta = empty, empty.clone()
        if need_bias:
            dbias = _sum(bias_parts, bias.numel(), grid[0] if inner > 1 else 1)
        if need_beta:
            dbeta = _sum(beta_parts, 1, beta_parts.numel())
    return dx, dbias, dbeta


def _sum(parts: Tensor, channels: int, inner: int) -> Tensor:
    total = parts.new_empty(channels)
    block = blocks("activation_sums")[-1]
    c = config("activation_sums", capability(parts.device), block)
    outer = parts.numel() // (channels * inner)
    sums[(triton.cdiv(channels, block),)](parts, total, outer, channels, inner, BLOCK=block, ROWS=c.rows, **c.options)
    return total


def glu_forward(gate, up, kind) -> Tensor:
    """Arguments and result: fastdl/reference/activation.py."""
    y = gate.new_empty(gate.shape)
    if gate.numel():
        tensors, strides, rows, cols = _rows((gate, up), 1, False)
        grid, block, c = _grid("activation_glu", gate.device, rows, cols)
        with on(gate.device):
            glu[grid](
                None, *tensors, y, None, None, rows, cols, *strides, cols, KIND=kind, BLOCK=block, ROWS=c.rows,
                **c.options,
            )  # fmt: skip
    return y


def glu_backward(grad, gate, up, kind) -> tuple[Tensor, Tensor]:
    """Arguments and results: fastdl/reference/activation.py."""
    dgate, dup = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if gate.numel():
        (gate, up, grad), strides, rows, cols = _rows((gate, up, grad), 1, False)
        grid, block, c = _grid("activation_glu", gate.device, rows, cols)
        with on(gate.device):
            glu[grid](
                grad, gate, up, None, dgate, dup, rows, cols, *strides, KIND=kind, BLOCK=block, ROWS=c.rows, **c.options
            )
    return dgate, dup


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: every kind with every option on, at every tile, and each
    kernel once without options."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    tensors = ("x", "bias", "residual", "grad", "y", "dx", "gate", "up", "dgate", "dup")
    floats = ("beta", "bias_parts", "beta_parts", "parts", "total")
    types = dict.fromkeys(tensors, dtype) | dict.fromkeys(floats, "*fp32")
    sizes = ("rows", "cols", "x_stride", "other_stride", "gate_stride", "up_stride", "channels", "outer", "inner")
    types |= dict.fromkeys(sizes, "i32") | {"seed": "*i64", "alpha": "fp32", "p": "fp32", "scale": "fp32"}
    none: dict[str, Any] = dict.fromkeys(("bias", "residual", "beta", "seed", "bias_parts", "beta_parts"))
    for kernel in (forward, backward):
        name = f"activation_{kernel.__name__}"
        narrow, *_, wide = blocks(name)
        bare = {**none, "KIND": 0, "BIAS_BY_ROW": False, "MASK_BY_ROW": False}
        yield case(name, kernel, types, narrow, config(name, cc, narrow), bare, "bare")
        rows = {"KIND": GELU.value, "BIAS_BY_ROW": True, "MASK_BY_ROW": True, "beta": None, "beta_parts": None}
        yield case(name, kernel, types, wide, config(name, cc, wide), rows, "by row")
        for block in (narrow, wide):
            for kind, word in enumerate(KINDS):
                constants = {"KIND": kind, "BIAS_BY_ROW": False, "MASK_BY_ROW": False}
                constants |= {} if kind == SWISH.value else {"beta": None, "beta_parts": None}
                yield case(name, kernel, types, block, config(name, cc, block), constants, word)
    name = "activation_glu"
    for block in blocks(name):
        for kind in (GELU.value, GELU_TANH.value, SWISH.value):
            c, word = config(name, cc, block), KINDS[kind]
            yield case(name, glu, types, block, c, {"KIND": kind, "grad": None, "dgate": None, "dup": None}, word)
            yield case(name, glu, types, block, c, {"KIND": kind, "y": None}, f"{word} backward")
    name = "activation_sums"
    for block in blocks(name):
        yield case(name, sums, types, block, config(name, cc, block))
