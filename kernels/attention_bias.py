"""The gradient of attention's bias in Triton (contract: fastdl/ops/attention.py).

    dbias_ij = sum of ds_ij over the batches, heads, queries and keys that share the bias

A program owns a tile of dbias and computes the scores of all that is added to it again, batch after batch and head
after head, so that no sum depends on timing and no matrix of ds is held. Where a bias is one for all queries or keys,
each batch and head has a line of its own first, which `sums` adds: these lines grow with n_q + n_k.

Test: pytest tests/test_attention.py, make triton-compile
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ._attention import FREE, at_plane, gradients, lengths_of, load_rows, product, row_sums, scores, slope_of
from ._attention_launch import chosen
from ._recurrent_launch import sums


@triton.jit(
    do_not_specialize=[*FREE, "batches", "members", "row_tiles", "key_tiles", "row_steps", "key_steps", "bias_heads"]
)
def dbias(
    q, k, v, grad, lse, delta, bias, mask, lens, slopes, seed, dbias, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n,
    grad_b, grad_h, grad_n, bias_b, bias_h, bias_q, bias_k, mask_b, mask_h, mask_q, mask_k, lens_b, lens_q, slopes_b,
    heads, group, n_q, n_k, d, d_v, p, kept, factor, cap, left, right, bias_heads, batches, members, row_tiles,
    key_tiles, row_steps, key_steps,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, QUERY_LENS: tl.constexpr, ONE_ROW: tl.constexpr,
    ONE_KEY: tl.constexpr, EVEN_D: tl.constexpr, EVEN_V: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """dbias float32 [planes, n_q or 1, n_k or 1], a plane of batches x members of q's planes; tiles [row_tiles,
    key_tiles], each of row_steps x key_steps tiles of scores, which are several where dbias has one row or key."""
    tile = tl.program_id(0) % (row_tiles * key_tiles)
    plane = (tl.program_id(0) // (row_tiles * key_tiles)).to(tl.int64)
    row_tile, key_tile = tile // key_tiles, tile % key_tiles
    row_lane, key_lane = tl.arange(0, ROWS), tl.arange(0, KEYS)
    far_q, far_g, far_k, far_v = (
        tl.cast(q_n, tl.int64), tl.cast(grad_n, tl.int64), tl.cast(k_n, tl.int64), tl.cast(v_n, tl.int64)
    )  # fmt: skip
    sizes, numbers, steps = (n_q, n_k), (factor, cap, left, right), (bias_q, bias_k, mask_q, mask_k)
    total = tl.zeros([ROWS, KEYS], tl.float32)
    for number in range(batches * members):
        b = plane // bias_heads * batches + number // members
        h = plane % bias_heads * members + number % members
        lens_at, slope = at_plane(lens, b, h, lens_b, 0), slope_of(slopes, b, h, slopes_b)
        bias_at, mask_at = at_plane(bias, b, h, bias_b, bias_h), at_plane(mask, b, h, mask_b, mask_h)
        q_at, grad_at = q + b * q_b + h * q_h, grad + b * grad_b + h * grad_h
        k_at, v_at = k + b * k_b + h // group * k_h, v + b * v_b + h // group * v_h
        at = (b * heads + h) * n_q
        places = (at * n_k, n_k, p, kept)
        for step in range(row_steps * key_steps):
            i, j = (row_tile + step // key_steps) * ROWS, (key_tile + step % key_steps) * KEYS
            row, key = (i + row_lane)[:, None], (j + key_lane)[None, :]
            limit = lengths_of(lens_at, row, n_q, n_k, lens_q, QUERY_LENS)
            visible = n_k
            if not QUERY_LENS:
                visible = limit
            seen = j < visible
            if LEFT:
                seen = seen & (j + KEYS - 1 >= i + n_k - n_q - left)
            if RIGHT:
                seen = seen & (j <= i + ROWS - 1 + n_k - n_q + right)
            if seen:
                q_tile = load_rows(q_at + i * far_q, row_lane, q_n, n_q - i, d, True, EVEN_D, BLOCK_D)
                k_tile = load_rows(k_at + j * far_k, key_lane, k_n, visible - j, d, True, EVEN_D, BLOCK_D)
                s, curve = scores(
                    product(q_tile, tl.trans(k_tile)), row, key, limit, bias_at, mask_at, slope, sizes, numbers, steps,
                    LEFT, RIGHT, SOFTCAP, True,
                )  # fmt: skip
                g_tile = load_rows(grad_at + i * far_g, row_lane, grad_n, n_q - i, d_v, True, EVEN_V, BLOCK_V)
                v_tile = load_rows(v_at + j * far_v, key_lane, v_n, visible - j, d_v, True, EVEN_V, BLOCK_V)
                dp = product(g_tile, tl.trans(v_tile))
                top, less = row_sums(lse + at, delta + at, i + row_lane, n_q)
                _, ds, _ = gradients(s, curve, dp, top[:, None], less[:, None], seed, row, key, places, SOFTCAP)
                total += ds
    i, j = row_tile * ROWS + row_lane, key_tile * KEYS + key_lane
    wide, long = n_k, n_q
    if ONE_KEY:
        total = tl.sum(total, 1)[:, None] + tl.zeros([ROWS, KEYS], tl.float32)
        wide = 1
    if ONE_ROW:
        total = tl.sum(total, 0)[None, :] + tl.zeros([ROWS, KEYS], tl.float32)
        long = 1
    to = dbias + (plane * long + i[:, None]) * wide + j[None, :]
    tl.store(to, total, mask=(i[:, None] < long) & (j[None, :] < wide))


def bias_gradient(bias: Tensor, given: Mapping[str, Any], batch: int) -> Tensor:
    """float32 like bias [B or 1, H or 1, n_q or 1, n_k or 1], dense. given: the arguments of the backward kernels."""
    heads, n_q, n_k = given["heads"], given["n_q"], given["n_k"]
    bias_batch, bias_heads = bias.shape[:2]
    one_row, one_key = bias.shape[2] < n_q, bias.shape[3] < n_k
    if (one_row or one_key) and (bias_batch == 1 or bias_heads > 1):  # else heads of a batch are added in the kernel
        planes, plane_heads = batch, heads
    else:
        planes, plane_heads = bias_batch, bias_heads
    parts = given["lse"].new_empty(planes, plane_heads, *bias.shape[2:])
    c = chosen("dbias", given)
    row_tiles, key_tiles = triton.cdiv(n_q, c.rows), triton.cdiv(n_k, c.keys)
    steps = {"row_steps": row_tiles if one_row else 1, "key_steps": key_tiles if one_key else 1}
    steps |= {"row_tiles": 1 if one_row else row_tiles, "key_tiles": 1 if one_key else key_tiles}
    steps |= {"batches": batch // planes, "members": heads // plane_heads, "bias_heads": plane_heads}
    given = {key: value for key, value in given.items() if key in dbias.arg_names}
    dbias[(planes * plane_heads * steps["row_tiles"] * steps["key_tiles"],)](
        **given, **steps, dbias=parts, ONE_ROW=one_row, ONE_KEY=one_key, ROWS=c.rows, KEYS=c.keys, **c.options
    )
    if parts.shape == bias.shape:
        return parts
    return sums(parts, parts.flatten(0, 1) if bias_heads == 1 else parts)[0].reshape(bias.shape)
