"""Room group_norm in Triton (contract: fastdl/ops/group_norm.py; meaning: fastdl/reference/group_norm.py).

    h = (x - mean) * rstd  over a group of channels;   y = scale * (h * weight + bias) + shift

A group is one run of memory, cut into parts. `moments`: mean and squares of a part. `apply`: merges them, in order, and
writes its part of y. Floor: (read of x + write of y) / bandwidth; groups larger than the cache are read twice.

Test: pytest tests/test_group_norm.py, make triton-compile     Backward: group_norm_backward.py     Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import group_norm_backward as _backward
from ._channels import check_group, finite_or_zero, merged, part_count, part_length
from ._common import Case, capability, case, on
from .configs import block_for, blocks, config
from .group_norm_backward import group_norm_backward

__all__ = ["compile_cases", "group_norm_backward", "group_norm_forward"]


@triton.jit
def moments(x, partial, size, parts, length, BLOCK: tl.constexpr):
    """Program (row, part): partial[row, part] = mean, sum of squared distances from it."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin = part * length
    end = tl.minimum(begin + length, size)
    base = x + row * size
    origin = finite_or_zero(tl.load(base + begin).to(tl.float32))
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        total += tl.load(base + at, mask=at < end, other=origin).to(tl.float32) - origin
    mean = origin + tl.sum(total, 0) / (end - begin)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        apart = tl.load(base + at, mask=at < end, other=0.0).to(tl.float32) - mean
        squares += tl.where(at < end, apart * apart, 0.0)
    to = partial + (row * parts + part) * 2
    tl.store(to, mean)
    tl.store(to + 1, tl.sum(squares, 0))


@triton.jit
def apply(
    x, weight, bias, scale, shift, partial, y, mean, rstd, groups, width, spatial, parts, length, eps,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (row, part): y of a part."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = width * spatial
    center, squares = merged(partial + row * parts * 2, parts, length, size)
    scatter = tl.rsqrt(squares / size + eps)
    if part == 0:
        tl.store(mean + row, center)
        tl.store(rstd + row, scatter)
    first = (row % groups) * width
    image = row * width
    end = tl.minimum(part * length + length, size)
    for start in range(part * length, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < end
        channel = at // spatial
        tile = (tl.load(x + row * size + at, mask=mask, other=0.0).to(tl.float32) - center) * scatter
        if weight is not None:
            tile = tile * tl.load(weight + first + channel, mask=mask, other=0.0).to(tl.float32)
        if bias is not None:
            tile = tile + tl.load(bias + first + channel, mask=mask, other=0.0).to(tl.float32)
        if scale is not None:
            tile = tile * tl.load(scale + image + channel, mask=mask, other=0.0).to(tl.float32)
        if shift is not None:
            tile = tile + tl.load(shift + image + channel, mask=mask, other=0.0).to(tl.float32)
        tl.store(y + row * size + at, tile.to(y.dtype.element_ty), mask=mask)


def group_norm_forward(x, weight, bias, scale, shift, groups, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/group_norm.py."""
    n, channels = x.shape[:2]
    check_group(x.numel() // max(n * groups, 1))
    y, rows, width = x.new_empty(x.shape), n * groups, channels // groups
    make = x.new_empty if x.numel() else x.new_zeros
    mean, rstd = (make(n, groups, dtype=torch.float32) for _ in range(2))
    if not x.numel():
        return y, mean, rstd
    x = x.contiguous()
    weight, bias, scale, shift = (None if t is None else t.contiguous() for t in (weight, bias, scale, shift))
    size, cc = x.numel() // rows, capability(x.device)
    parts = part_count(rows, size)
    length = part_length(size, parts)
    partial = x.new_empty(rows, parts, 2, dtype=torch.float32)
    block = block_for("group_norm_moments", length) or blocks("group_norm_moments")[-1]
    with on(x.device):
        c = config("group_norm_moments", cc, block)
        moments[(rows, parts)](x, partial, size, parts, length, BLOCK=block, **c.options)
        c = config("group_norm_apply", cc, block)
        tensors = (x, weight, bias, scale, shift, partial, y, mean, rstd)
        scalars = (groups, width, size // width, parts, length, eps)
        apply[(rows, parts)](*tensors, *scalars, BLOCK=block, **c.options)
    return y, mean, rstd


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: every kernel and tile, with every option on, and each kernel
    once without options, for a single element."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    types = dict.fromkeys(("x", "weight", "bias", "scale", "shift", "y", "grad", "dx"), dtype)
    outputs = ("mean", "rstd", "partial", "sums", "products", "dweight", "dbias", "dscale", "dshift")
    types |= dict.fromkeys(outputs, "*fp32")
    types |= dict.fromkeys(("n", "channels", "groups", "width", "spatial", "size", "parts", "length"), "i32")
    types |= {"eps": "fp32"}
    bare: dict[str, int | None] = dict.fromkeys(("weight", "bias", "scale", "shift"))
    bare |= dict.fromkeys(("dweight", "dbias", "dscale", "dshift"))
    # A length is a multiple of 16; every other number may be 1, which Triton makes a constant.
    bare |= dict.fromkeys((key for key, kind in types.items() if kind == "i32" and key != "length"), 1)
    for kernel in (moments, apply, *_backward.KERNELS):
        name = f"group_norm_{kernel.__name__}"
        for block in blocks(name):
            yield case(name, kernel, types, block, config(name, cc, block))
        yield case(name, kernel, types, blocks(name)[0], config(name, cc, blocks(name)[0]), bare, "bare")
