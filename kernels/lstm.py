"""Room lstm in Triton (contract: fastdl/ops/lstm.py; meaning: fastdl/reference/lstm.py).

    u = w_hh (h * h_mask);   i, f, g, o = gates_x + u;   c = f * c + i * g;   h = o * tanh(c)     and the options

A step loop for every shape and option, two launches a step (four with projection): the product with w_hh by torch.bmm,
then `step`: all gates of both directions, layer norm of u and of the cell, peepholes, zoneout, lengths, what the next
product takes. With projection `step` gives m, and `project` makes h of w_hr m. Hidden sizes that fit run whole
sequences in one launch: lstm_sequence.py.

Test: pytest tests/test_recurrent_triton.py, make triton-compile     Backward: lstm_backward.py     Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from . import lstm_backward as _backward
from . import lstm_sequence as _sequence
from ._common import Case, sigmoid, tanh
from ._recurrent import leave, load, normal, place, running, store, zoned
from ._recurrent_launch import contiguous, first_operand, multiplier, quiet, room_cases, sequence_block, tiling, two
from .lstm_backward import lstm_backward

__all__ = ["compile_cases", "lstm_backward", "lstm_forward", "lstm_inference"]


@triton.jit
def _gate(gates_x, u, ln_weight, mean, rstd, d, state, at, col, mask, hidden, gate: tl.constexpr):
    """gates_x + u, or with layer norm gates_x + LN(u) * ln_weight, of one gate."""
    at_gate = gate * hidden + col
    product = load(u, state * (4 * hidden) + at_gate, mask)
    if ln_weight is not None:
        product = (product - mean) * rstd * load(ln_weight, d * (4 * hidden) + at_gate, mask)
    return load(gates_x, at * (4 * hidden) + at_gate, mask) + product


@triton.jit(do_not_specialize=["time"])
def step(
    gates_x, u, h_in, c_in, ln_weight, peephole, ln_c_weight, ln_c_bias, h_mask, lengths, seed, y, h_out, c_out,
    gates_out, cells_out, operand, m, scratch, time, count, batch, hidden, span, zoneout_h, zoneout_c, eps,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """u [D, B, 4 H] float32; operand: of the next product; m [D, B, H] in the dtype of w_hr with projection, else None;
    gates_out, cells_out: None where no gradient is wanted; scratch [2, D, B, H] float32, with layer norm: o and s."""
    d, row, live, t, state, at = place(time, count, batch, ROWS)
    here = running(lengths, row, live, t)
    lanes = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(2) * span
    end = tl.minimum(first + span, hidden)
    mean, rstd = 0.0, 0.0
    if ln_weight is not None:
        mean, rstd = normal(u, state * (4 * hidden), 4 * hidden, live, eps, BLOCK, ROWS)
    again = scratch
    if ln_c_weight is not None:
        again += tl.num_programs(1).to(tl.int64) * batch * hidden
    for start in range(first, end, BLOCK):
        col = start + lanes
        mask = live & (col < end)
        c = load(c_in, state * hidden + col, mask)
        i = _gate(gates_x, u, ln_weight, mean, rstd, d, state, at, col, mask, hidden, 0)
        f = _gate(gates_x, u, ln_weight, mean, rstd, d, state, at, col, mask, hidden, 1)
        g = _gate(gates_x, u, ln_weight, mean, rstd, d, state, at, col, mask, hidden, 2)
        o = _gate(gates_x, u, ln_weight, mean, rstd, d, state, at, col, mask, hidden, 3)
        if peephole is not None:
            i += load(peephole, d * 3 * hidden + col, mask) * c
            f += load(peephole, (d * 3 + 1) * hidden + col, mask) * c
        i, f, g = sigmoid(i), sigmoid(f), tanh(g)
        s = f * c + i * g
        if peephole is not None:
            o += load(peephole, (d * 3 + 2) * hidden + col, mask) * s
        o = sigmoid(o)
        if ZONE_C:
            c = tl.where(here, s + zoned(seed, 1, zoneout_c, at * hidden + col) * (c - s), c)
        else:
            c = tl.where(here, s, c)
        store(c_out, state * hidden + col, c, mask)
        if gates_out is not None:
            to = at * (4 * hidden) + col
            store(gates_out, to, tl.where(here, i, 0.0), mask)
            store(gates_out, to + hidden, tl.where(here, f, 0.0), mask)
            store(gates_out, to + 2 * hidden, tl.where(here, g, 0.0), mask)
            store(gates_out, to + 3 * hidden, tl.where(here, o, 0.0), mask)
            store(cells_out, at * hidden + col, c, mask)
        if ln_c_weight is not None:
            store(scratch, state * hidden + col, o, mask)
            store(again, state * hidden + col, s, mask)
        elif m is not None:
            store(m, state * hidden + col, o * tanh(s), mask)
        else:
            leave(
                o * tanh(s), h_in, h_mask, seed, y, h_out, operand, here, at, state, col, mask, hidden, zoneout_h,
                ZONE_H,
            )  # fmt: skip
    if ln_c_weight is not None:
        tl.debug_barrier()  # threads may read what others of the program have written
        mean, rstd = normal(again, state * hidden, hidden, live, eps, BLOCK, ROWS)
        for start in range(first, end, BLOCK):
            col = start + lanes
            mask = live & (col < end)
            s = (load(again, state * hidden + col, mask) - mean) * rstd * load(ln_c_weight, d * hidden + col, mask)
            new = load(scratch, state * hidden + col, mask) * tanh(s + load(ln_c_bias, d * hidden + col, mask))
            if m is not None:
                store(m, state * hidden + col, new, mask)
            else:
                leave(
                    new, h_in, h_mask, seed, y, h_out, operand, here, at, state, col, mask, hidden, zoneout_h, ZONE_H
                )  # fmt: skip


@triton.jit(do_not_specialize=["time"])
def project(
    new, h_in, h_mask, lengths, seed, y, h_out, operand, time, count, batch, size, zoneout_h, ZONE_H: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """new [D, B, P] float32: w_hr m."""
    _, row, live, t, state, at = place(time, count, batch, ROWS)
    here = running(lengths, row, live, t)
    col = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = live & (col < size)
    leave(
        load(new, state * size + col, mask), h_in, h_mask, seed, y, h_out, operand, here, at, state, col, mask, size,
        zoneout_h, ZONE_H,
    )  # fmt: skip


def _steps(
    gates_x, h0, c0, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths, seed, zoneout_h,
    zoneout_c, eps, save,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """The step loop. save: gates and cells are wanted."""
    (count, batch, directions, _), (hidden, size) = gates_x.shape, (c0.shape[-1], h0.shape[-1])
    device, shape = gates_x.device, gates_x.shape[:3]
    y = gates_x.new_empty(*shape, size)
    gates = gates_x.new_empty(gates_x.shape) if save else None
    cells = gates_x.new_empty(*shape, hidden) if save else None
    hs, cs = two(h0), two(c0)
    operand, times = first_operand(h0, h_mask, w_hh), multiplier(w_hh.transpose(1, 2))
    m = None if w_hr is None else c0.new_empty(c0.shape, dtype=w_hr.dtype)
    back = None if w_hr is None else multiplier(w_hr.transpose(1, 2))
    scratch = None if ln_c_weight is None else c0.new_empty(2, *c0.shape)
    whole = ln_weight is not None or ln_c_weight is not None
    tile = tiling("lstm_step", device, batch, directions, hidden, whole)
    after = tiling("lstm_project", device, batch, directions, size, False)
    scalars = (count, batch, hidden, tile.span, zoneout_h, zoneout_c, eps, zoneout_h > 0, zoneout_c > 0)
    h, c = h0, c0
    for time in range(count):
        to_h, to_c = hs[time % 2], cs[time % 2]
        step[tile.grid](
            gates_x, times(operand), h, c, ln_weight, peephole, ln_c_weight, ln_c_bias, h_mask, lengths, seed,
            y, to_h, to_c, gates, cells, operand, m, scratch, time, *scalars, **tile.options,
        )  # fmt: skip
        if back is not None:
            project[after.grid](
                back(m), h, h_mask, lengths, seed, y, to_h, operand, time, count, batch, size, zoneout_h,
                zoneout_h > 0, **after.options,
            )  # fmt: skip
        h, c = to_h, to_c
    return y, h, c, gates, cells


def _forward(save: bool, gates_x, h0, c0, *rest) -> tuple[Tensor | None, ...]:
    tensors, scalars = contiguous(gates_x, h0, c0, *rest[:-3]), rest[-3:]
    with quiet(gates_x.device):
        if not gates_x.numel():
            outputs = [
                gates_x.new_empty(*gates_x.shape[:3], n) for n in (h0.shape[-1], gates_x.shape[-1], c0.shape[-1])
            ]
            return outputs[0], tensors[1].clone(), tensors[2].clone(), *outputs[1:]
        _, h, c, w_hh, ln_weight, peephole, ln_c_weight, _, w_hr, *others = tensors
        block = sequence_block("lstm_sequence", gates_x.device, 4, c.shape[-1], w_hh.dtype)
        if block is None or not (ln_weight is None and ln_c_weight is None and w_hr is None):
            return _steps(*tensors, *scalars, save)
        return _sequence.forward(block, tensors[0], h, c, w_hh, peephole, *others, *scalars[:2], save)


def lstm_forward(*arguments) -> tuple[Tensor, ...]:
    """Arguments and results: fastdl/reference/lstm.py."""
    return _forward(True, *arguments)


def lstm_inference(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/lstm.py; ``packed``, the last, is for the CPU's kernels."""
    return _forward(False, *arguments[:-1])[:3]


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room."""
    norms = ("ln_weight", "ln_c_weight", "ln_c_bias", "scratch", "ln_parts", "ln_c_parts", "ln_b_parts", "du", "u_all")
    others = ("peephole", "h_mask", "lengths", "seed", "gates_out", "cells_out", "peephole_parts", "dy")
    on, off = {"ZONE_H": True, "ZONE_C": True}, {"ZONE_H": False, "ZONE_C": False}
    plain = {**on, "m": None, "dm": None}
    bare = {**dict.fromkeys((*norms, *others)), **off, "m": None, "dm": None, "BARE": True, "NOTE": "bare"}
    projected = {**on, "NOTE": "projected"}
    kernels = (step, project, *_backward.KERNELS, *_sequence.KERNELS)
    return room_cases("lstm", cc, 4, kernels, (plain, bare, projected))
