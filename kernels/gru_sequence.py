"""Room gru in Triton: whole sequences in one launch, where w_hh fits on a multiprocessor (contract: fastdl/ops/gru.py).

A program takes one direction of 16 sequences, or of one in float32, through all steps: h stays in registers, w_hh
beside it or in shared memory (_recurrent.py), and the gates of the next step are loaded while a step is computed. The
same for the backward, with the sum for bias_n in registers. Layer norm, whose sums over rows would hold up every step,
has the step loop (gru.py).

Test: pytest tests/test_recurrent_triton.py, make triton-compile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import sigmoid, tanh
from ._recurrent import load, place, product, running, store, weight_tile, zoned
from ._recurrent_launch import sequence_config, sums


@triton.jit
def _inputs(gates_x, time, count, batch, hidden, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """gates_x of a step, as they are stored; 0 past the last step."""
    _, row, live, _, _, at = place(time, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = live & (col < hidden) & (row * 0 + time < count)
    to = gates_x + at * (3 * hidden) + col
    r = tl.load(to, mask=mask, other=0.0)
    z = tl.load(to + hidden, mask=mask, other=0.0)
    n = tl.load(to + 2 * hidden, mask=mask, other=0.0)
    return r, z, n


@triton.jit
def sequence(
    gates_x, w_hh, h0, bias_n, h_mask, lengths, seed, y, h_n, gates_out, count, batch, hidden, zoneout_h,
    ZONE_H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    d, row, live, _, state, _ = place(0, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = live & (col < hidden)
    w_r = weight_tile(w_hh, d, 0, 3, hidden, True, BLOCK)
    w_z = weight_tile(w_hh, d, 1, 3, hidden, True, BLOCK)
    w_n = weight_tile(w_hh, d, 2, 3, hidden, True, BLOCK)
    bias = tl.zeros([ROWS, BLOCK], tl.float32)
    if bias_n is not None:
        bias += load(bias_n, d * hidden + col, col < hidden)
    if h_mask is not None:
        dropped = load(h_mask, state * hidden + col, mask)
    h = load(h0, state * hidden + col, mask)
    x_r, x_z, x_n = _inputs(gates_x, 0, count, batch, hidden, BLOCK, ROWS)
    for time in range(count):
        _, _, _, t, _, at = place(time, count, batch, ROWS)
        here = running(lengths, row, live, t)
        operand = h
        if h_mask is not None:
            operand = h * dropped
        r = sigmoid(product(operand, w_r, x_r.to(tl.float32)))
        z = sigmoid(product(operand, w_z, x_z.to(tl.float32)))
        u_n = product(operand, w_n, bias)
        n = tanh(x_n.to(tl.float32) + r * u_n)
        x_r, x_z, x_n = _inputs(gates_x, time + 1, count, batch, hidden, BLOCK, ROWS)
        new = n + z * (h - n)
        if ZONE_H:
            new = new + zoned(seed, 0, zoneout_h, at * hidden + col) * (h - new)
        h = tl.where(here, new, h)
        store(y, at * hidden + col, tl.where(here, h, 0.0), mask)
        if gates_out is not None:
            to = at * (4 * hidden) + col
            store(gates_out, to, tl.where(here, r, 0.0), mask)
            store(gates_out, to + hidden, tl.where(here, z, 0.0), mask)
            store(gates_out, to + 2 * hidden, tl.where(here, n, 0.0), mask)
            store(gates_out, to + 3 * hidden, tl.where(here, u_n, 0.0), mask)
    store(h_n, state * hidden + col, h, mask)


@triton.jit
def _saved(dy, gates, y, h0, lengths, done, count, batch, hidden, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """What the step that is ``done`` from the last one left, as it is stored: dy, r, z, n, u_n; and h before it."""
    time = count - 1 - done
    d, row, live, t, state, at = place(time, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    inside = live & (col < hidden)
    mask = inside & (row * 0 + time >= 0)
    to = gates + at * (4 * hidden) + col
    r = tl.load(to, mask=mask, other=0.0)
    z = tl.load(to + hidden, mask=mask, other=0.0)
    n = tl.load(to + 2 * hidden, mask=mask, other=0.0)
    u_n = tl.load(to + 3 * hidden, mask=mask, other=0.0)
    last = t - 1 + 2 * d
    from_y = running(lengths, row, live, last) & (row * 0 + time > 0)
    h = load(y, ((last * batch + row) * tl.num_programs(1) + d) * hidden + col, inside & from_y)
    h = tl.where(from_y, h, load(h0, state * hidden + col, inside))
    grad = 0.0
    if dy is not None:
        grad = tl.load(dy + at * hidden + col, mask=mask, other=0.0)
    return grad, r, z, n, u_n, h


@triton.jit
def _through(dr, dz, dn, w_r, w_z, w_n):
    """The product of the gradients of all gates with w_hh [ROWS, BLOCK]; w: [outputs, inputs]."""
    if w_r.dtype == tl.float32:  # one sum over threads for all gates
        return tl.sum(tl.trans(dr) * w_r + tl.trans(dz) * w_z + tl.trans(dn) * w_n, 0)[None, :]
    else:
        return product(dn, w_n, product(dz, w_z, product(dr, w_r, dr * 0.0)))


@triton.jit
def sequence_backward(
    dy, dh_n, gates, y, h0, w_hh, h_mask, lengths, seed, da, du, dh0, bias_parts, count, batch, hidden, zoneout_h,
    ZONE_H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """bias_parts [blocks of rows, D, H]"""
    d, row, live, _, state, _ = place(0, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = live & (col < hidden)
    w_r = weight_tile(w_hh, d, 0, 3, hidden, False, BLOCK)
    w_z = weight_tile(w_hh, d, 1, 3, hidden, False, BLOCK)
    w_n = weight_tile(w_hh, d, 2, 3, hidden, False, BLOCK)
    sum_n = tl.zeros([ROWS, BLOCK], tl.float32)
    if h_mask is not None:
        dropped = load(h_mask, state * hidden + col, mask)
    dh = load(dh_n, state * hidden + col, mask)
    grad, s_r, s_z, s_n, s_u, s_h = _saved(dy, gates, y, h0, lengths, 0, count, batch, hidden, BLOCK, ROWS)
    for done in range(count):
        _, _, _, t, _, at = place(count - 1 - done, count, batch, ROWS)
        here = running(lengths, row, live, t)
        if dy is not None:
            dh += tl.where(here, grad.to(tl.float32), 0.0)
        r, z, n, u_n, h = s_r.to(tl.float32), s_z.to(tl.float32), s_n.to(tl.float32), s_u.to(tl.float32), s_h
        grad, s_r, s_z, s_n, s_u, s_h = _saved(dy, gates, y, h0, lengths, done + 1, count, batch, hidden, BLOCK, ROWS)
        kept = dh * 0.0
        if ZONE_H:
            kept += zoned(seed, 0, zoneout_h, at * hidden + col)
        dnew = (1.0 - kept) * dh
        dn = tl.where(here, dnew * (1.0 - z) * (1.0 - n * n), 0.0)
        dz = tl.where(here, dnew * (h - n) * z * (1.0 - z), 0.0)
        dr = dn * u_n * r * (1.0 - r)
        du_n = dn * r
        sum_n += du_n
        to = at * (3 * hidden) + col
        store(da, to, dr, mask)
        store(da, to + hidden, dz, mask)
        store(da, to + 2 * hidden, dn, mask)
        store(du, to, dr, mask)
        store(du, to + hidden, dz, mask)
        store(du, to + 2 * hidden, du_n, mask)
        through = _through(dr, dz, du_n, w_r, w_z, w_n)
        if h_mask is not None:
            through *= dropped
        dh = tl.where(here, kept * dh + dnew * z + through, dh)
    store(dh0, state * hidden + col, dh, mask)
    line = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + d) * hidden + col
    store(bias_parts, line, tl.sum(sum_n, 0)[None, :], col < hidden)


KERNELS = (sequence, sequence_backward)


def forward(
    block, gates_x, h0, w_hh, bias_n, h_mask, lengths, seed, zoneout_h, save
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, h_n, gates; gates None unless ``save``."""
    count, batch, directions, hidden = *gates_x.shape[:3], h0.shape[-1]
    y, h_n = gates_x.new_empty(count, batch, directions, hidden), torch.empty_like(h0)
    gates = gates_x.new_empty(count, batch, directions, 4 * hidden) if save else None
    c = sequence_config("gru_sequence", gates_x.device, block, w_hh.dtype)
    sequence[(triton.cdiv(batch, c.rows), directions)](
        gates_x, w_hh, h0, bias_n, h_mask, lengths, seed, y, h_n, gates, count, batch, hidden, zoneout_h, zoneout_h > 0,
        BLOCK=block, ROWS=c.rows, **c.options,
    )  # fmt: skip
    return y, h_n, gates


def backward(
    block, dy, dh_n, gates, y, h0, w_hh, h_mask, lengths, seed, zoneout_h
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """da, du, dh0, dbias_n"""
    count, batch, directions, hidden = y.shape
    c = sequence_config("gru_sequence_backward", gates.device, block, w_hh.dtype)
    grid = (triton.cdiv(batch, c.rows), directions)
    da, du = (gates.new_empty(count, batch, directions, 3 * hidden) for _ in range(2))
    dh0, parts = torch.empty_like(dh_n), h0.new_empty(grid[0], directions, hidden)
    sequence_backward[grid](
        dy, dh_n, gates, y, h0, w_hh, h_mask, lengths, seed, da, du, dh0, parts, count, batch, hidden, zoneout_h,
        zoneout_h > 0, BLOCK=block, ROWS=c.rows, **c.options,
    )  # fmt: skip
    return da, du, dh0, *sums(gates, parts)
