"""What the Triton kernels of lstm, gru and rnn share: the place of a program in a step, zoneout, layer norm over rows,
the last state on its way in and out, products inside a kernel. Names and shapes: fastdl/reference/_recurrent.py.

A step is two launches: torch's batched product of the last states of both directions with w_hh (torch.bmm, float32
sums), and one fused kernel of the room for all gates of both directions. Its programs are (block of batch rows,
direction, tile of columns); with layer norm, which needs whole rows, a program walks over all columns.

In the kernels d is the direction; row is int64 [ROWS, 1], the place in the batch; live [ROWS, 1], whether there is
such a row; t the time; state = row of [D, B]; at = row of [T, B, D]; col [1, BLOCK]; tiles are float32 [ROWS, BLOCK].

Test: pytest tests/test_recurrent_triton.py
"""

from __future__ import annotations

import triton
import triton.language as tl

from ._common import dropout


@triton.jit
def load(x, index, mask):
    return tl.load(x + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(x, index, value, mask):
    tl.store(x + index, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def place(step, count, batch, ROWS: tl.constexpr):
    """d, row, live, t, state, at: where program (block of rows, direction) is in the given step of its direction."""
    d = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    t = tl.where(d == 0, step, count - 1 - step).to(tl.int64)
    return d, row, row < batch, t, d * batch + row, (t * batch + row) * tl.num_programs(1) + d


@triton.jit
def running(lengths, row, live, t):
    """bool [ROWS, 1]: the rows whose sequence is not over at time t."""
    if lengths is None:
        return live
    else:
        return live & (tl.load(lengths + row, mask=live, other=0) > t)


@triton.jit
def zoned(seed, which: tl.constexpr, p, index):
    """How much of its old value an element keeps: p, or 0 or 1 where there is a seed. index: in [T, B, D, N]."""
    if seed is None:
        return p
    else:
        return 1.0 - dropout(1.0, tl.load(seed + which), index, p, 1.0)


@triton.jit
def normal(x, first, cols, live, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """mean and rstd [ROWS, 1] of the rows x[first .. first + cols]; first: int64 [ROWS, 1]."""
    lanes = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        total += load(x, first + col, live & (col < cols))
    mean = tl.sum(total, 1)[:, None] / cols
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        mask = live & (col < cols)
        apart = tl.where(mask, load(x, first + col, mask) - mean, 0.0)
        squares += apart * apart
    return mean, tl.rsqrt(tl.sum(squares, 1)[:, None] / cols + eps)


@triton.jit
def leave(
    new, h_in, h_mask, seed, y, h_out, operand, here, at, state, col, mask, size, zoneout_h, ZONE_H: tl.constexpr
):  # fmt: skip
    """h of the step from what the cell gives: y, the state, and what the next product takes, h * h_mask rounded."""
    h = load(h_in, state * size + col, mask)
    if ZONE_H:
        new = new + zoned(seed, 0, zoneout_h, at * size + col) * (h - new)
    h = tl.where(here, new, h)
    store(y, at * size + col, tl.where(here, h, 0.0), mask)
    store(h_out, state * size + col, h, mask)
    if h_mask is not None:
        h = h * load(h_mask, state * size + col, mask)
    store(operand, state * size + col, h, mask)


@triton.jit
def arrive(
    dy, through, direct, h_mask, seed, here, at, state, col, mask, size, zoneout_h, ZONE_H: tl.constexpr
):  # fmt: skip
    """The gradient of h of a step: what of it goes to the cell, and what stays with the h before.

    through: the gradient that came through the product of the step after; direct: what it left. What is over when it
    runs gave 0 to the product.
    """
    dh = load(through, state * size + col, mask)
    if h_mask is not None:
        dh = dh * load(h_mask, state * size + col, mask)
    dh = dh + load(direct, state * size + col, mask)
    if dy is not None:
        dh = dh + tl.where(here, load(dy, at * size + col, mask), 0.0)
    z = dh * 0.0
    if ZONE_H:
        z += zoned(seed, 0, zoneout_h, at * size + col)
    return (1.0 - z) * dh, tl.where(here, z * dh, dh)


@triton.jit
def accumulate(parts, index, tile, mask):
    """parts[index] += the sum of the tile's rows. A line of parts belongs to one program: no other one writes it."""
    tl.store(parts + index, tl.load(parts + index, mask=mask, other=0.0) + tl.sum(tile, 0)[None, :], mask=mask)


@triton.jit
def normal_backward(
    grad, u, weight, du, operand, parts, d, state, at, live, cols, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The gradient of u [T, B, D, cols] from that of LN(u) * weight, grad [D, B, cols] float32, which the program has
    written: du, the same as the operand [D, B, cols] of the next product, and the sum for weight in parts."""
    tl.debug_barrier()  # threads may read what others of the program have written
    mean, rstd = normal(u, at * cols, cols, live, eps, BLOCK, ROWS)
    lanes = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        mask = live & (col < cols)
        g = load(grad, state * cols + col, mask) * load(weight, d * cols + col, mask)
        total += g
        products += g * (load(u, at * cols + col, mask) - mean)
    mean_g = tl.sum(total, 1)[:, None] / cols
    mean_gh = tl.sum(products, 1)[:, None] / cols * rstd
    line = (tl.program_id(0) * tl.num_programs(1) + d) * cols
    for start in range(0, cols, BLOCK):
        col = start + lanes
        mask = live & (col < cols)
        g = load(grad, state * cols + col, mask)
        hat = (load(u, at * cols + col, mask) - mean) * rstd
        accumulate(parts, line + col, g * hat, col < cols)
        tile = rstd * (g * load(weight, d * cols + col, mask) - mean_g - hat * mean_gh)
        store(du, at * cols + col, tile, mask)
        store(operand, state * cols + col, tile, mask)


# ---- Whole sequences ------------------------------------------------------------------------------------------------
# A program runs all steps of a block of rows of one direction, and w_hh of all gates stays on the multiprocessor.
# 16 bits: 16 rows, which tensor cores take at least; w_hh in shared memory, where Triton moves a product's operand that
# is the same in every step. float32: one row, w_hh in registers, multiplied and summed in float32: three products of
# tensor cores ("tf32x3") missed the rule of tolerances on long sequences, and with "ieee" Triton 3.9 crashed.


@triton.jit
def weight_tile(w_hh, d, gate: tl.constexpr, gates: tl.constexpr, hidden, TURNED: tl.constexpr, BLOCK: tl.constexpr):
    """w_hh [D, gates * H, H] of one gate, zeros around it: [BLOCK outputs, BLOCK inputs], or turned."""
    one, other = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    first = (d * gates + gate) * hidden * hidden
    at = one + other * hidden if TURNED else one * hidden + other
    return tl.load(w_hh + first + at, mask=(one < hidden) & (other < hidden), other=0.0)


@triton.jit
def product(a, w, plus):
    """float32 a [ROWS, K], rounded to the dtype of w [K, N]: float32 plus + a w [ROWS, N]; ROWS = 1 in float32."""
    if w.dtype == tl.float32:
        return plus + tl.sum(tl.trans(a) * w, 0)[None, :]
    else:
        return tl.dot(a.to(w.dtype), w, plus)
