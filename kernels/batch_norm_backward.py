"""Room batch_norm in Triton, backward (contract: fastdl/ops/batch_norm.py; meaning: fastdl/reference/batch_norm.py).

    g = grad where y > 0, else 0 (grad without a ReLU);   dresidual = g
    dweight = sum(g * h),  dbias = sum(g)  of a channel over the batch
    training  dx = weight * rstd * (g - mean(g) - h * mean(g * h));   evaluation  dx = weight * rstd * g

`products_planes` and `products_columns` cut the batch as the forward pass does; `sums` adds the parts in order; `dx`.

Test: pytest tests/test_batch_norm.py, make triton-compile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._channels import channel_of, cut, plane_offset
from ._common import capability, on
from .configs import block_for, blocks, config

# partial is [parts, 2, units]: the sums of g and of g * (x - mean). sums is [2, channels]: those of all parts.


@triton.jit
def _gate(grad, y, at, mask):
    g = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
    if y is not None:
        g = tl.where(tl.load(y + at, mask=mask, other=0.0).to(tl.float32) <= 0.0, 0.0, g)
    return g


@triton.jit
def products_planes(grad, x, y, mean, partial, channels, spatial, run, length, BLOCK: tl.constexpr):
    """Program (channel, part)."""
    channel, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part.to(tl.int64) * length
    count = tl.minimum(run - begin, length).to(tl.int32)
    center = tl.load(mean + channel)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_gd = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        at = plane_offset(begin, lane, channel, channels, spatial)
        g = _gate(grad, y, at, lane < count)
        apart = tl.load(x + at, mask=lane < count, other=0.0).to(tl.float32) - center
        sum_g += g
        sum_gd += tl.where(lane < count, g * apart, 0.0)
    to = partial + part.to(tl.int64) * 2 * channels + channel
    tl.store(to, tl.sum(sum_g, 0))
    tl.store(to + channels, tl.sum(sum_gd, 0))


@triton.jit
def products_columns(
    grad, x, y, mean, partial, units, spatial, run, length, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Program (tile of columns, part)."""
    part = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    begin = part * length
    end = tl.minimum(begin + length, run)
    center = tl.load(mean + unit // spatial, mask=unit < units, other=0.0)
    sum_g = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_gd = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (unit < units)
        at = row * units + unit
        g = _gate(grad, y, at, mask)
        apart = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) - center
        sum_g += g
        sum_gd += tl.where(mask, g * apart, 0.0)
    to = partial + part * 2 * units + unit
    tl.store(to, tl.sum(sum_g, 0)[None, :], mask=unit < units)
    tl.store(to + units, tl.sum(sum_gd, 0)[None, :], mask=unit < units)


@triton.jit
def sums(partial, var, sums, dweight, dbias, channels, width, parts, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Program: a tile of channels; each has parts * width pieces, where width is the columns of a channel."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = channel < channels
    units = channels * width
    sum_g = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_gd = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, parts * width, ROWS):
        piece = start + tl.arange(0, ROWS)[:, None]
        mask = (piece < parts * width) & inside
        at = partial + (piece // width).to(tl.int64) * 2 * units + channel * width + piece % width
        sum_g += tl.load(at, mask=mask, other=0.0)
        sum_gd += tl.load(at + units, mask=mask, other=0.0)
    g, gd = tl.sum(sum_g, 0)[None, :], tl.sum(sum_gd, 0)[None, :]
    tl.store(sums + channel, g, mask=inside)
    tl.store(sums + channels + channel, gd, mask=inside)
    if dbias is not None:
        tl.store(dbias + channel, g, mask=inside)
    if dweight is not None:
        tl.store(dweight + channel, gd * tl.rsqrt(tl.load(var + channel, mask=inside, other=1.0) + eps), mask=inside)


@triton.jit
def dx(
    grad, x, y, weight, mean, var, sums, dx, dresidual, size, channels, spatial, count, eps, BLOCK: tl.constexpr
):  # fmt: skip
    """Program: a tile of the whole tensor. count: elements of a channel; sums: None in evaluation."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = begin + lane < size
    channel = channel_of(begin, lane, channels, spatial)
    g = _gate(grad, y, begin + lane, mask)
    if dresidual is not None:
        tl.store(dresidual + begin + lane, g.to(dresidual.dtype.element_ty), mask=mask)
    scatter = tl.rsqrt(tl.load(var + channel) + eps)
    if sums is not None:
        apart = tl.load(x + begin + lane, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + channel)
        pull = tl.load(sums + channels + channel) / count * scatter * scatter
        g = g - tl.load(sums + channel) / count - apart * pull
    if weight is not None:
        scatter = scatter * tl.load(weight + channel).to(tl.float32)
    tl.store(dx + begin + lane, (g * scatter).to(dx.dtype.element_ty), mask=mask)


KERNELS = (products_planes, products_columns, sums, dx)


def batch_norm_backward(
    grad, x, y, weight, mean, var, eps, training, need_residual, need_weight, need_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results: fastdl/reference/batch_norm.py."""
    n, channels = x.shape[:2]
    out, cc = x.new_empty(x.shape), capability(x.device)
    dresidual = x.new_empty(x.shape if need_residual else 0)
    make = x.new_empty if x.numel() else x.new_zeros
    dweight, dbias = (make(channels if need else 0, dtype=torch.float32) for need in (need_weight, need_bias))
    if not x.numel():
        return out, dresidual, dweight, dbias
    grad, x, mean, var = (t.contiguous() for t in (grad, x, mean, var))
    y, weight = (None if t is None else t.contiguous() for t in (y, weight))
    spatial, totals = x.numel() // (n * channels), None
    with on(x.device):
        if training or need_weight or need_bias:
            c = cut(n, channels, spatial)
            partial = x.new_empty(c.parts, 2, c.units, dtype=torch.float32)
            totals = x.new_empty(2, channels, dtype=torch.float32)
            name = "batch_norm_products_columns" if c.columns else "batch_norm_products_planes"
            block = block_for(name, c.units if c.columns else c.length) or blocks(name)[-1]
            how, tensors = config(name, cc, block), (grad, x, y, mean, partial)
            if c.columns:
                grid = (triton.cdiv(c.units, block), c.parts)
                sizes = (c.units, spatial, c.run, c.length)
                products_columns[grid](*tensors, *sizes, BLOCK=block, ROWS=how.rows, **how.options)
            else:
                sizes = (channels, spatial, c.run, c.length)
                products_planes[(channels, c.parts)](*tensors, *sizes, BLOCK=block, **how.options)
            block = blocks("batch_norm_sums")[-1]
            how, wanted = config("batch_norm_sums", cc, block), (dweight if need_weight else None,)
            tensors = (partial, var, totals, *wanted, dbias if need_bias else None)
            sizes = (channels, c.units // channels, c.parts, eps)
            sums[(triton.cdiv(channels, block),)](*tensors, *sizes, BLOCK=block, ROWS=how.rows, **how.options)
        block = blocks("batch_norm_dx")[-1]
        tensors = (
            grad,
            x,
            y,
            weight,
            mean,
            var,
            totals if training else None,
            out,
            dresidual if need_residual else None,
        )
        sizes = (x.numel(), channels, spatial, n * spatial, eps)
        options = config("batch_norm_dx", cc, block).options
        dx[(triton.cdiv(x.numel(), block),)](*tensors, *sizes, BLOCK=block, **options)
    return out, dresidual, dweight, dbias
