"""Room batch_norm in Triton (contract: fastdl/ops/batch_norm.py; meaning: fastdl/reference/batch_norm.py).

    h = (x - mean) * rstd  of a channel over the batch;   y = relu(h * weight + bias + residual)

`moments_planes`, `moments_columns`: mean and squares of parts of the batch, for long channels and for short ones (and
channels last). `statistics` merges them, in order. `apply`. Floor: (reads of x twice, of residual + write of y) /
bandwidth; in evaluation x once.

Test: pytest tests/test_batch_norm.py, make triton-compile     Backward: batch_norm_backward.py     Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import batch_norm_backward as _backward
from ._channels import channel_of, cut, finite_or_zero, plane_offset
from ._common import Case, capability, case, on
from .batch_norm_backward import batch_norm_backward
from .configs import block_for, blocks, config

__all__ = ["batch_norm_backward", "batch_norm_forward", "compile_cases"]

# partial is [parts, 2, units]: mean, and sum of squared distances from it.


@triton.jit
def moments_planes(x, partial, channels, spatial, run, length, BLOCK: tl.constexpr):
    """Program (channel, part)."""
    channel, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part.to(tl.int64) * length
    count = tl.minimum(run - begin, length).to(tl.int32)
    origin = finite_or_zero(tl.load(x + plane_offset(begin, 0, channel, channels, spatial)).to(tl.float32))
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        at = plane_offset(begin, lane, channel, channels, spatial)
        total += tl.load(x + at, mask=lane < count, other=origin).to(tl.float32) - origin
    mean = origin + tl.sum(total, 0) / count
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        lane = start + tl.arange(0, BLOCK)
        at = plane_offset(begin, lane, channel, channels, spatial)
        apart = tl.load(x + at, mask=lane < count, other=0.0).to(tl.float32) - mean
        squares += tl.where(lane < count, apart * apart, 0.0)
    to = partial + part.to(tl.int64) * 2 * channels + channel
    tl.store(to, mean)
    tl.store(to + channels, tl.sum(squares, 0))


@triton.jit
def moments_columns(x, partial, units, run, length, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Program (tile of columns, part)."""
    part = tl.program_id(1).to(tl.int64)
    unit = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    begin = part * length
    end = tl.minimum(begin + length, run)
    first = tl.load(x + begin * units + unit, mask=unit < units, other=0.0).to(tl.float32)
    origin = finite_or_zero(first)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (unit < units)
        tile = tl.load(x + row * units + unit, mask=mask, other=0.0).to(tl.float32)
        total += tl.where(mask, tile - origin, 0.0)
    count = (end - begin).to(tl.float32)
    mean = origin + tl.sum(total, 0)[None, :] / count
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(begin, end, ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        mask = (row < end) & (unit < units)
        apart = tl.load(x + row * units + unit, mask=mask, other=0.0).to(tl.float32) - mean
        squares += tl.where(mask, apart * apart, 0.0)
    to = partial + part * 2 * units + unit
    tl.store(to, mean, mask=unit < units)
    tl.store(to + units, tl.sum(squares, 0)[None, :], mask=unit < units)


@triton.jit
def statistics(partial, mean, var, channels, width, run, parts, length, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Program: a tile of channels; each has parts * width pieces, where width is the columns of a channel."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = channel < channels
    units = channels * width
    origin = finite_or_zero(tl.load(partial + channel * width, mask=inside, other=0.0))
    size = run * 1.0 * width
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, parts * width, ROWS):
        piece = start + tl.arange(0, ROWS)[:, None]
        part = (piece // width).to(tl.int64)
        mask = (piece < parts * width) & inside
        count = tl.minimum(run - part * length, length).to(tl.float32)
        from_ = partial + part * 2 * units + channel * width + piece % width
        total += tl.where(mask, (tl.load(from_, mask=mask, other=0.0) - origin) * count, 0.0)
    center = origin + tl.sum(total, 0)[None, :] / size
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, parts * width, ROWS):
        piece = start + tl.arange(0, ROWS)[:, None]
        part = (piece // width).to(tl.int64)
        mask = (piece < parts * width) & inside
        count = tl.minimum(run - part * length, length).to(tl.float32)
        from_ = partial + part * 2 * units + channel * width + piece % width
        apart = tl.load(from_, mask=mask, other=0.0) - center
        squares += tl.where(mask, tl.load(from_ + units, mask=mask, other=0.0) + count * apart * apart, 0.0)
    tl.store(mean + channel, center, mask=inside)
    tl.store(var + channel, tl.sum(squares, 0)[None, :] / size, mask=inside)


@triton.jit
def apply(
    x, residual, weight, bias, mean, var, y, size, channels, spatial, eps, floor, BLOCK: tl.constexpr
):  # fmt: skip
    """Program: a tile of the whole tensor. floor: 0 with a ReLU, else -inf."""
    begin = tl.program_id(0).to(tl.int64) * BLOCK
    lane = tl.arange(0, BLOCK)
    mask = begin + lane < size
    channel = channel_of(begin, lane, channels, spatial)
    tile = tl.load(x + begin + lane, mask=mask, other=0.0).to(tl.float32) - tl.load(mean + channel)
    slope = tl.rsqrt(tl.load(var + channel) + eps)
    if weight is not None:
        slope = slope * tl.load(weight + channel).to(tl.float32)
    tile = tile * slope
    if bias is not None:
        tile = tile + tl.load(bias + channel).to(tl.float32)
    if residual is not None:
        tile = tile + tl.load(residual + begin + lane, mask=mask, other=0.0).to(tl.float32)
    tile = tl.where(tile <= floor, floor, tile)  # NaN stays
    tl.store(y + begin + lane, tile.to(y.dtype.element_ty), mask=mask)


def batch_norm_forward(x, residual, weight, bias, mean, var, eps, relu) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/batch_norm.py."""
    n, channels = x.shape[:2]
    y, cc, training = x.new_empty(x.shape), capability(x.device), mean is None or var is None
    make = x.new_empty if x.numel() else x.new_zeros
    found = tuple(make(channels if training else 0, dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return y, *found
    x, spatial = x.contiguous(), x.numel() // (n * channels)
    residual, weight, bias = (None if t is None else t.contiguous() for t in (residual, weight, bias))
    mean, var = found if training else (mean.contiguous(), var.contiguous())
    with on(x.device):
        if training:
            c = cut(n, channels, spatial)
            partial = x.new_empty(c.parts, 2, c.units, dtype=torch.float32)
            name = "batch_norm_moments_columns" if c.columns else "batch_norm_moments_planes"
            block = block_for(name, c.units if c.columns else c.length) or blocks(name)[-1]
            how = config(name, cc, block)
            if c.columns:
                grid = (triton.cdiv(c.units, block), c.parts)
                sizes = (c.units, c.run, c.length)
                moments_columns[grid](x, partial, *sizes, BLOCK=block, ROWS=how.rows, **how.options)
            else:
                sizes = (channels, spatial, c.run, c.length)
                moments_planes[(channels, c.parts)](x, partial, *sizes, BLOCK=block, **how.options)
            block = blocks("batch_norm_statistics")[-1]
            how = config("batch_norm_statistics", cc, block)
            sizes = (channels, c.units // channels, c.run, c.parts, c.length)
            grid = (triton.cdiv(channels, block),)
            statistics[grid](partial, mean, var, *sizes, BLOCK=block, ROWS=how.rows, **how.options)
        block = blocks("batch_norm_apply")[-1]
        floor = 0.0 if relu else float("-inf")
        tensors = (x, residual, weight, bias, mean, var, y, x.numel(), channels, spatial, eps, floor)
        options = config("batch_norm_apply", cc, block).options
        apply[(triton.cdiv(x.numel(), block),)](*tensors, BLOCK=block, **options)
    return y, *found


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: every kernel and tile, with every option on, and each kernel
    once without options, for a single element."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    types = dict.fromkeys(("x", "residual", "weight", "bias", "y", "grad", "dx", "dresidual"), dtype)
    types |= dict.fromkeys(("mean", "var", "partial", "sums", "dweight", "dbias"), "*fp32")
    types |= dict.fromkeys(("channels", "units", "width", "spatial", "run", "parts", "length", "size", "count"), "i32")
    types |= {"eps": "fp32", "floor": "fp32"}
    # A length is a multiple of 16; every other number may be 1, which Triton makes a constant.
    bare: dict[str, int | None] = dict.fromkeys(("residual", "weight", "bias", "dresidual", "dweight", "dbias"))
    bare |= dict.fromkeys((key for key, kind in types.items() if kind == "i32" and key != "length"), 1)
    gradient = {**bare, "y": None, "sums": None}
    for kernel in (moments_planes, moments_columns, statistics, apply, *_backward.KERNELS):
        name = f"batch_norm_{kernel.__name__}"
        for block in blocks(name):
            yield case(name, kernel, types, block, config(name, cc, block))
        constants = gradient if kernel is _backward.dx else bare
        yield case(name, kernel, types, blocks(name)[0], config(name, cc, blocks(name)[0]), constants, "bare")
