"""Room group_norm in Triton, backward (contract: fastdl/ops/group_norm.py; meaning: fastdl/reference/group_norm.py).

    sums[n, c] = sum of grad over positions,  products[n, c] = sum of grad * h over positions
    g  = grad * scale * weight;   dx = rstd * (g - mean(g) - h * mean(g * h)),  the means from the sums of the group
    dweight = sum_n(scale * products),  dbias = sum_n(scale * sums),  dscale = weight * products + bias * sums,
    dshift = sums

Test: pytest tests/test_group_norm.py, make triton-compile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._channels import part_count, part_length
from ._common import capability, on
from .configs import block_for, blocks, config


@triton.jit
def sums(grad, x, mean, rstd, sums, products, channels, width, spatial, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Program: ROWS channels of samples, ``channels`` in all."""
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    inside = row < channels
    center = tl.load(mean + row // width, mask=inside, other=0.0)
    sum_g = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_gh = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, spatial, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        mask = inside & (col < spatial)
        d = tl.load(grad + row * spatial + col, mask=mask, other=0.0).to(tl.float32)
        apart = tl.load(x + row * spatial + col, mask=mask, other=0.0).to(tl.float32) - center
        sum_g += d
        sum_gh += tl.where(mask, d * apart, 0.0)
    tl.store(sums + row, tl.sum(sum_g, 1)[:, None], mask=inside)
    scatter = tl.load(rstd + row // width, mask=inside, other=0.0)
    tl.store(products + row, tl.sum(sum_gh, 1)[:, None] * scatter, mask=inside)


@triton.jit
def _factor(weight, scale, first, image, channel, mask):
    factor = tl.where(mask, 1.0, 0.0)
    if weight is not None:
        factor = factor * tl.load(weight + first + channel, mask=mask, other=0.0).to(tl.float32)
    if scale is not None:
        factor = factor * tl.load(scale + image + channel, mask=mask, other=0.0).to(tl.float32)
    return factor


@triton.jit
def dx(
    grad, x, weight, scale, mean, rstd, sums, products, dx, groups, width, spatial, length, BLOCK: tl.constexpr
):  # fmt: skip
    """Program (row, part): dx of a part of a group."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size = width * spatial
    first = (row % groups) * width
    image = row * width
    center, scatter = tl.load(mean + row), tl.load(rstd + row)
    sum_g = tl.zeros([BLOCK], tl.float32)
    sum_gh = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        channel = start + tl.arange(0, BLOCK)
        mask = channel < width
        factor = _factor(weight, scale, first, image, channel, mask)
        sum_g += factor * tl.load(sums + image + channel, mask=mask, other=0.0)
        sum_gh += factor * tl.load(products + image + channel, mask=mask, other=0.0)
    mean_g = tl.sum(sum_g, 0) / size
    mean_gh = tl.sum(sum_gh, 0) / size
    end = tl.minimum(part * length + length, size)
    for start in range(part * length, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        mask = at < end
        g = tl.load(grad + row * size + at, mask=mask, other=0.0).to(tl.float32)
        g = g * _factor(weight, scale, first, image, at // spatial, mask)
        h = (tl.load(x + row * size + at, mask=mask, other=0.0).to(tl.float32) - center) * scatter
        tile = (g - mean_g - h * mean_gh) * scatter
        tl.store(dx + row * size + at, tile.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def parameters(
    weight, bias, scale, sums, products, dweight, dbias, dscale, dshift, n, channels, BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Program: a tile of channels; its samples are added in order."""
    channel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    inside = channel < channels
    weight_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    bias_sum = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, n, ROWS):
        row = (start + tl.arange(0, ROWS).to(tl.int64))[:, None]
        mask = (row < n) & inside
        at = row * channels + channel
        p = tl.load(sums + at, mask=mask, other=0.0)
        q = tl.load(products + at, mask=mask, other=0.0)
        if dshift is not None:
            tl.store(dshift + at, p, mask=mask)
        if dscale is not None:
            change = q
            if weight is not None:
                change = q * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
            if bias is not None:
                change = change + p * tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(dscale + at, change, mask=mask)
        if scale is not None:
            factor = tl.load(scale + at, mask=mask, other=0.0).to(tl.float32)
            p = p * factor
            q = q * factor
        weight_sum += q
        bias_sum += p
    if dweight is not None:
        tl.store(dweight + channel, tl.sum(weight_sum, 0)[None, :], mask=inside)
    if dbias is not None:
        tl.store(dbias + channel, tl.sum(bias_sum, 0)[None, :], mask=inside)


KERNELS = (sums, dx, parameters)


def group_norm_backward(
    grad, x, weight, bias, scale, mean, rstd, groups, eps, need_weight, need_bias, need_scale, need_shift
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results: fastdl/reference/group_norm.py."""
    n, channels = x.shape[:2]
    out, cc = x.new_empty(x.shape), capability(x.device)
    make = x.new_empty if x.numel() else x.new_zeros
    needs = ((need_weight, (channels,)), (need_bias, (channels,)))
    needs += ((need_scale, (n, channels)), (need_shift, (n, channels)))
    gradients = [make(shape if need else (0,), dtype=torch.float32) for need, shape in needs]
    if not x.numel():
        return out, *gradients
    grad, x = grad.contiguous(), x.contiguous()
    weight, bias, scale = (None if t is None else t.contiguous() for t in (weight, bias, scale))
    rows, width, spatial = n * groups, channels // groups, x.numel() // (n * channels)
    p, q = (x.new_empty(n, channels, dtype=torch.float32) for _ in range(2))
    with on(x.device):
        block = block_for("group_norm_sums", spatial) or blocks("group_norm_sums")[-1]
        c = config("group_norm_sums", cc, block)
        grid = (triton.cdiv(n * channels, c.rows),)
        sizes = (n * channels, width, spatial)
        sums[grid](grad, x, mean, rstd, p, q, *sizes, BLOCK=block, ROWS=c.rows, **c.options)
        parts = part_count(rows, width * spatial)
        length = part_length(width * spatial, parts)
        block = block_for("group_norm_dx", length) or blocks("group_norm_dx")[-1]
        tensors = (grad, x, weight, scale, mean, rstd, p, q, out)
        options = config("group_norm_dx", cc, block).options
        dx[(rows, parts)](*tensors, groups, width, spatial, length, BLOCK=block, **options)
        if need_weight or need_bias or need_scale or need_shift:
            block = blocks("group_norm_parameters")[-1]
            c = config("group_norm_parameters", cc, block)
            wanted = (g if need else None for g, (need, _) in zip(gradients, needs, strict=True))
            tensors = (weight, bias, scale, p, q, *wanted)
            parameters[(triton.cdiv(channels, block),)](*tensors, n, channels, BLOCK=block, ROWS=c.rows, **c.options)
    return out, *gradients
