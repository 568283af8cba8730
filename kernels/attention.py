"""Room attention in Triton (contract: fastdl/ops/attention.py; meaning: fastdl/reference/attention.py).

    s = cap(scale * q k^T) + bias - slope * distance;  O = dropout(softmax(s)) v;  lse = log sum exp(s)

A program takes ROWS queries of one head. Keys and values stream by in tiles of KEYS; the greatest score of a row, the
sum of its exponentials and O stay in registers and are scaled down when a greater score appears. Tiles that no query of
the program sees are not read; only those at the edge of what is seen are compared with it. Keys are cut at multiples of
KEYS, so a row's result depends on nothing else in the batch. A missing tensor is None, which the compiler takes for a
constant. Floor: 4 B H n_q n_k D operations (causal: half of them) over the peak of the tensor cores.

Milakov and Gimelshein (2018), Dao et al. (2022).  Test: pytest tests/test_attention.py, make triton-compile
Backward: attention_backward.py, attention_bias.py        Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.attention import output_like
from ._attention import (
    FREE,
    LN2,
    at_plane,
    keys_of,
    load_rows,
    product,
    scores,
    sequence_of,
    slope_of,
    store_rows,
    weights,
)  # fmt: skip
from ._attention_launch import arguments, chosen, kernel_cases, strides, tiles_of
from ._common import Case, on
from .attention_backward import KERNELS, attention_backward
from .attention_bias import dbias

__all__ = ["attention_backward", "attention_forward", "compile_cases"]


@triton.jit
def _stream(
    o, top, total, q_tile, k, v, k_n, v_n, d, d_v, row, begin, end, limit, visible, bias, mask, slope, seed, sizes,
    numbers, steps, places, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Adds the keys begin .. end - 1 to o [ROWS, BLOCK_V], top and total [ROWS]; keys from visible on are not read."""
    lane = tl.arange(0, KEYS)
    far_k, far_v = tl.cast(k_n, tl.int64), tl.cast(v_n, tl.int64)
    for first in range(begin, end, KEYS):
        key = (first + lane)[None, :]
        k_tile = load_rows(k + first * far_k, lane, k_n, visible - first, d, EDGE, EVEN_D, BLOCK_D)
        s, _ = scores(
            product(q_tile, tl.trans(k_tile)), row, key, limit, bias, mask, slope, sizes, numbers, steps, LEFT, RIGHT,
            SOFTCAP, EDGE,
        )  # fmt: skip
        greater = tl.maximum(top, tl.max(s, 1))
        base = tl.where(greater == float("-inf"), 0.0, greater)  # no key seen as yet: exp2(-inf - 0) = 0
        e = tl.exp2(s - base[:, None])
        shrink = tl.exp2(top - base)
        top, total = greater, total * shrink + tl.sum(e, 1)
        if seed is not None:
            e *= weights(seed, row, key, places)
        v_tile = load_rows(v + first * far_v, lane, v_n, visible - first, d_v, EDGE, EVEN_V, BLOCK_V)
        o = tl.dot(e.to(v_tile.dtype), v_tile, o * shrink[:, None], input_precision="ieee")
    return o, top, total


@triton.jit(do_not_specialize=FREE)
def forward(
    q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed, out, lse, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, out_b,
    out_h, out_n, bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, lens_b, lens_q, slopes_b, heads,
    group, n_q, n_k, sequences, tiles, d, d_v, p, kept, factor, cap, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, QUERY_LENS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """q, out [B, H, n_q, *], k, v [B, G, n_k, *], lse float32 [B, H, n_q]; the others as the launcher explains them."""
    tile = tiles - 1 - tl.program_id(0) % tiles  # under a causal mask the last have the most to do
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = plane // heads, plane % heads
    q_start, rows, k_start, keys, first = sequence_of(tile, cu_q, cu_k, sequences, n_q, n_k, ROWS)
    lens, slope = at_plane(lens, b, h, lens_b, 0), slope_of(slopes, b, h, slopes_b)
    bias, mask = at_plane(bias, b, h, bias_b, bias_h), at_plane(mask, b, h, mask_b, mask_h)
    limit, start, a, e, stop = keys_of(
        lens, first, rows, keys, left, right, lens_q, LEFT, RIGHT, QUERY_LENS, ROWS, KEYS
    )
    visible = keys
    if not QUERY_LENS:
        visible = limit
    lane = tl.arange(0, ROWS)
    begin = tl.cast(q_start, tl.int64) + first
    q_tile = load_rows(q + b * q_b + h * q_h + begin * q_n, lane, q_n, rows - first, d, True, EVEN_D, BLOCK_D)
    k += b * k_b + h // group * k_h + tl.cast(k_start, tl.int64) * k_n
    v += b * v_b + h // group * v_h + tl.cast(k_start, tl.int64) * v_n
    row = (first + lane)[:, None]
    sizes, numbers, steps = (rows, keys), (factor, cap, left, right), (bias_q, bias_k, mask_q, mask_k)
    places = ((plane * n_q + q_start) * n_k + k_start, n_k, p, kept)
    o = tl.zeros([ROWS, BLOCK_V], tl.float32)
    top, total = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    if SPLIT:
        if LEFT:
            o, top, total = _stream(
                o, top, total, q_tile, k, v, k_n, v_n, d, d_v, row, start, a, limit, visible, bias, mask, slope, seed,
                sizes, numbers, steps, places, LEFT, RIGHT, SOFTCAP, True, EVEN_D, EVEN_V, BLOCK_D, BLOCK_V, KEYS,
            )  # fmt: skip
        o, top, total = _stream(
            o, top, total, q_tile, k, v, k_n, v_n, d, d_v, row, a, e, limit, visible, bias, mask, slope, seed, sizes,
            numbers, steps, places, LEFT, RIGHT, SOFTCAP, False, EVEN_D, EVEN_V, BLOCK_D, BLOCK_V, KEYS,
        )  # fmt: skip
        start = e
    o, top, total = _stream(
        o, top, total, q_tile, k, v, k_n, v_n, d, d_v, row, start, stop, limit, visible, bias, mask, slope, seed, sizes,
        numbers, steps, places, LEFT, RIGHT, SOFTCAP, True, EVEN_D, EVEN_V, BLOCK_D, BLOCK_V, KEYS,
    )  # fmt: skip
    blind = total == 0.0
    total = tl.where(blind, 1.0, total)
    o /= total[:, None]
    store_rows(out + b * out_b + h * out_h + begin * out_n, lane, out_n, rows - first, d_v, o, BLOCK_V)
    at = plane * n_q + begin + lane
    tl.store(lse + at, tl.where(blind, float("-inf"), top * LN2 + tl.log(total)), mask=first + lane < rows)


def attention_forward(
    q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed, p, scale, softcap, left, right
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments and results: fastdl/reference/attention.py."""
    (batch, heads, n_q, _), n_k, d_v = q.shape, k.shape[2], v.shape[3]
    out, lse = output_like(q, d_v), q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0 or n_k == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    given = arguments(q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed, p, scale, softcap, left, right)
    c = chosen("forward", given)
    tiles = tiles_of(n_q, c.rows, cu_q)
    with on(q.device):
        forward[(tiles * batch * heads,)](
            **given, **strides("out", out, "bhn"), out=out, lse=lse, tiles=tiles, ROWS=c.rows, KEYS=c.keys, **c.options
        )
    return out, lse


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: every kernel and tile, causal and with every option on."""
    for kernel in (forward, *KERNELS, dbias):
        yield from kernel_cases(kernel, cc)
