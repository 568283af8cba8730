"""Room gru in Triton (contract: fastdl/ops/gru.py; meaning: fastdl/reference/gru.py).

    u = w_hh (h * h_mask);   r, z = gates_x + u;   n = tanh(gates_x + r * (u_n + bias_n));   h = n + z * (h - n)

and the options. A step loop for every shape and option, two launches a step: the product with w_hh by torch.bmm, and
`step` (forward) or `step_backward` for all gates of both directions, with layer norm of u, zoneout, lengths, and what
the next product takes. Hidden sizes that fit run whole sequences in one launch: gru_sequence.py.

Test: pytest tests/test_recurrent_triton.py, make triton-compile        Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gru_sequence as _sequence
from ._common import Case, sigmoid, tanh
from ._recurrent import accumulate, arrive, leave, load, normal, normal_backward, place, running, store
from ._recurrent_launch import (
    contiguous,
    first_gradients,
    first_operand,
    multiplier,
    quiet,
    refuse_double_backward,
    room_cases,
    sequence_block,
    sums,
    tiling,
    two,
    zero_parts,
)

__all__ = ["compile_cases", "gru_backward", "gru_forward", "gru_inference"]


@triton.jit
def _product(u, ln_weight, mean, rstd, d, state, col, mask, hidden, gate: tl.constexpr):
    """u, or LN(u) * ln_weight, of one gate."""
    tile = load(u, state * (3 * hidden) + gate * hidden + col, mask)
    if ln_weight is not None:
        tile = (tile - mean) * rstd * load(ln_weight, d * (3 * hidden) + gate * hidden + col, mask)
    return tile


@triton.jit(do_not_specialize=["time"])
def step(
    gates_x, u, h_in, bias_n, ln_weight, h_mask, lengths, seed, y, h_out, gates_out, operand, time, count, batch,
    hidden, span, zoneout_h, eps, ZONE_H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """u [D, B, 3 H] float32; operand: of the next product; gates_out: None where no gradient is wanted."""
    d, row, live, t, state, at = place(time, count, batch, ROWS)
    here = running(lengths, row, live, t)
    first = tl.program_id(2) * span
    end = tl.minimum(first + span, hidden)
    mean, rstd = 0.0, 0.0
    if ln_weight is not None:
        mean, rstd = normal(u, state * (3 * hidden), 3 * hidden, live, eps, BLOCK, ROWS)
    for start in range(first, end, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        mask = live & (col < end)
        to = at * (3 * hidden) + col
        u_r = _product(u, ln_weight, mean, rstd, d, state, col, mask, hidden, 0)
        u_z = _product(u, ln_weight, mean, rstd, d, state, col, mask, hidden, 1)
        u_n = _product(u, ln_weight, mean, rstd, d, state, col, mask, hidden, 2)
        if bias_n is not None:
            u_n += load(bias_n, d * hidden + col, mask)
        r = sigmoid(load(gates_x, to, mask) + u_r)
        z = sigmoid(load(gates_x, to + hidden, mask) + u_z)
        n = tanh(load(gates_x, to + 2 * hidden, mask) + r * u_n)
        if gates_out is not None:
            to = at * (4 * hidden) + col
            store(gates_out, to, tl.where(here, r, 0.0), mask)
            store(gates_out, to + hidden, tl.where(here, z, 0.0), mask)
            store(gates_out, to + 2 * hidden, tl.where(here, n, 0.0), mask)
            store(gates_out, to + 3 * hidden, tl.where(here, u_n, 0.0), mask)
        new = n + z * (load(h_in, state * hidden + col, mask) - n)
        leave(new, h_in, h_mask, seed, y, h_out, operand, here, at, state, col, mask, hidden, zoneout_h, ZONE_H)


@triton.jit(do_not_specialize=["time"])
def step_backward(
    dy, through, direct, gates, y, h0, u_all, ln_weight, h_mask, lengths, seed, da, du, operand, direct_out, bias_parts,
    ln_parts, scratch, time, count, batch, hidden, span, zoneout_h, eps,
    ZONE_H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """u_all [T, B, D, 3 H]: u of all steps. time: the step as the forward counts. operand [D, B, 3 H]: of the product,
    du rounded. bias_parts [blocks of rows, D, H]. With layer norm, scratch [D, B, 3 H] float32: the gradient of what
    it gave; ln_parts [blocks of rows, D, 3 H]."""
    d, row, live, t, state, at = place(time, count, batch, ROWS)
    here = running(lengths, row, live, t)
    last = t - 1 + 2 * d + row * 0  # [ROWS, 1]: the time of the step before
    from_y = running(lengths, row, live, last) & (last >= 0) & (last < count)
    before = (last * batch + row) * tl.num_programs(1) + d
    line = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + d) * hidden
    first = tl.program_id(2) * span
    end = tl.minimum(first + span, hidden)
    for start in range(first, end, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        mask = live & (col < end)
        dnew, kept = arrive(dy, through, direct, h_mask, seed, here, at, state, col, mask, hidden, zoneout_h, ZONE_H)
        to = at * (4 * hidden) + col
        r, z = load(gates, to, mask), load(gates, to + hidden, mask)
        n, u_n = load(gates, to + 2 * hidden, mask), load(gates, to + 3 * hidden, mask)
        h = tl.where(from_y, load(y, before * hidden + col, mask & from_y), load(h0, state * hidden + col, mask))
        store(direct_out, state * hidden + col, tl.where(here, kept + dnew * z, kept), mask)
        dn = dnew * (1.0 - z) * (1.0 - n * n)
        dz = dnew * (h - n) * z * (1.0 - z)
        # Masked, because the tile's elements outside of a row would be part of sums.
        dn, dz = tl.where(here & mask, dn, 0.0), tl.where(here & mask, dz, 0.0)
        dr = dn * u_n * r * (1.0 - r)
        du_n = dn * r
        accumulate(bias_parts, line + col, du_n, col < end)
        to = at * (3 * hidden) + col
        store(da, to, dr, mask)
        store(da, to + hidden, dz, mask)
        store(da, to + 2 * hidden, dn, mask)
        at_state = state * (3 * hidden) + col
        if ln_weight is None:
            store(du, to, dr, mask)
            store(du, to + hidden, dz, mask)
            store(du, to + 2 * hidden, du_n, mask)
            store(operand, at_state, dr, mask)
            store(operand, at_state + hidden, dz, mask)
            store(operand, at_state + 2 * hidden, du_n, mask)
        else:
            store(scratch, at_state, dr, mask)
            store(scratch, at_state + hidden, dz, mask)
            store(scratch, at_state + 2 * hidden, du_n, mask)
    if ln_weight is not None:
        normal_backward(
            scratch, u_all, ln_weight, du, operand, ln_parts, d, state, at, live, 3 * hidden, eps, BLOCK, ROWS
        )  # fmt: skip


def _steps(
    gates_x, h0, w_hh, bias_n, ln_weight, h_mask, lengths, seed, zoneout_h, eps, save
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The step loop. save: gates are wanted."""
    count, batch, directions, hidden = *gates_x.shape[:3], h0.shape[-1]
    y = gates_x.new_empty(count, batch, directions, hidden)
    gates = gates_x.new_empty(count, batch, directions, 4 * hidden) if save else None
    states, operand, times = two(h0), first_operand(h0, h_mask, w_hh), multiplier(w_hh.transpose(1, 2))
    tile = tiling("gru_step", gates_x.device, batch, directions, hidden, ln_weight is not None)
    h = h0
    for time in range(count):
        to = states[time % 2]
        step[tile.grid](
            gates_x, times(operand), h, bias_n, ln_weight, h_mask, lengths, seed, y, to, gates, operand, time, count,
            batch, hidden, tile.span, zoneout_h, eps, zoneout_h > 0, **tile.options,
        )  # fmt: skip
        h = to
    return y, h, gates


def _forward(save: bool, gates_x, h0, *rest) -> tuple[Tensor | None, ...]:
    (gates_x, h0, w_hh, bias_n, ln_weight, *others), scalars = contiguous(gates_x, h0, *rest[:-2]), rest[-2:]
    hidden = h0.shape[-1]
    with quiet(gates_x.device):
        if not gates_x.numel():
            y, gates = (gates_x.new_empty(*gates_x.shape[:3], n) for n in (hidden, 4 * hidden))
            return y, h0.clone(), gates
        block = sequence_block("gru_sequence", gates_x.device, 3, hidden, w_hh.dtype)
        if block is None or ln_weight is not None:
            return _steps(gates_x, h0, w_hh, bias_n, ln_weight, *others, *scalars, save)
        return _sequence.forward(block, gates_x, h0, w_hh, bias_n, *others, scalars[0], save)


def gru_forward(*arguments) -> tuple[Tensor, ...]:
    """Arguments and results: fastdl/reference/gru.py."""
    return _forward(True, *arguments)


def gru_inference(*arguments) -> tuple[Tensor, Tensor]:
    """Arguments and results: fastdl/reference/gru.py; ``packed``, the last, is for the CPU's kernels."""
    return _forward(False, *arguments[:-1])[:2]


def _steps_backward(
    dy, direct, gates, y, h0, w_hh, u, ln_weight, h_mask, lengths, seed, zoneout_h, eps
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The step loop, backwards. direct [D, B, H]: the gradient of the last state."""
    count, batch, directions, hidden = y.shape
    tile = tiling("gru_step_backward", gates.device, batch, directions, hidden, ln_weight is not None)
    da, du = (gates.new_empty(count, batch, directions, 3 * hidden) for _ in range(2))
    operand = w_hh.new_empty(directions, batch, 3 * hidden)
    scratch = None if ln_weight is None else h0.new_empty(directions, batch, 3 * hidden)
    parts = [zero_parts(h0, t, tile) for t in (h0[:, 0] if batch else h0.new_empty(directions, hidden), ln_weight)]
    times, directs, through = multiplier(w_hh), two(direct), torch.zeros_like(direct)
    for done, time in enumerate(reversed(range(count))):
        to = directs[done % 2]
        step_backward[tile.grid](
            dy, through, direct, gates, y, h0, u, ln_weight, h_mask, lengths, seed, da, du, operand, to, *parts,
            scratch, time, count, batch, hidden, tile.span, zoneout_h, eps, zoneout_h > 0, **tile.options,
        )  # fmt: skip
        through, direct = times(operand), to
    dh0 = direct + (through if h_mask is None else through * h_mask)
    return da, du, dh0, *sums(gates, *parts)


def gru_backward(dy, dh_n, dgates, gates, y, h0, w_hh, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/gru.py."""
    refuse_double_backward(dgates=dgates)
    last = first_gradients((dh_n, h0.shape), like=h0)
    dy, gates, y, h0, w_hh, u, ln_weight, *others = contiguous(dy, gates, y, h0, w_hh, *rest[:-2])
    scalars = rest[-2:]
    with quiet(gates.device):
        block = sequence_block("gru_sequence_backward", gates.device, 3, h0.shape[-1], w_hh.dtype)
        if block is None or not gates.numel() or ln_weight is not None:
            return _steps_backward(dy, *last, gates, y, h0, w_hh, u, ln_weight, *others, *scalars)
        results = _sequence.backward(block, dy, *last, gates, y, h0, w_hh, *others, scalars[0])
        return *results, gates.new_empty(0, dtype=torch.float32)


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room."""
    missing = ("bias_n", "ln_weight", "scratch", "ln_parts", "u_all", "h_mask", "lengths", "seed", "gates_out", "dy")
    bare = {**dict.fromkeys(missing), "ZONE_H": False, "BARE": True, "NOTE": "bare"}
    return room_cases("gru", cc, 3, (step, step_backward, *_sequence.KERNELS), ({"ZONE_H": True}, bare))
