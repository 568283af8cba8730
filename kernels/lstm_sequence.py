"""Room lstm in Triton: whole sequences in one launch, where w_hh fits in shared memory (contract: fastdl/ops/lstm.py).

A program takes one direction of 16 sequences, or of one in float32, through all steps: h and c stay in registers, w_hh
beside them or in shared memory (_recurrent.py), and the gates of the next step are loaded while a step is computed. The
same for the backward, with the sums for peepholes in registers. Layer norm and projection, whose sums over rows and
second product would hold up every step, have the step loop (lstm.py).

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
    to = gates_x + at * (4 * hidden) + col
    i = tl.load(to, mask=mask, other=0.0)
    f = tl.load(to + hidden, mask=mask, other=0.0)
    g = tl.load(to + 2 * hidden, mask=mask, other=0.0)
    o = tl.load(to + 3 * hidden, mask=mask, other=0.0)
    return i, f, g, o


@triton.jit
def sequence(
    gates_x, w_hh, h0, c0, peephole, h_mask, lengths, seed, y, h_n, c_n, gates_out, cells_out, count, batch, hidden,
    zoneout_h, zoneout_c, ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    d, row, live, _, state, _ = place(0, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = live & (col < hidden)
    w_i = weight_tile(w_hh, d, 0, 4, hidden, True, BLOCK)
    w_f = weight_tile(w_hh, d, 1, 4, hidden, True, BLOCK)
    w_g = weight_tile(w_hh, d, 2, 4, hidden, True, BLOCK)
    w_o = weight_tile(w_hh, d, 3, 4, hidden, True, BLOCK)
    if peephole is not None:
        p_i = load(peephole, d * 3 * hidden + col, col < hidden)
        p_f = load(peephole, (d * 3 + 1) * hidden + col, col < hidden)
        p_o = load(peephole, (d * 3 + 2) * hidden + col, col < hidden)
    if h_mask is not None:
        dropped = load(h_mask, state * hidden + col, mask)
    h = load(h0, state * hidden + col, mask)
    c = load(c0, state * hidden + col, mask)
    x_i, x_f, x_g, x_o = _inputs(gates_x, 0, count, batch, hidden, BLOCK, ROWS)
    for time in range(count):
        _, _, _, t, _, at = place(time, count, batch, ROWS)
        here = running(lengths, row, live, t)
        operand = h
        if h_mask is not None:
            operand = h * dropped
        i = product(operand, w_i, x_i.to(tl.float32))
        f = product(operand, w_f, x_f.to(tl.float32))
        g = product(operand, w_g, x_g.to(tl.float32))
        o = product(operand, w_o, x_o.to(tl.float32))
        x_i, x_f, x_g, x_o = _inputs(gates_x, time + 1, count, batch, hidden, BLOCK, ROWS)
        if peephole is not None:
            i += p_i * c
            f += p_f * c
        i, f, g = sigmoid(i), sigmoid(f), tanh(g)
        s = f * c + i * g
        if peephole is not None:
            o += p_o * s
        o = sigmoid(o)
        new = o * tanh(s)
        if ZONE_C:
            s = s + zoned(seed, 1, zoneout_c, at * hidden + col) * (c - s)
        if ZONE_H:
            new = new + zoned(seed, 0, zoneout_h, at * hidden + col) * (h - new)
        c = tl.where(here, s, c)
        h = tl.where(here, new, h)
        store(y, at * hidden + col, tl.where(here, h, 0.0), mask)
        if gates_out is not None:
            to = at * (4 * hidden) + col
            store(gates_out, to, tl.where(here, i, 0.0), mask)
            store(gates_out, to + hidden, tl.where(here, f, 0.0), mask)
            store(gates_out, to + 2 * hidden, tl.where(here, g, 0.0), mask)
            store(gates_out, to + 3 * hidden, tl.where(here, o, 0.0), mask)
            store(cells_out, at * hidden + col, c, mask)
    store(h_n, state * hidden + col, h, mask)
    store(c_n, state * hidden + col, c, mask)


@triton.jit
def _saved(dy, gates, cells, c0, done, count, batch, hidden, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """What the step that is ``done`` steps from the last one left, as it is stored: dy, i, f, g, o; and c before it."""
    time = count - 1 - done
    d, row, live, t, state, at = place(time, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = live & (col < hidden) & (row * 0 + time >= 0)
    to = gates + at * (4 * hidden) + col
    i = tl.load(to, mask=mask, other=0.0)
    f = tl.load(to + hidden, mask=mask, other=0.0)
    g = tl.load(to + 2 * hidden, mask=mask, other=0.0)
    o = tl.load(to + 3 * hidden, mask=mask, other=0.0)
    before = ((t - 1 + 2 * d) * batch + row) * tl.num_programs(1) + d
    c = load(cells, before * hidden + col, mask & (row * 0 + time > 0))
    c += load(c0, state * hidden + col, mask & (row * 0 + time == 0))
    grad = 0.0
    if dy is not None:
        grad = tl.load(dy + at * hidden + col, mask=mask, other=0.0)
    return grad, i, f, g, o, c


@triton.jit
def _through(di, df, dg, do, w_i, w_f, w_g, w_o):
    """The product of the gradients of all gates with w_hh [ROWS, BLOCK]; w: [outputs, inputs]."""
    if w_i.dtype == tl.float32:  # one sum over threads for all gates
        parts = tl.trans(di) * w_i + tl.trans(df) * w_f + tl.trans(dg) * w_g + tl.trans(do) * w_o
        return tl.sum(parts, 0)[None, :]
    else:
        return product(do, w_o, product(dg, w_g, product(df, w_f, product(di, w_i, di * 0.0))))


@triton.jit
def sequence_backward(
    dy, dh_n, dc_n, gates, cells, c0, w_hh, peephole, h_mask, lengths, seed, da, dh0, dc0, peephole_parts, count, batch,
    hidden, zoneout_h, zoneout_c,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """peephole_parts [blocks of rows, D, 3, H]"""
    d, row, live, _, state, _ = place(0, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = live & (col < hidden)
    w_i = weight_tile(w_hh, d, 0, 4, hidden, False, BLOCK)
    w_f = weight_tile(w_hh, d, 1, 4, hidden, False, BLOCK)
    w_g = weight_tile(w_hh, d, 2, 4, hidden, False, BLOCK)
    w_o = weight_tile(w_hh, d, 3, 4, hidden, False, BLOCK)
    sum_i = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_f = tl.zeros([ROWS, BLOCK], tl.float32)
    sum_o = tl.zeros([ROWS, BLOCK], tl.float32)
    if peephole is not None:
        p_i = load(peephole, d * 3 * hidden + col, col < hidden)
        p_f = load(peephole, (d * 3 + 1) * hidden + col, col < hidden)
        p_o = load(peephole, (d * 3 + 2) * hidden + col, col < hidden)
    if h_mask is not None:
        dropped = load(h_mask, state * hidden + col, mask)
    dh = load(dh_n, state * hidden + col, mask)
    dc = load(dc_n, state * hidden + col, mask)
    grad, s_i, s_f, s_g, s_o, s_c = _saved(dy, gates, cells, c0, 0, count, batch, hidden, BLOCK, ROWS)
    for done in range(count):
        _, _, _, t, _, at = place(count - 1 - done, count, batch, ROWS)
        here = running(lengths, row, live, t)
        if dy is not None:
            dh += tl.where(here, grad.to(tl.float32), 0.0)
        i, f, g, o, c = s_i.to(tl.float32), s_f.to(tl.float32), s_g.to(tl.float32), s_o.to(tl.float32), s_c
        grad, s_i, s_f, s_g, s_o, s_c = _saved(dy, gates, cells, c0, done + 1, count, batch, hidden, BLOCK, ROWS)
        z_h, z_c = dh * 0.0, dc * 0.0
        if ZONE_H:
            z_h += zoned(seed, 0, zoneout_h, at * hidden + col)
        if ZONE_C:
            z_c += zoned(seed, 1, zoneout_c, at * hidden + col)
        s = f * c + i * g
        v = tanh(s)
        dm = (1.0 - z_h) * dh
        do = tl.where(here, dm * v * o * (1.0 - o), 0.0)
        ds = (1.0 - z_c) * dc + dm * o * (1.0 - v * v)
        if peephole is not None:
            ds += do * p_o
        di = tl.where(here, ds * g * i * (1.0 - i), 0.0)
        df = tl.where(here, ds * c * f * (1.0 - f), 0.0)
        dg = tl.where(here, ds * i * (1.0 - g * g), 0.0)
        dc_before = z_c * dc + ds * f
        if peephole is not None:
            dc_before += di * p_i + df * p_f
            sum_i += di * c
            sum_f += df * c
            sum_o += do * s
        dc = tl.where(here, dc_before, dc)
        to = at * (4 * hidden) + col
        store(da, to, di, mask)
        store(da, to + hidden, df, mask)
        store(da, to + 2 * hidden, dg, mask)
        store(da, to + 3 * hidden, do, mask)
        through = _through(di, df, dg, do, w_i, w_f, w_g, w_o)
        if h_mask is not None:
            through *= dropped
        dh = tl.where(here, z_h * dh + through, dh)
    store(dh0, state * hidden + col, dh, mask)
    store(dc0, state * hidden + col, dc, mask)
    if peephole is not None:
        line = ((tl.program_id(0).to(tl.int64) * tl.num_programs(1) + d) * 3) * hidden + col
        store(peephole_parts, line, tl.sum(sum_i, 0)[None, :], col < hidden)
        store(peephole_parts, line + hidden, tl.sum(sum_f, 0)[None, :], col < hidden)
        store(peephole_parts, line + 2 * hidden, tl.sum(sum_o, 0)[None, :], col < hidden)


KERNELS = (sequence, sequence_backward)


def forward(
    block, gates_x, h0, c0, w_hh, peephole, h_mask, lengths, seed, zoneout_h, zoneout_c, save
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """Results: lstm_forward's; gates and cells None unless ``save``."""
    (count, batch, directions, _), hidden = gates_x.shape, c0.shape[-1]
    y = gates_x.new_empty(*gates_x.shape[:3], hidden)
    h_n, c_n = torch.empty_like(h0), torch.empty_like(c0)
    gates, cells = (torch.empty_like(gates_x), torch.empty_like(y)) if save else (None, None)
    c = sequence_config("lstm_sequence", gates_x.device, block, w_hh.dtype)
    sequence[(triton.cdiv(batch, c.rows), directions)](
        gates_x, w_hh, h0, c0, peephole, h_mask, lengths, seed, y, h_n, c_n, gates, cells, count, batch, hidden,
        zoneout_h, zoneout_c, zoneout_h > 0, zoneout_c > 0, BLOCK=block, ROWS=c.rows, **c.options,
    )  # fmt: skip
    return y, h_n, c_n, gates, cells


def backward(
    block, dy, dh_n, dc_n, gates, cells, c0, w_hh, peephole, h_mask, lengths, seed, zoneout_h, zoneout_c
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """da, dh0, dc0, dpeephole"""
    (count, batch, directions, _), hidden = gates.shape, cells.shape[-1]
    c = sequence_config("lstm_sequence_backward", gates.device, block, w_hh.dtype)
    grid = (triton.cdiv(batch, c.rows), directions)
    da, dh0, dc0 = torch.empty_like(gates), torch.empty_like(dh_n), torch.empty_like(dc_n)
    parts = None if peephole is None else c0.new_empty(grid[0], *peephole.shape)
    sequence_backward[grid](
        dy, dh_n, dc_n, gates, cells, c0, w_hh, peephole, h_mask, lengths, seed, da, dh0, dc0, parts, count, batch,
        hidden, zoneout_h, zoneout_c, zoneout_h > 0, zoneout_c > 0, BLOCK=block, ROWS=c.rows, **c.options,
    )  # fmt: skip
    return da, dh0, dc0, *sums(gates, parts)
