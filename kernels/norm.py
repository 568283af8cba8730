"""Room norm in Triton (contract: fastdl/ops/norm.py; meaning: fastdl/reference/norm.py).

    s = residual + dropout(x);  h = (s - mean(s)) * rstd  (RMS: h = s * rstd);  y = h * (weight + offset) + bias

`forward`: a tile of whole rows in registers, so that memory is read once; the variance is summed around the mean.
`forward_stream`: wider rows tile by tile, the second and third time from the cache. A missing tensor is None, which the
compiler takes for a constant. Floor: (reads of x, residual + writes of y, s) / bandwidth.

Test: pytest tests/test_norm.py, make triton-compile        Backward: norm_backward.py        Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import norm_backward as _backward
from ._common import Case, as_rows, capability, case, dropout, dropout_scale, on
from .configs import block_for, blocks, config
from .norm_backward import norm_backward

__all__ = ["compile_cases", "norm_backward", "norm_forward", "norm_inference"]

# In the helpers row is int64 [ROWS, 1], col [1, BLOCK], mask [ROWS, BLOCK]; tiles are float32.


@triton.jit
def _sum(x, residual, seed, s, row, col, mask, cols, x_stride, residual_stride, p, scale):
    """s rounded to its dtype, stored where it is asked for; 0 outside the mask."""
    tile = tl.load(x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
    if seed is not None:
        tile = dropout(tile, tl.load(seed), row * cols + col, p, scale)
    if residual is not None:
        tile = tl.load(residual + row * residual_stride + col, mask=mask, other=0.0).to(tl.float32) + tile
    if s is not None:
        rounded = tile.to(s.dtype.element_ty)
        tl.store(s + row * cols + col, rounded, mask=mask)
        tile = rounded.to(tl.float32)
    return tile


@triton.jit
def _finish(tile, mean, rstd, weight, bias, y, row, col, mask, cols, offset):
    tile = (tile - mean) * rstd
    if weight is not None:
        tile = tile * (tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32) + offset)
    if bias is not None:
        tile = tile + tl.load(bias + col, mask=col < cols, other=0.0).to(tl.float32)
    tl.store(y + row * cols + col, tile.to(y.dtype.element_ty), mask=mask)


@triton.jit
def forward(
    x, residual, weight, bias, seed, y, s, mean, rstd, rows, cols, x_stride, residual_stride, p, scale, eps, offset,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    mask = (row < rows) & (col < cols)
    tile = _sum(x, residual, seed, s, row, col, mask, cols, x_stride, residual_stride, p, scale)
    center = tl.zeros([ROWS, 1], tl.float32)
    if mean is not None:
        center = tl.sum(tile, 1)[:, None] / cols
        tl.store(mean + row, center, mask=row < rows)
    apart = tl.where(mask, tile - center, 0.0)
    scatter = tl.rsqrt(tl.sum(apart * apart, 1)[:, None] / cols + eps)
    tl.store(rstd + row, scatter, mask=row < rows)
    _finish(tile, center, scatter, weight, bias, y, row, col, mask, cols, offset)


@triton.jit
def forward_stream(
    x, residual, weight, bias, seed, y, s, mean, rstd, cols, x_stride, residual_stride, p, scale, eps, offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    lanes = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        total += _sum(x, residual, seed, s, row, col, col < cols, cols, x_stride, residual_stride, p, scale)
    center = tl.zeros([1, 1], tl.float32)
    if mean is not None:
        center = tl.sum(total, 1)[:, None] / cols
        tl.store(mean + row, center)
    again = x + row * x_stride
    if s is not None:
        again = s + row * cols
        tl.debug_barrier()  # threads may read what others of the program have written
    squares = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        apart = tl.load(again + col, mask=col < cols, other=0.0).to(tl.float32) - center
        squares += tl.where(col < cols, apart * apart, 0.0)
    scatter = tl.rsqrt(tl.sum(squares, 1)[:, None] / cols + eps)
    tl.store(rstd + row, scatter)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        tile = tl.load(again + col, mask=col < cols, other=0.0).to(tl.float32)
        _finish(tile, center, scatter, weight, bias, y, row, col, col < cols, cols, offset)


def norm_forward(x, residual, weight, bias, seed, p, eps, offset, rms) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/norm.py."""
    shape, cols = x.shape, x.shape[-1]
    rows = x.numel() // cols
    y = x.new_empty(shape)
    s = x.new_empty(0 if residual is None and seed is None else shape)
    mean = x.new_empty(0 if rms else shape[:-1], dtype=torch.float32)
    rstd = x.new_empty(shape[:-1], dtype=torch.float32)
    if rows == 0:
        return y, s, mean, rstd
    x, x_stride = as_rows(x)
    residual, residual_stride = (None, 0) if residual is None else as_rows(residual)
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    kept = None if residual is None and seed is None else s
    tensors = (x, residual, weight, bias, seed, y, kept, None if rms else mean, rstd)
    scalars = (cols, x_stride, residual_stride, p, dropout_scale(p), eps, offset)
    block, cc = block_for("norm_forward", cols), capability(x.device)
    with on(x.device):
        if block is not None:
            c = config("norm_forward", cc, block)
            forward[(triton.cdiv(rows, c.rows),)](*tensors, rows, *scalars, BLOCK=block, ROWS=c.rows, **c.options)
        else:
            block = blocks("norm_forward_stream")[-1]
            c = config("norm_forward_stream", cc, block)
            forward_stream[(rows,)](*tensors, *scalars, BLOCK=block, **c.options)
    return y, s, mean, rstd


def norm_inference(x, residual, weight, bias, eps, offset, rms, need_sum) -> tuple[Tensor, Tensor]:
    """Arguments and results: fastdl/reference/norm.py. Writes s and the statistics all the same."""
    y, s, _, _ = norm_forward(x, residual, weight, bias, None, 0.0, eps, offset, rms)
    return y, (s if need_sum else x.new_empty(0))


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: every kernel and tile, with every option on, and each kernel
    once without options, for a single element."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    types = dict.fromkeys(("x", "residual", "weight", "bias", "y", "s", "grad", "grad_sum", "ds", "dx"), dtype)
    types |= dict.fromkeys(("mean", "rstd", "dweight", "dbias", "weight_parts", "bias_parts"), "*fp32")
    types |= dict.fromkeys(("rows", "cols", "parts", "x_stride", "residual_stride"), "i32")
    types |= dict.fromkeys(("grad_stride", "sum_stride", "s_stride"), "i32")
    types |= {"seed": "*i64", "p": "fp32", "scale": "fp32", "eps": "fp32", "offset": "fp32"}
    bare: dict[str, int | None] = dict.fromkeys(("residual", "weight", "bias", "seed", "mean", "grad_sum", "dx"))
    bare |= dict.fromkeys((key for key, kind in types.items() if kind == "i32"), 1)
    for kernel in (forward, forward_stream, *_backward.KERNELS):
        name = f"norm_{kernel.__name__}"
        constants = {**bare, "s": None} if kernel in (forward, forward_stream) else bare
        yield case(name, kernel, types, blocks(name)[0], config(name, cc, blocks(name)[0]), constants, "bare")
        for block in blocks(name):
            yield case(name, kernel, types, block, config(name, cc, block))
