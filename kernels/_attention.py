"""What the Triton kernels of room attention share: which sequence a tile belongs to, which keys it sees, scores, the
weights of dropout, gradients of scores (contract: fastdl/ops/attention.py; launches: _attention_launch.py).

Scores are kept in base 2, s log2(e), so that softmax is exp2. `row` and `key` are int32 numbers of queries and keys of
one sequence, one of them [n, 1] and the other [1, n], so that a tile of scores may lie either way around.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import dropout, tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Arguments that Triton shall not make a constant of when they are 1, nor a kernel each for when 16 divides them.
FREE = ("heads", "group", "n_q", "n_k", "sequences", "tiles", "left", "right", "lens_b", "lens_q", "slopes_b")


@triton.jit
def sequence_of(tile, cu, cu_other, sequences, total, other_total, BLOCK: tl.constexpr):
    """(first row, rows, first row of the other tensor, its rows, first row of the tile within the sequence).

    cu, cu_other int32 [sequences + 1]: where packed sequences begin. Sequence s has the tiles from cu[s] // BLOCK + s
    on, as many as it needs or one more, so that a grid of total // BLOCK + sequences is known without reading cu.
    """
    if cu is None:
        return 0, total, 0, other_total, tile * BLOCK
    else:
        low, high = tile * 0, tile * 0 + sequences - 1
        while low < high:  # the last sequence whose first tile is not after this one
            middle = (low + high + 1) // 2
            reached = tl.load(cu + middle) // BLOCK + middle <= tile
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle - 1)
        start = _within(tl.load(cu + low), 0, total)
        stop = _within(tl.load(cu + low + 1), start, total)
        other = _within(tl.load(cu_other + low), 0, other_total)
        other_stop = _within(tl.load(cu_other + low + 1), other, other_total)
        return start, stop - start, other, other_stop - other, (tile - start // BLOCK - low) * BLOCK


@triton.jit
def _within(value, low, high):
    return tl.minimum(tl.maximum(value, low), high)


@triton.jit
def lengths_of(lens, row, n_q, n_k, lens_q, QUERY_LENS: tl.constexpr):
    """How many keys lens leaves: int32, like row if QUERY_LENS, else a scalar. lens: at its batch."""
    if lens is None:
        return n_k
    elif QUERY_LENS:
        return _within(tl.load(lens + row.to(tl.int64) * lens_q, mask=row < n_q, other=0), 0, n_k)
    else:
        return _within(tl.load(lens), 0, n_k)


@triton.jit
def keys_of(
    lens, first, n_q, n_k, left, right, lens_q,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, QUERY_LENS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Of the queries first .. first + ROWS - 1: (limit, start, a, b, stop).

    They see the keys start .. stop - 1, and all of them see a .. b - 1. Loops begin at multiples of KEYS, so that which
    keys are added together depends on nothing but their place. limit: as lengths_of, but [ROWS, 1] if QUERY_LENS.
    """
    row, shift = first + tl.arange(0, ROWS), n_k - n_q
    last = tl.minimum(first + ROWS, n_q) - 1
    limit = lengths_of(lens, row, n_q, n_k, lens_q, QUERY_LENS)
    stop, full = limit, limit
    if QUERY_LENS:
        stop, full = tl.max(limit, 0), tl.min(tl.where(row < n_q, limit, n_k), 0)
        limit = limit[:, None]
    if RIGHT:
        stop = tl.minimum(stop, last + shift + right + 1)
        full = tl.minimum(full, first + shift + right + 1)
    stop = tl.maximum(stop, 0)
    full = tl.maximum(full, 0) // KEYS * KEYS
    if LEFT:
        start = tl.maximum(first + shift - left, 0) // KEYS * KEYS
        a = tl.minimum(tl.cdiv(tl.maximum(last + shift - left, 0), KEYS) * KEYS, stop)
    else:
        start, a = 0, 0
    return limit, start, a, tl.maximum(a, tl.minimum(full, stop)), stop


@triton.jit
def load_rows(at, lane, stride, rows, cols, EDGE: tl.constexpr, EVEN: tl.constexpr, BLOCK: tl.constexpr):
    """[lanes, BLOCK] from at [rows, cols], 0 outside. EDGE: lanes may lie behind rows; EVEN: cols is BLOCK."""
    row, col = lane[:, None], tl.arange(0, BLOCK)[None, :]
    to = at + row * stride + col
    if EVEN:
        if EDGE:
            return tl.load(to, mask=row < rows, other=0.0)
        else:
            return tl.load(to)
    elif EDGE:
        return tl.load(to, mask=(row < rows) & (col < cols), other=0.0)
    else:
        return tl.load(to, mask=col < cols, other=0.0)


@triton.jit
def store_rows(at, lane, stride, rows, cols, tile, BLOCK: tl.constexpr):
    row, col = lane[:, None], tl.arange(0, BLOCK)[None, :]
    tl.store(at + row * stride + col, tile.to(at.dtype.element_ty), mask=(row < rows) & (col < cols))


@triton.jit
def product(a, b):
    """a b in float32. Single TF32 would round float32 operands to 10 bits."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def scores(
    products, row, key, limit, bias, mask, slope, sizes, numbers, steps,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """(s in base 2, -inf where a key is hidden; tanh(t / softcap)) from q.k.

    bias, mask: at their batch and head; slope in base 2; sizes: (queries, keys) of the sequence; numbers: (factor, cap,
    left, right); steps: strides of bias and mask along queries and keys. EDGE: the tile may lie over the edge of the
    keys that are seen.
    """
    n_q, n_k = sizes
    factor, cap, left, right = numbers
    bias_q, bias_k, mask_q, mask_k = steps
    s = products * factor
    curve = s
    if SOFTCAP:
        curve = tanh(s)
        s = curve * cap
    inside = (row < n_q) & (key < n_k)
    if bias is not None:
        at = row.to(tl.int64) * bias_q + key.to(tl.int64) * bias_k
        term = tl.load(bias + at, mask=inside, other=float("-inf")).to(tl.float32) * LOG2E
        s = tl.where(term == float("-inf"), term, s + term)  # also where s is NaN
    if slope is not None:
        s -= slope * tl.abs(row + (n_k - n_q) - key).to(tl.float32)
    if mask is not None:
        at = row.to(tl.int64) * mask_q + key.to(tl.int64) * mask_k
        s = tl.where(tl.load(mask + at, mask=inside, other=0) != 0, s, float("-inf"))
    if EDGE:
        seen = key < limit
        if LEFT:
            seen = seen & (key >= row + (n_k - n_q) - left)
        if RIGHT:
            seen = seen & (key <= row + (n_k - n_q) + right)
        s = tl.where(seen, s, float("-inf"))
    return s, curve


@triton.jit
def at_plane(t, b, h, t_b, t_h):
    """t at a batch and head; None stays."""
    if t is None:
        return None
    else:
        return t + b * t_b + h * t_h


@triton.jit
def slope_of(slopes, b, h, slopes_b):
    """ALiBi's slope in base 2; None where there is none."""
    if slopes is None:
        return None
    else:
        return tl.load(slopes + b * slopes_b + h) * LOG2E


@triton.jit
def weights(seed, row, key, places):
    """Dropout's factor of each probability: kept or 0. places: (number of the element (0, 0) of this head and sequence
    in [B, H, total_q, total_k], total_k, p, kept)."""
    first, total_k, p, kept = places
    return dropout(1.0, tl.load(seed), first + row.to(tl.int64) * total_k + key, p, kept)


@triton.jit
def row_sums(lse, delta, row, n_q):
    """What the forward left of queries: lse in base 2 and delta. Rows that see no key, or do not exist, have the lse
    infinity, which makes their probabilities 0."""
    top = tl.load(lse + row, mask=row < n_q, other=float("-inf"))
    top = tl.where(top == float("-inf"), float("inf"), top * LOG2E)
    return top, tl.load(delta + row, mask=row < n_q, other=0.0)


@triton.jit
def gradients(s, curve, dp, top, less, seed, row, key, places, SOFTCAP: tl.constexpr):
    """(D P, ds, dt) of a tile from its scores, dO v^T, and row_sums, which lie as row does."""
    p = tl.exp2(s - top)
    dropped = p
    if seed is not None:
        kept = weights(seed, row, key, places)
        dropped = p * kept
        dp *= kept
    ds = tl.where(p == 0.0, 0.0, p * (dp - less))  # what is hidden: also where dp is NaN
    dt = ds
    if SOFTCAP:
        dt = tl.where(ds == 0.0, 0.0, ds * (1.0 - curve * curve))
    return dropped, ds, dt
