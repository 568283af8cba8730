"""Room rnn in Triton (contract: fastdl/ops/rnn.py; meaning: fastdl/reference/rnn.py).

    u = w_hh (h * h_mask);   h = tanh(gates_x + u)  or  max(gates_x + u, 0)     and the options

A step loop for every shape and option, two launches a step: the product with w_hh by torch.bmm, and `step` (forward) or
`step_backward` for both directions, with layer norm of u, zoneout, lengths, and what the next product takes. Hidden
sizes that fit run whole sequences in one launch: rnn_sequence.py.

Test: pytest tests/test_recurrent_triton.py, make triton-compile        Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import rnn_sequence as _sequence
from ._common import Case, tanh
from ._recurrent import arrive, leave, load, normal, normal_backward, place, running, store
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

__all__ = ["compile_cases", "rnn_backward", "rnn_forward", "rnn_inference"]


@triton.jit(do_not_specialize=["time"])
def step(
    gates_x, u, h_in, ln_weight, h_mask, lengths, seed, y, h_out, gates_out, operand, time, count, batch, hidden, span,
    zoneout_h, eps, ZONE_H: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """u [D, B, H] float32; operand: of the next product; gates_out: None where no gradient is wanted."""
    d, row, live, t, state, at = place(time, count, batch, ROWS)
    here = running(lengths, row, live, t)
    first = tl.program_id(2) * span
    end = tl.minimum(first + span, hidden)
    if ln_weight is not None:
        mean, rstd = normal(u, state * hidden, hidden, live, eps, BLOCK, ROWS)
    for start in range(first, end, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        mask = live & (col < end)
        new = load(u, state * hidden + col, mask)
        if ln_weight is not None:
            new = (new - mean) * rstd * load(ln_weight, d * hidden + col, mask)
        new += load(gates_x, at * hidden + col, mask)
        new = tl.where(new <= 0, 0.0, new) if RELU else tanh(new)
        if gates_out is not None:
            store(gates_out, at * hidden + col, tl.where(here, new, 0.0), mask)
        leave(new, h_in, h_mask, seed, y, h_out, operand, here, at, state, col, mask, hidden, zoneout_h, ZONE_H)


@triton.jit(do_not_specialize=["time"])
def step_backward(
    dy, through, direct, gates, u_all, ln_weight, h_mask, lengths, seed, da, du, operand, direct_out, ln_parts, scratch,
    time, count, batch, hidden, span, zoneout_h, eps,
    ZONE_H: tl.constexpr, RELU: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """u_all [T, B, D, H]: u of all steps. time: the step as the forward counts. operand [D, B, H]: of the product, du
    rounded. With layer norm, scratch [D, B, H] float32: da; ln_parts [blocks of rows, D, H]."""
    d, row, live, t, state, at = place(time, count, batch, ROWS)
    here = running(lengths, row, live, t)
    first = tl.program_id(2) * span
    end = tl.minimum(first + span, hidden)
    for start in range(first, end, BLOCK):
        col = start + tl.arange(0, BLOCK)[None, :]
        mask = live & (col < end)
        out, kept = arrive(dy, through, direct, h_mask, seed, here, at, state, col, mask, hidden, zoneout_h, ZONE_H)
        store(direct_out, state * hidden + col, kept, mask)
        new = load(gates, at * hidden + col, mask)
        grad = tl.where(new > 0, out, 0.0) if RELU else out * (1.0 - new * new)
        grad = tl.where(here & mask, grad, 0.0)
        store(da, at * hidden + col, grad, mask)
        if ln_weight is None:
            store(operand, state * hidden + col, grad, mask)
        else:
            store(scratch, state * hidden + col, grad, mask)
    if ln_weight is not None:
        normal_backward(
            scratch, u_all, ln_weight, du, operand, ln_parts, d, state, at, live, hidden, eps, BLOCK, ROWS
        )  # fmt: skip


def _steps(
    gates_x, h0, w_hh, ln_weight, h_mask, lengths, seed, zoneout_h, eps, relu, save
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """The step loop. save: gates are wanted."""
    count, batch, directions, hidden = gates_x.shape
    y, gates = torch.empty_like(gates_x), torch.empty_like(gates_x) if save else None
    states, operand, times = two(h0), first_operand(h0, h_mask, w_hh), multiplier(w_hh.transpose(1, 2))
    tile = tiling("rnn_step", gates_x.device, batch, directions, hidden, ln_weight is not None)
    h = h0
    for time in range(count):
        to = states[time % 2]
        step[tile.grid](
            gates_x, times(operand), h, ln_weight, h_mask, lengths, seed, y, to, gates, operand, time, count, batch,
            hidden, tile.span, zoneout_h, eps, zoneout_h > 0, relu, **tile.options,
        )  # fmt: skip
        h = to
    return y, h, gates


def _forward(save: bool, gates_x, h0, *rest) -> tuple[Tensor | None, ...]:
    (gates_x, h0, w_hh, ln_weight, *others), scalars = contiguous(gates_x, h0, *rest[:-3]), rest[-3:]
    with quiet(gates_x.device):
        if not gates_x.numel():
            return torch.empty_like(gates_x), h0.clone(), torch.empty_like(gates_x)
        block = sequence_block("rnn_sequence", gates_x.device, 1, h0.shape[-1], w_hh.dtype)
        if block is None or ln_weight is not None:
            return _steps(gates_x, h0, w_hh, ln_weight, *others, *scalars, save)
        return _sequence.forward(block, gates_x, h0, w_hh, *others, scalars[0], scalars[2], save)


def rnn_forward(*arguments) -> tuple[Tensor, ...]:
    """Arguments and results: fastdl/reference/rnn.py."""
    return _forward(True, *arguments)


def rnn_inference(*arguments) -> tuple[Tensor, Tensor]:
    """Arguments and results: fastdl/reference/rnn.py; ``packed``, the last, is for the CPU's kernels."""
    return _forward(False, *arguments[:-1])[:2]


def _steps_backward(
    dy, direct, gates, w_hh, u, ln_weight, h_mask, lengths, seed, zoneout_h, eps, relu
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The step loop, backwards. direct [D, B, H]: the gradient of the last state."""
    count, batch, directions, hidden = gates.shape
    tile = tiling("rnn_step_backward", gates.device, batch, directions, hidden, ln_weight is not None)
    da, du = torch.empty_like(gates), None if ln_weight is None else torch.empty_like(gates)
    operand, scratch = direct.to(w_hh.dtype, copy=True), None if ln_weight is None else torch.empty_like(direct)
    parts, times = zero_parts(direct, ln_weight, tile), multiplier(w_hh)
    directs, through = two(direct), torch.zeros_like(direct)
    for done, time in enumerate(reversed(range(count))):
        to = directs[done % 2]
        step_backward[tile.grid](
            dy, through, direct, gates, u, ln_weight, h_mask, lengths, seed, da, du, operand, to, parts, scratch, time,
            count, batch, hidden, tile.span, zoneout_h, eps, zoneout_h > 0, relu, **tile.options,
        )  # fmt: skip
        through, direct = times(operand), to
    dh0 = direct + (through if h_mask is None else through * h_mask)
    return da, gates.new_empty(0) if du is None else du, dh0, *sums(gates, parts)


def rnn_backward(dy, dh_n, dgates, gates, h0, w_hh, *rest) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/rnn.py."""
    refuse_double_backward(dgates=dgates)
    last = first_gradients((dh_n, h0.shape), like=h0)
    dy, gates, w_hh, u, ln_weight, *others = contiguous(dy, gates, w_hh, *rest[:-3])
    scalars = rest[-3:]
    with quiet(gates.device):
        block = sequence_block("rnn_sequence_backward", gates.device, 1, h0.shape[-1], w_hh.dtype)
        if block is None or not gates.numel() or ln_weight is not None:
            return _steps_backward(dy, *last, gates, w_hh, u, ln_weight, *others, *scalars)
        da, dh0 = _sequence.backward(block, dy, *last, gates, w_hh, *others, scalars[0], scalars[2])
        return da, gates.new_empty(0), dh0, gates.new_empty(0, dtype=torch.float32)


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room."""
    missing = ("ln_weight", "scratch", "ln_parts", "du", "u_all", "h_mask", "lengths", "seed", "gates_out", "dy")
    full = {"ZONE_H": True, "RELU": False}
    bare = {**dict.fromkeys(missing), "ZONE_H": False, "RELU": False, "BARE": True, "NOTE": "bare"}
    kernels = (step, step_backward, *_sequence.KERNELS)
    return room_cases("rnn", cc, 1, kernels, (full, bare, {**full, "RELU": True, "NOTE": "relu"}))
