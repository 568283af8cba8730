"""Room norm in Triton, backward (contract: fastdl/ops/norm.py; meaning: fastdl/reference/norm.py).

    g  = grad * (weight + offset)
    ds = rstd * (g - mean(g) - h * mean(g * h)) + grad_sum      (RMS: without mean(g))       dx = dropout's mask of ds
    dweight = sum over rows of grad * h,   dbias = sum over rows of grad

`backward`: as many programs as fill the GPU walk over the rows, a tile of whole rows in registers beside their own sums
for dweight and dbias. `backward_stream`: wider rows tile by tile, the sums by `columns`. `partials` adds the partial
sums in order: the result depends on shape and the GPU's size, not on time. Floor: (reads of grad, grad_sum, s + writes
of ds, dx) / bandwidth.

Test: pytest tests/test_norm.py, make triton-compile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import as_rows, capability, dropout, dropout_scale, on, processors
from .configs import block_for, blocks, config

# In the helpers row is int64 [ROWS, 1], col [1, BLOCK], mask [ROWS, BLOCK]; tiles are float32.


@triton.jit
def _gradients(grad, s, weight, center, scatter, row, col, mask, cols, grad_stride, s_stride, offset):
    """grad, h and g. Outside the mask grad and g are 0, and h is finite where the row is."""
    d = tl.load(grad + row * grad_stride + col, mask=mask, other=0.0).to(tl.float32)
    h = (tl.load(s + row * s_stride + col, mask=mask, other=0.0).to(tl.float32) - center) * scatter
    g = d
    if weight is not None:
        g = d * (tl.load(weight + col, mask=col < cols, other=0.0).to(tl.float32) + offset)
    return d, h, g


@triton.jit
def _store_gradients(
    h, g, mean_gh, mean_g, scatter, grad_sum, seed, ds, dx, row, col, mask, cols, sum_stride, p, scale
):
    tile = (g - mean_g - h * mean_gh) * scatter
    if grad_sum is not None:
        tile = tile + tl.load(grad_sum + row * sum_stride + col, mask=mask, other=0.0).to(tl.float32)
    tl.store(ds + row * cols + col, tile.to(ds.dtype.element_ty), mask=mask)
    if seed is not None:
        tile = dropout(tile, tl.load(seed), row * cols + col, p, scale)
        tl.store(dx + row * cols + col, tile.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    grad, grad_sum, s, weight, mean, rstd, seed, ds, dx, dweight, dbias, rows, cols, grad_stride, sum_stride, s_stride,
    p, scale, offset, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """dweight, dbias: [programs, cols] partial sums, or None."""
    part = tl.program_id(0)
    col = tl.arange(0, BLOCK)[None, :]
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(part.to(tl.int64) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (col < cols)
        scatter = tl.load(rstd + row, mask=row < rows, other=0.0)
        center = tl.zeros([ROWS, 1], tl.float32)
        if mean is not None:
            center = tl.load(mean + row, mask=row < rows, other=0.0)
        d, h, g = _gradients(grad, s, weight, center, scatter, row, col, mask, cols, grad_stride, s_stride, offset)
        mean_gh = tl.sum(g * h, 1)[:, None] / cols
        mean_g = tl.zeros([ROWS, 1], tl.float32)
        if mean is not None:
            mean_g = tl.sum(g, 1)[:, None] / cols
        _store_gradients(
            h, g, mean_gh, mean_g, scatter, grad_sum, seed, ds, dx, row, col, mask, cols, sum_stride, p, scale
        )  # fmt: skip
        if dweight is not None:
            weight_sum += d * h
        if dbias is not None:
            bias_sum += d
    to = part.to(tl.int64) * cols + tl.arange(0, BLOCK)
    if dweight is not None:
        tl.store(dweight + to, tl.sum(weight_sum, 0), mask=tl.arange(0, BLOCK) < cols)
    if dbias is not None:
        tl.store(dbias + to, tl.sum(bias_sum, 0), mask=tl.arange(0, BLOCK) < cols)


@triton.jit
def backward_stream(
    grad, grad_sum, s, weight, mean, rstd, seed, ds, dx, cols, grad_stride, sum_stride, s_stride, p, scale, offset,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) + tl.zeros([1, 1], tl.int64)
    lanes = tl.arange(0, BLOCK)[None, :]
    scatter = tl.load(rstd + row)
    center = tl.zeros([1, 1], tl.float32)
    if mean is not None:
        center = tl.load(mean + row)
    sum_gh = tl.zeros([1, BLOCK], tl.float32)
    sum_g = tl.zeros([1, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        _, h, g = _gradients(
            grad, s, weight, center, scatter, row, col, col < cols, cols, grad_stride, s_stride, offset
        )  # fmt: skip
        sum_gh += g * h
        sum_g += g
    mean_gh = tl.sum(sum_gh, 1)[:, None] / cols
    mean_g = tl.zeros([1, 1], tl.float32)
    if mean is not None:
        mean_g = tl.sum(sum_g, 1)[:, None] / cols
    for start in range(0, cols, BLOCK):
        col = start + lanes
        mask = col < cols
        _, h, g = _gradients(grad, s, weight, center, scatter, row, col, mask, cols, grad_stride, s_stride, offset)
        _store_gradients(
            h, g, mean_gh, mean_g, scatter, grad_sum, seed, ds, dx, row, col, mask, cols, sum_stride, p, scale
        )  # fmt: skip


@triton.jit
def columns(
    grad, s, mean, rstd, dweight, dbias, rows, cols, grad_stride, s_stride, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Program (tile of columns, part): its line of dweight and dbias [parts, cols], or None where not asked for."""
    part = tl.program_id(1)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = at[None, :]
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(part.to(tl.int64) * ROWS, rows, tl.num_programs(1) * ROWS):
        row = (start + tl.arange(0, ROWS))[:, None]
        mask = (row < rows) & (col < cols)
        d = tl.load(grad + row * grad_stride + col, mask=mask, other=0.0).to(tl.float32)
        if dweight is not None:
            h = tl.load(s + row * s_stride + col, mask=mask, other=0.0).to(tl.float32)
            if mean is not None:
                h = h - tl.load(mean + row, mask=row < rows, other=0.0)
            weight_sum += d * (h * tl.load(rstd + row, mask=row < rows, other=0.0))
        if dbias is not None:
            bias_sum += d
    if dweight is not None:
        tl.store(dweight + part.to(tl.int64) * cols + at, tl.sum(weight_sum, 0), mask=at < cols)
    if dbias is not None:
        tl.store(dbias + part.to(tl.int64) * cols + at, tl.sum(bias_sum, 0), mask=at < cols)


@triton.jit
def partials(weight_parts, bias_parts, dweight, dbias, parts, cols, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """dweight, dbias [cols]: sums of weight_parts, bias_parts [parts, cols], always in the same order."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, parts, ROWS):
        part = (start + tl.arange(0, ROWS).to(tl.int64))[:, None]
        mask = (part < parts) & (at < cols)[None, :]
        if dweight is not None:
            weight_sum += tl.load(weight_parts + part * cols + at[None, :], mask=mask, other=0.0)
        if dbias is not None:
            bias_sum += tl.load(bias_parts + part * cols + at[None, :], mask=mask, other=0.0)
    if dweight is not None:
        tl.store(dweight + at, tl.sum(weight_sum, 0), mask=at < cols)
    if dbias is not None:
        tl.store(dbias + at, tl.sum(bias_sum, 0), mask=at < cols)


KERNELS = (backward, backward_stream, columns, partials)


def norm_backward(
    grad, grad_sum, s, weight, mean, rstd, seed, p, eps, offset, rms, need_weight, need_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results: fastdl/reference/norm.py."""
    shape, cols, cc = s.shape, s.shape[-1], capability(s.device)
    rows = s.numel() // cols
    ds = s.new_empty(shape)
    dx = s.new_empty(0 if seed is None else shape)
    make = s.new_empty if rows else s.new_zeros
    dweight, dbias = (make(cols if need else 0, dtype=torch.float32) for need in (need_weight, need_bias))
    if rows == 0:
        return ds, dx, dweight, dbias
    (grad, grad_stride), (s, s_stride) = as_rows(grad), as_rows(s)
    grad_sum, sum_stride = (None, 0) if grad_sum is None else as_rows(grad_sum)
    weight, mean = None if weight is None else weight.contiguous(), None if rms else mean
    tensors = (grad, grad_sum, s, weight, mean, rstd, seed, ds, None if seed is None else dx)
    scalars = (grad_stride, sum_stride, s_stride, p, dropout_scale(p), offset)
    block, tile = block_for("norm_backward", cols), blocks("norm_columns")[-1]
    c = config("norm_columns", cc, tile) if block is None else config("norm_backward", cc, block)
    # parts decides the order of the sums: a function of shape and GPU alone. `columns` has a grid over columns besides.
    parts = 64 if block is None else processors(s.device) * c.programs
    parts = min(triton.cdiv(rows, c.rows), 2 if cc is None else parts)
    sums = tuple(s.new_empty(parts, cols, dtype=torch.float32) if n else None for n in (need_weight, need_bias))
    with on(s.device):
        if block is not None:
            backward[(parts,)](*tensors, *sums, rows, cols, *scalars, BLOCK=block, ROWS=c.rows, **c.options)
        else:
            wide = blocks("norm_backward_stream")[-1]
            options = config("norm_backward_stream", cc, wide).options
            backward_stream[(rows,)](*tensors, cols, *scalars, BLOCK=wide, **options)
            if need_weight or need_bias:
                grid = (triton.cdiv(cols, tile), parts)
                tensors = (grad, s, mean, rstd, *sums, rows, cols, grad_stride, s_stride)
                columns[grid](*tensors, BLOCK=tile, ROWS=c.rows, **c.options)
        if need_weight or need_bias:
            tile = blocks("norm_partials")[-1]
            c = config("norm_partials", cc, tile)
            tensors = (*sums, dweight if need_weight else None, dbias if need_bias else None, parts, cols)
            partials[(triton.cdiv(cols, tile),)](*tensors, BLOCK=tile, ROWS=c.rows, **c.options)
    return ds, dx, dweight, dbias
