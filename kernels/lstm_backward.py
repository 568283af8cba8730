"""Room lstm in Triton, backward (contract: fastdl/ops/lstm.py; meaning: fastdl/reference/lstm.py).

A step loop, two launches a step: `step_backward` takes the gradients of h and c to those of all gates of both
directions, through layer norm of the cell and of u; the product with w_hh by torch.bmm gives that of the h before. With
projection `arrive_backward` and a product with w_hr come first. Sums for dln_weight, dpeephole and the cell's norm are
kept by block of rows, each line by one program, over all steps; their lines are then added in order. Hidden sizes that
fit run in one launch: lstm_sequence.py.

Test: pytest tests/test_recurrent_triton.py, make triton-compile
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import lstm_sequence as _sequence
from ._common import tanh
from ._recurrent import accumulate, arrive, load, normal_backward, place, running, store, zoned
from ._recurrent_launch import (
    contiguous,
    first_gradients,
    multiplier,
    quiet,
    refuse_double_backward,
    sequence_block,
    sums,
    tiling,
    two,
    zero_parts,
)


@triton.jit
def _saved(gates, cells, c0, at, before, state, col, mask, hidden, inside, outside):
    """i, f, g, o, c of the step before, and s. before: row of [T, B, D] of the step before, else ``outside``."""
    to = at * (4 * hidden) + col
    i = load(gates, to, mask)
    f = load(gates, to + hidden, mask)
    g = load(gates, to + 2 * hidden, mask)
    o = load(gates, to + 3 * hidden, mask)
    c = load(cells, before * hidden + col, mask & inside) + load(c0, state * hidden + col, mask & outside)
    return i, f, g, o, c, f * c + i * g


@triton.jit
def _cell_gradient(
    dy, through, direct, dm, h_mask, seed, here, at, state, col, mask, hidden, zoneout_h, ZONE_H: tl.constexpr
):  # fmt: skip
    """dm, and what of dh stays with the h before; with projection dm came from the product, and the rest is done."""
    if dm is None:
        return arrive(dy, through, direct, h_mask, seed, here, at, state, col, mask, hidden, zoneout_h, ZONE_H)
    else:
        return load(dm, state * hidden + col, mask), 0.0


@triton.jit(do_not_specialize=["time"])
def step_backward(
    dy, through, direct, dm, dc_in, gates, cells, c0, u_all, ln_weight, peephole, ln_c_weight, ln_c_bias, h_mask,
    lengths, seed, da, du, operand, direct_out, dc_out, m, ln_parts, peephole_parts, ln_c_parts, ln_b_parts, scratch,
    time, count, batch, hidden, span, zoneout_h, zoneout_c, eps,
    ZONE_H: tl.constexpr, ZONE_C: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """u_all [T, B, D, 4 H]: u of all steps. time: the step as the forward counts. operand [D, B, 4 H]: of the product,
    du rounded. scratch [D, B, 4 H] float32: da, with layer norm. parts: [blocks of rows, ...] of the gradient.
    m [T, B, D, H]: with projection."""
    d, row, live, t, state, at = place(time, count, batch, ROWS)
    here = running(lengths, row, live, t)
    last = t - 1 + 2 * d + row * 0  # [ROWS, 1]: the time of the step before
    inside, outside = (last >= 0) & (last < count), (last < 0) | (last >= count)
    before = (last * batch + row) * tl.num_programs(1) + d
    lanes = tl.arange(0, BLOCK)[None, :]
    first = tl.program_id(2) * span
    end = tl.minimum(first + span, hidden)
    line = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + d

    mean_s, rstd_s, mean_g, mean_gh = 0.0, 0.0, 0.0, 0.0
    if ln_c_weight is not None:  # moments of s, then the means that the gradient of its norm takes
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(first, end, BLOCK):
            col = start + lanes
            _, _, _, _, _, s = _saved(
                gates, cells, c0, at, before, state, col, live & (col < end), hidden, inside, outside
            )
            total += s
        mean_s = tl.sum(total, 1)[:, None] / hidden
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(first, end, BLOCK):
            col = start + lanes
            mask = live & (col < end)
            _, _, _, _, _, s = _saved(gates, cells, c0, at, before, state, col, mask, hidden, inside, outside)
            apart = tl.where(mask, s - mean_s, 0.0)
            total += apart * apart
        rstd_s = tl.rsqrt(tl.sum(total, 1)[:, None] / hidden + eps)
        total = tl.zeros([ROWS, BLOCK], tl.float32)
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(first, end, BLOCK):
            col = start + lanes
            mask = live & (col < end)
            _, _, _, o, _, s = _saved(gates, cells, c0, at, before, state, col, mask, hidden, inside, outside)
            hat = (s - mean_s) * rstd_s
            scale = load(ln_c_weight, d * hidden + col, mask)
            v = tanh(hat * scale + load(ln_c_bias, d * hidden + col, mask))
            dm_tile, _ = _cell_gradient(
                dy, through, direct, dm, h_mask, seed, here, at, state, col, mask, hidden, zoneout_h, ZONE_H
            )  # fmt: skip
            dv = dm_tile * o * (1.0 - v * v) * scale
            total += dv
            products += dv * hat
        mean_g = tl.sum(total, 1)[:, None] / hidden
        mean_gh = tl.sum(products, 1)[:, None] / hidden

    for start in range(first, end, BLOCK):
        col = start + lanes
        mask = live & (col < end)
        i, f, g, o, c, s = _saved(gates, cells, c0, at, before, state, col, mask, hidden, inside, outside)
        dm_tile, kept = _cell_gradient(
            dy, through, direct, dm, h_mask, seed, here, at, state, col, mask, hidden, zoneout_h, ZONE_H
        )  # fmt: skip
        if dm is None:
            store(direct_out, state * hidden + col, kept, mask)
        dc = load(dc_in, state * hidden + col, mask)
        z = dc * 0.0
        if ZONE_C:
            z += zoned(seed, 1, zoneout_c, at * hidden + col)
        ds = (1.0 - z) * dc
        if ln_c_weight is None:
            v = tanh(s)
            ds += dm_tile * o * (1.0 - v * v)
        else:
            hat = (s - mean_s) * rstd_s
            scale = load(ln_c_weight, d * hidden + col, mask)
            v = tanh(hat * scale + load(ln_c_bias, d * hidden + col, mask))
            dv = dm_tile * o * (1.0 - v * v)
            ds += rstd_s * (dv * scale - mean_g - hat * mean_gh)
            dv = tl.where(here & mask, dv, 0.0)
            accumulate(ln_c_parts, line * hidden + col, dv * hat, col < end)
            accumulate(ln_b_parts, line * hidden + col, dv, col < end)
        if m is not None:
            store(m, at * hidden + col, o * v, mask)
        do = dm_tile * v * o * (1.0 - o)
        if peephole is not None:
            ds += do * load(peephole, (d * 3 + 2) * hidden + col, mask)
        di = ds * g * i * (1.0 - i)
        df = ds * c * f * (1.0 - f)
        dg = ds * i * (1.0 - g * g)
        dc_before = z * dc + ds * f
        if peephole is not None:
            dc_before += di * load(peephole, d * 3 * hidden + col, mask)
            dc_before += df * load(peephole, (d * 3 + 1) * hidden + col, mask)
        store(dc_out, state * hidden + col, tl.where(here, dc_before, dc), mask)
        # Masked, because the tile's elements outside of a row would be part of sums.
        valid = here & mask
        di, df = tl.where(valid, di, 0.0), tl.where(valid, df, 0.0)
        dg, do = tl.where(valid, dg, 0.0), tl.where(valid, do, 0.0)
        if peephole is not None:
            accumulate(peephole_parts, line * 3 * hidden + col, di * c, col < end)
            accumulate(peephole_parts, (line * 3 + 1) * hidden + col, df * c, col < end)
            accumulate(peephole_parts, (line * 3 + 2) * hidden + col, do * s, col < end)
        to = at * (4 * hidden) + col
        store(da, to, di, mask)
        store(da, to + hidden, df, mask)
        store(da, to + 2 * hidden, dg, mask)
        store(da, to + 3 * hidden, do, mask)
        to = state * (4 * hidden) + col
        if ln_weight is None:
            store(operand, to, di, mask)
            store(operand, to + hidden, df, mask)
            store(operand, to + 2 * hidden, dg, mask)
            store(operand, to + 3 * hidden, do, mask)
        else:
            store(scratch, to, di, mask)
            store(scratch, to + hidden, df, mask)
            store(scratch, to + 2 * hidden, dg, mask)
            store(scratch, to + 3 * hidden, do, mask)
    if ln_weight is not None:
        normal_backward(
            scratch, u_all, ln_weight, du, operand, ln_parts, d, state, at, live, 4 * hidden, eps, BLOCK, ROWS
        )  # fmt: skip


@triton.jit(do_not_specialize=["time"])
def arrive_backward(
    dy, through, direct, h_mask, lengths, seed, out, operand, direct_out, time, count, batch, size, zoneout_h,
    ZONE_H: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """With projection: out [T, B, D, P], the gradient of w_hr m, and the same as operand [D, B, P] of the product."""
    _, row, live, t, state, at = place(time, count, batch, ROWS)
    here = running(lengths, row, live, t)
    col = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask = live & (col < size)
    tile, kept = arrive(dy, through, direct, h_mask, seed, here, at, state, col, mask, size, zoneout_h, ZONE_H)
    tile = tl.where(here, tile, 0.0)
    store(out, at * size + col, tile, mask)
    store(operand, state * size + col, tile, mask)
    store(direct_out, state * size + col, kept, mask)


KERNELS = (step_backward, arrive_backward)


def _steps(
    dy, direct, dc, gates, cells, c0, w_hh, u, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask, lengths, seed,
    zoneout_h, zoneout_c, eps,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The step loop, backwards. direct [D, B, P], dc [D, B, H]: gradients of the last states."""
    (count, batch, directions, _), hidden, size = gates.shape, cells.shape[-1], w_hh.shape[-1]
    whole = ln_weight is not None or ln_c_weight is not None
    tile = tiling("lstm_step_backward", gates.device, batch, directions, hidden, whole)
    after = tiling("lstm_arrive_backward", gates.device, batch, directions, size, False)
    da = torch.empty_like(gates)
    du = None if ln_weight is None else torch.empty_like(gates)
    out = None if w_hr is None else gates.new_empty(*gates.shape[:3], size)
    m = None if w_hr is None else torch.empty_like(cells)
    out_operand = None if w_hr is None else w_hr.new_empty(directions, batch, size)
    scratch = None if ln_weight is None else c0.new_empty(directions, batch, 4 * hidden)
    operand = w_hh.new_empty(directions, batch, 4 * hidden)
    parts = [zero_parts(c0, t, tile) for t in (ln_weight, peephole, ln_c_weight, ln_c_bias)]
    times, project = multiplier(w_hh), None if w_hr is None else multiplier(w_hr)
    directs, dcs, through, dm = two(direct), two(dc), torch.zeros_like(direct), None
    zones = (zoneout_h > 0, zoneout_c > 0)
    for done, time in enumerate(reversed(range(count))):
        to_direct, to_dc = directs[done % 2], dcs[done % 2]
        if project is not None:
            arrive_backward[after.grid](
                dy, through, direct, h_mask, lengths, seed, out, out_operand, to_direct, time, count, batch, size,
                zoneout_h, zones[0], **after.options,
            )  # fmt: skip
            dm = project(out_operand)
        step_backward[tile.grid](
            dy, through, direct, dm, dc, gates, cells, c0, u, ln_weight, peephole, ln_c_weight, ln_c_bias, h_mask,
            lengths, seed, da, du, operand, to_direct, to_dc, m, *parts, scratch, time, count, batch, hidden, tile.span,
            zoneout_h, zoneout_c, eps, *zones, **tile.options,
        )  # fmt: skip
        through, direct, dc = times(operand), to_direct, to_dc
    dh0 = direct + (through if h_mask is None else through * h_mask)
    dc0 = dc if count else dc.clone()  # no steps: outputs never alias inputs
    none = gates.new_empty(0)
    return da, none if du is None else du, dh0, dc0, *sums(gates, *parts), *(none if t is None else t for t in (out, m))


def lstm_backward(dy, dh_n, dc_n, dgates, dcells, gates, cells, c0, w_hh, *rest) -> tuple[Tensor, ...]:
    """Arguments and results: fastdl/reference/lstm.py."""
    refuse_double_backward(dgates=dgates, dcells=dcells)
    scalars = rest[-3:]
    state = (*c0.shape[:2], w_hh.shape[-1])
    last = first_gradients((dh_n, state), (dc_n, c0.shape), like=c0)
    tensors = contiguous(gates, cells, c0, w_hh, *rest[:-3])
    with quiet(gates.device):
        dy, (gates, cells, c0, w_hh, _, ln_weight, peephole, ln_c_weight, _, w_hr, *others) = *contiguous(dy), tensors
        block = sequence_block("lstm_sequence_backward", gates.device, 4, c0.shape[-1], w_hh.dtype)
        if block is None or not gates.numel() or not (ln_weight is None and ln_c_weight is None and w_hr is None):
            return _steps(dy, *last, *tensors, *scalars)
        arguments = (block, dy, *last, gates, cells, c0, w_hh, peephole, *others, *scalars[:2])
        da, dh0, dc0, dpeephole = _sequence.backward(*arguments)
        none, some = (gates.new_empty(0, dtype=t) for t in (gates.dtype, torch.float32))
        return da, none, dh0, dc0, some, dpeephole, some.clone(), some.clone(), none.clone(), none.clone()
