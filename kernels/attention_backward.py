"""The backward of room attention in Triton: gradients of q, k and v (contract: fastdl/ops/attention.py).

    P = exp(s - lse)   dP = D (dO v^T)   ds = P (dP - delta)   delta = rowsum(dO O) - dlse   dt = ds (1 - tanh^2)
    dq = scale * dt k,  dk = scale * dt^T q,  dv = (D P)^T dO

`delta` once; `backward_keys`: a program takes KEYS keys of a key head and walks over the queries that see them, head
after head of the group, with dk and dv in registers; `backward_queries`: a program takes ROWS queries and walks over
the keys, as the forward does. Scores are computed again in both, so that nothing is added across programs and no sum
depends on timing.
Floor: 14 B H n_q n_k D operations (causal: half of them) over the peak of the tensor cores.

Dao et al. (2022).  Test: pytest tests/test_attention.py, make triton-compile        dbias: attention_bias.py
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..reference.attention import output_like
from ._attention import (
    FREE,
    at_plane,
    gradients,
    keys_of,
    lengths_of,
    load_rows,
    product,
    row_sums,
    scores,
    sequence_of,
    slope_of,
    store_rows,
)  # fmt: skip
from ._attention_launch import arguments, chosen, plain, strides, table, tiles_of
from ._common import capability, on
from .attention_bias import bias_gradient
from .configs import config


@triton.jit(do_not_specialize=FREE)
def delta(
    grad, out, dlse, delta, grad_b, grad_h, grad_n, out_b, out_h, out_n, heads, n_q, tiles, d_v,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grad, out [B, H, n_q, d_v], dlse float32 [B, H, n_q] or None -> delta float32 [B, H, n_q]"""
    plane = (tl.program_id(0) // tiles).to(tl.int64)
    b, h = plane // heads, plane % heads
    first, lane = tl.program_id(0) % tiles * ROWS, tl.arange(0, ROWS)
    begin = tl.cast(first, tl.int64)
    at = grad + b * grad_b + h * grad_h + begin * grad_n
    g = load_rows(at, lane, grad_n, n_q - first, d_v, True, False, BLOCK_V).to(tl.float32)
    at = out + b * out_b + h * out_h + begin * out_n
    o = load_rows(at, lane, out_n, n_q - first, d_v, True, False, BLOCK_V).to(tl.float32)
    total = tl.sum(g * o, 1)
    at, inside = plane * n_q + first + lane, first + lane < n_q
    if dlse is not None:
        total -= tl.load(dlse + at, mask=inside, other=0.0)
    tl.store(delta + at, total, mask=inside)


@triton.jit
def _queries(
    dk, dv, k_tile, v_tile, q, grad, lse, delta, q_n, grad_n, d, d_v, key, begin, end, limit, lens, lens_q, bias, mask,
    slope, seed, sizes, numbers, steps, places, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    QUERY_LENS: tl.constexpr, EDGE: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Adds the queries begin .. end - 1 of a head to dk, dv [KEYS, *]. A tile of scores is [KEYS, ROWS] here: the left
    operand of its products as it comes."""
    lane = tl.arange(0, ROWS)
    far_q, far_g = tl.cast(q_n, tl.int64), tl.cast(grad_n, tl.int64)
    n_q, n_k = sizes
    for first in range(begin, end, ROWS):
        row = (first + lane)[None, :]
        reach = limit
        if QUERY_LENS:
            reach = lengths_of(lens, row, n_q, n_k, lens_q, True)
        q_tile = load_rows(q + first * far_q, lane, q_n, n_q - first, d, True, EVEN_D, BLOCK_D)
        s, curve = scores(
            product(k_tile, tl.trans(q_tile)), row, key, reach, bias, mask, slope, sizes, numbers, steps, LEFT, RIGHT,
            SOFTCAP, EDGE,
        )  # fmt: skip
        g_tile = load_rows(grad + first * far_g, lane, grad_n, n_q - first, d_v, True, EVEN_V, BLOCK_V)
        dp = product(v_tile, tl.trans(g_tile))
        top, less = row_sums(lse, delta, first + lane, n_q)
        p, _, dt = gradients(s, curve, dp, top[None, :], less[None, :], seed, row, key, places, SOFTCAP)
        dv = tl.dot(p.to(g_tile.dtype), g_tile, dv, input_precision="ieee")
        dk = tl.dot(dt.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=FREE)
def backward_keys(
    q, k, v, grad, lse, delta, bias, mask, lens, cu_q, cu_k, slopes, seed, dk, dv, q_b, q_h, q_n, k_b, k_h, k_n, v_b,
    v_h, v_n, grad_b, grad_h, grad_n, dk_b, dk_h, dk_n, dv_b, dv_h, dv_n, bias_b, bias_h, bias_q, bias_k, mask_b,
    mask_h, mask_q, mask_k, lens_b, lens_q, slopes_b, heads, group, n_q, n_k, sequences, tiles, d, d_v, p, kept, factor,
    cap, scale, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, QUERY_LENS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """dk, dv [B, G, n_k, *]; the others as in attention.py. Under a causal mask the first keys have the most to do."""
    tile = tl.program_id(0) % tiles
    pair = (tl.program_id(0) // tiles).to(tl.int64)
    groups = heads // group
    b, g = pair // groups, pair % groups
    k_start, keys, q_start, rows, first = sequence_of(tile, cu_k, cu_q, sequences, n_k, n_q, KEYS)
    lens = at_plane(lens, b, 0, lens_b, 0)
    limit = keys
    if not QUERY_LENS:
        limit = lengths_of(lens, tile, rows, keys, lens_q, False)
    shift, last = keys - rows, tl.minimum(first + KEYS, limit) - 1
    # Queries from start to stop - 1 see some of the keys, those from a to e - 1 all of them.
    start, a, e, stop = 0, 0, rows, rows
    if RIGHT:
        start = tl.maximum(first - shift - right, 0) // ROWS * ROWS
        a = tl.cdiv(tl.maximum(last - shift - right, 0), ROWS) * ROWS
    if LEFT:
        stop = tl.minimum(rows, tl.maximum(last - shift + left + 1, 0))
        e = tl.minimum(rows, tl.maximum(first - shift + left + 1, 0) // ROWS * ROWS)
    stop = tl.where(first < limit, stop, 0)
    a = tl.minimum(a, stop)
    e = tl.maximum(a, tl.minimum(e, stop))
    tail = start
    if SPLIT:
        tail = e
    lane = tl.arange(0, KEYS)
    begin = tl.cast(k_start, tl.int64) + first
    k_tile = load_rows(k + b * k_b + g * k_h + begin * k_n, lane, k_n, limit - first, d, True, EVEN_D, BLOCK_D)
    v_tile = load_rows(v + b * v_b + g * v_h + begin * v_n, lane, v_n, limit - first, d_v, True, EVEN_V, BLOCK_V)
    key = (first + lane)[:, None]
    sizes, numbers, steps = (rows, keys), (factor, cap, left, right), (bias_q, bias_k, mask_q, mask_k)
    from_q = tl.cast(q_start, tl.int64)
    dk_sum, dv_sum = tl.zeros([KEYS, BLOCK_D], tl.float32), tl.zeros([KEYS, BLOCK_V], tl.float32)
    for member in range(group):
        h = g * group + member
        slope = slope_of(slopes, b, h, slopes_b)
        bias_at, mask_at = at_plane(bias, b, h, bias_b, bias_h), at_plane(mask, b, h, mask_b, mask_h)
        q_at, grad_at = q + b * q_b + h * q_h + from_q * q_n, grad + b * grad_b + h * grad_h + from_q * grad_n
        plane = b * heads + h
        lse_at, delta_at = lse + plane * n_q + from_q, delta + plane * n_q + from_q
        places = ((plane * n_q + from_q) * n_k + k_start, n_k, p, kept)
        if SPLIT:
            if RIGHT:
                dk_sum, dv_sum = _queries(
                    dk_sum, dv_sum, k_tile, v_tile, q_at, grad_at, lse_at, delta_at, q_n, grad_n, d, d_v, key, start, a,
                    limit, lens, lens_q, bias_at, mask_at, slope, seed, sizes, numbers, steps, places, LEFT, RIGHT,
                    SOFTCAP, QUERY_LENS, True, EVEN_D, EVEN_V, BLOCK_D, BLOCK_V, ROWS,
                )  # fmt: skip
            dk_sum, dv_sum = _queries(
                dk_sum, dv_sum, k_tile, v_tile, q_at, grad_at, lse_at, delta_at, q_n, grad_n, d, d_v, key, a, e, limit,
                lens, lens_q, bias_at, mask_at, slope, seed, sizes, numbers, steps, places, LEFT, RIGHT, SOFTCAP,
                QUERY_LENS, False, EVEN_D, EVEN_V, BLOCK_D, BLOCK_V, ROWS,
            )  # fmt: skip
        if LEFT or not SPLIT:
            dk_sum, dv_sum = _queries(
                dk_sum, dv_sum, k_tile, v_tile, q_at, grad_at, lse_at, delta_at, q_n, grad_n, d, d_v, key, tail, stop,
                limit, lens, lens_q, bias_at, mask_at, slope, seed, sizes, numbers, steps, places, LEFT, RIGHT, SOFTCAP,
                QUERY_LENS, True, EVEN_D, EVEN_V, BLOCK_D, BLOCK_V, ROWS,
            )  # fmt: skip
    inside = key < limit  # behind it a tile has what it computed from zeros
    dk_sum, dv_sum = tl.where(inside, dk_sum * scale, 0.0), tl.where(inside, dv_sum, 0.0)
    store_rows(dk + b * dk_b + g * dk_h + begin * dk_n, lane, dk_n, keys - first, d, dk_sum, BLOCK_D)
    store_rows(dv + b * dv_b + g * dv_h + begin * dv_n, lane, dv_n, keys - first, d_v, dv_sum, BLOCK_V)


@triton.jit
def _keys(
    dq, q_tile, g_tile, top, less, k, v, k_n, v_n, d, d_v, row, begin, end, limit, visible, bias, mask, slope, seed,
    sizes, numbers, steps, places, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Adds the keys begin .. end - 1 to dq [ROWS, BLOCK_D]."""
    lane = tl.arange(0, KEYS)
    far_k, far_v = tl.cast(k_n, tl.int64), tl.cast(v_n, tl.int64)
    for first in range(begin, end, KEYS):
        key = (first + lane)[None, :]
        k_tile = load_rows(k + first * far_k, lane, k_n, visible - first, d, EDGE, EVEN_D, BLOCK_D)
        s, curve = scores(
            product(q_tile, tl.trans(k_tile)), row, key, limit, bias, mask, slope, sizes, numbers, steps, LEFT, RIGHT,
            SOFTCAP, EDGE,
        )  # fmt: skip
        v_tile = load_rows(v + first * far_v, lane, v_n, visible - first, d_v, EDGE, EVEN_V, BLOCK_V)
        dp = product(g_tile, tl.trans(v_tile))
        _, _, dt = gradients(s, curve, dp, top[:, None], less[:, None], seed, row, key, places, SOFTCAP)
        dq = tl.dot(dt.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=FREE)
def backward_queries(
    q, k, v, grad, lse, delta, bias, mask, lens, cu_q, cu_k, slopes, seed, dq, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h,
    v_n, grad_b, grad_h, grad_n, dq_b, dq_h, dq_n, bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k,
    lens_b, lens_q, slopes_b, heads, group, n_q, n_k, sequences, tiles, d, d_v, p, kept, factor, cap, scale, left,
    right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, QUERY_LENS: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """dq [B, H, n_q, D]; the others as in attention.py."""
    tile = tiles - 1 - tl.program_id(0) % tiles
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
    at = grad + b * grad_b + h * grad_h + begin * grad_n
    g_tile = load_rows(at, lane, grad_n, rows - first, d_v, True, EVEN_V, BLOCK_V)
    at = plane * n_q + q_start
    top, less = row_sums(lse + at, delta + at, first + lane, rows)
    k += b * k_b + h // group * k_h + tl.cast(k_start, tl.int64) * k_n
    v += b * v_b + h // group * v_h + tl.cast(k_start, tl.int64) * v_n
    row = (first + lane)[:, None]
    sizes, numbers, steps = (rows, keys), (factor, cap, left, right), (bias_q, bias_k, mask_q, mask_k)
    places = ((plane * n_q + q_start) * n_k + k_start, n_k, p, kept)
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    if SPLIT:
        if LEFT:
            total = _keys(
                total, q_tile, g_tile, top, less, k, v, k_n, v_n, d, d_v, row, start, a, limit, visible, bias, mask,
                slope, seed, sizes, numbers, steps, places, LEFT, RIGHT, SOFTCAP, True, EVEN_D, EVEN_V, BLOCK_D,
                BLOCK_V, KEYS,
            )  # fmt: skip
        total = _keys(
            total, q_tile, g_tile, top, less, k, v, k_n, v_n, d, d_v, row, a, e, limit, visible, bias, mask, slope,
            seed, sizes, numbers, steps, places, LEFT, RIGHT, SOFTCAP, False, EVEN_D, EVEN_V, BLOCK_D, BLOCK_V, KEYS,
        )  # fmt: skip
        start = e
    total = _keys(
        total, q_tile, g_tile, top, less, k, v, k_n, v_n, d, d_v, row, start, stop, limit, visible, bias, mask, slope,
        seed, sizes, numbers, steps, places, LEFT, RIGHT, SOFTCAP, True, EVEN_D, EVEN_V, BLOCK_D, BLOCK_V, KEYS,
    )  # fmt: skip
    store_rows(dq + b * dq_b + h * dq_h + begin * dq_n, lane, dq_n, rows - first, d, total * scale, BLOCK_D)


KERNELS = (delta, backward_keys, backward_queries)


def attention_backward(
    grad, dlse, q, k, v, out, lse, bias, mask, lens, cu_q, cu_k, slopes, seed, p, scale, softcap, left, right, need_bias
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Arguments and results: fastdl/reference/attention.py."""
    dq, dk, dv = (output_like(t, t.shape[3]) for t in (q, k, v))
    (batch, heads, n_q, _), (_, groups, n_k, _) = q.shape, k.shape
    if batch * heads * n_q * n_k == 0:
        dbias = lse.new_zeros(bias.shape if need_bias else 0)
        return dq.zero_(), dk.zero_(), dv.zero_(), dbias
    given = arguments(q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed, p, scale, softcap, left, right)
    grad, out, less = plain(grad), plain(out), lse.new_empty(lse.shape)
    found = given | strides("grad", grad, "bhn") | {"grad": grad, "lse": lse.contiguous(), "delta": less}
    with on(q.device):
        c = config(table("delta", q.dtype), capability(q.device), given["BLOCK_V"])
        tiles = triton.cdiv(n_q, c.rows)
        delta[(tiles * batch * heads,)](
            grad, out, None if dlse is None else dlse.contiguous(), less, *grad.stride()[:3], *out.stride()[:3], heads,
            n_q, tiles, v.shape[3], BLOCK_V=given["BLOCK_V"], ROWS=c.rows, **c.options,
        )  # fmt: skip
        c = chosen("backward_keys", given)
        tiles = tiles_of(n_k, c.keys, cu_k)
        backward_keys[(tiles * batch * groups,)](
            **found, **strides("dk", dk, "bhn"), **strides("dv", dv, "bhn"), dk=dk, dv=dv, scale=scale, tiles=tiles,
            ROWS=c.rows, KEYS=c.keys, **c.options,
        )  # fmt: skip
        c = chosen("backward_queries", given)
        tiles = tiles_of(n_q, c.rows, cu_q)
        backward_queries[(tiles * batch * heads,)](
            **found, **strides("dq", dq, "bhn"), dq=dq, scale=scale, tiles=tiles, ROWS=c.rows, KEYS=c.keys, **c.options
        )
        dbias = bias_gradient(bias, found, batch) if need_bias else lse.new_empty(0)
    return dq, dk, dv, dbias
