"""Room rnn in Triton: whole sequences in one launch, where w_hh fits on a multiprocessor (contract: fastdl/ops/rnn.py).

A program takes one direction of 16 sequences, or of one in float32, through all steps: h stays in registers, w_hh
beside it or in shared memory (_recurrent.py), and what the next step adds is loaded while a step is computed. Layer
norm, whose sums over rows would hold up every step, has the step loop (rnn.py).

Test: pytest tests/test_recurrent_triton.py, make triton-compile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import tanh
from ._recurrent import load, place, product, running, store, weight_tile, zoned
from ._recurrent_launch import sequence_config


@triton.jit
def _element(x, time, count, batch, hidden, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """x [T, B, D, H] of a step, as it is stored; 0 before the first and past the last step, and where there is no x."""
    if x is None:
        return 0.0
    else:
        _, row, live, _, _, at = place(time, count, batch, ROWS)
        col = tl.arange(0, BLOCK)[None, :]
        inside = (row * 0 + time >= 0) & (row * 0 + time < count)
        return tl.load(x + at * hidden + col, mask=live & inside & (col < hidden), other=0.0)


@triton.jit
def sequence(
    gates_x, w_hh, h0, h_mask, lengths, seed, y, h_n, gates_out, count, batch, hidden, zoneout_h,
    ZONE_H: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    d, row, live, _, state, _ = place(0, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = live & (col < hidden)
    w = weight_tile(w_hh, d, 0, 1, hidden, True, BLOCK)
    if h_mask is not None:
        dropped = load(h_mask, state * hidden + col, mask)
    h = load(h0, state * hidden + col, mask)
    x = _element(gates_x, 0, count, batch, hidden, BLOCK, ROWS)
    for time in range(count):
        _, _, _, t, _, at = place(time, count, batch, ROWS)
        here = running(lengths, row, live, t)
        operand = h
        if h_mask is not None:
            operand = h * dropped
        new = product(operand, w, x.to(tl.float32))
        x = _element(gates_x, time + 1, count, batch, hidden, BLOCK, ROWS)
        new = tl.where(new <= 0, 0.0, new) if RELU else tanh(new)
        if gates_out is not None:
            store(gates_out, at * hidden + col, tl.where(here, new, 0.0), mask)
        if ZONE_H:
            new = new + zoned(seed, 0, zoneout_h, at * hidden + col) * (h - new)
        h = tl.where(here, new, h)
        store(y, at * hidden + col, tl.where(here, h, 0.0), mask)
    store(h_n, state * hidden + col, h, mask)


@triton.jit
def sequence_backward(
    dy, dh_n, gates, w_hh, h_mask, lengths, seed, da, dh0, count, batch, hidden, zoneout_h,
    ZONE_H: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    d, row, live, _, state, _ = place(0, count, batch, ROWS)
    col = tl.arange(0, BLOCK)[None, :]
    mask = live & (col < hidden)
    w = weight_tile(w_hh, d, 0, 1, hidden, False, BLOCK)
    if h_mask is not None:
        dropped = load(h_mask, state * hidden + col, mask)
    dh = load(dh_n, state * hidden + col, mask)
    next_grad = _element(dy, count - 1, count, batch, hidden, BLOCK, ROWS)
    next_new = _element(gates, count - 1, count, batch, hidden, BLOCK, ROWS)
    for done in range(count):
        time = count - 1 - done
        _, _, _, t, _, at = place(time, count, batch, ROWS)
        here = running(lengths, row, live, t)
        if dy is not None:
            dh += tl.where(here, next_grad.to(tl.float32), 0.0)
        new = next_new.to(tl.float32)
        next_grad = _element(dy, time - 1, count, batch, hidden, BLOCK, ROWS)
        next_new = _element(gates, time - 1, count, batch, hidden, BLOCK, ROWS)
        z = dh * 0.0
        if ZONE_H:
            z += zoned(seed, 0, zoneout_h, at * hidden + col)
        out = (1.0 - z) * dh
        grad = tl.where(new > 0, out, 0.0) if RELU else out * (1.0 - new * new)
        grad = tl.where(here, grad, 0.0)
        store(da, at * hidden + col, grad, mask)
        through = product(grad, w, grad * 0.0)
        if h_mask is not None:
            through *= dropped
        dh = tl.where(here, z * dh + through, dh)
    store(dh0, state * hidden + col, dh, mask)


KERNELS = (sequence, sequence_backward)


def forward(
    block, gates_x, h0, w_hh, h_mask, lengths, seed, zoneout_h, relu, save
) -> tuple[Tensor, Tensor, Tensor | None]:
    """y, h_n, gates; gates None unless ``save``."""
    count, batch, directions, hidden = gates_x.shape
    y, h_n, gates = torch.empty_like(gates_x), torch.empty_like(h0), torch.empty_like(gates_x) if save else None
    c = sequence_config("rnn_sequence", gates_x.device, block, w_hh.dtype)
    sequence[(triton.cdiv(batch, c.rows), directions)](
        gates_x, w_hh, h0, h_mask, lengths, seed, y, h_n, gates, count, batch, hidden, zoneout_h, zoneout_h > 0, relu,
        BLOCK=block, ROWS=c.rows, **c.options,
    )  # fmt: skip
    return y, h_n, gates


def backward(
    block, dy, dh_n, gates, w_hh, h_mask, lengths, seed, zoneout_h, relu
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """da, dh0"""
    count, batch, directions, hidden = gates.shape
    da, dh0 = torch.empty_like(gates), torch.empty_like(dh_n)
    c = sequence_config("rnn_sequence_backward", gates.device, block, w_hh.dtype)
    sequence_backward[(triton.cdiv(batch, c.rows), directions)](
        dy, dh_n, gates, w_hh, h_mask, lengths, seed, da, dh0, count, batch, hidden, zoneout_h, zoneout_h > 0, relu,
        BLOCK=block, ROWS=c.rows, **c.options,
    )  # fmt: skip
    return da, dh0
