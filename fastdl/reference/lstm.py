"""LSTM over whole sequences in plain PyTorch: the meaning of the op, forward and backward by explicit formula.

One step of one direction, with shapes as in fastdl/reference/_recurrent.py and G = 4 gates in the order i f g o:

    u          = w_hh (h * h_mask)                     h rounded to the dtype of w_hh before the product
    u          = LN(u) * ln_weight                     with layer norm
    i, f, g, o = gates_x + u
    i, f      += peephole_i * c, peephole_f * c
    i, f, g    = sigmoid(i), sigmoid(f), tanh(g)
    s          = f * c + i * g
    o          = sigmoid(o + peephole_o * s)
    m          = o * tanh(LN(s) * ln_c_weight + ln_c_bias)      o * tanh(s) without layer norm
    c          = z_c * c + (1 - z_c) * s               z: 0 or 1 in training, the probability in evaluation
    h          = z_h * h + (1 - z_h) * (w_hr m)        m itself without projection

h and c are kept in float32 (float64 for float64). A sequence that is over keeps its h and c and gives 0.

Hochreiter and Schmidhuber, "Long Short-Term Memory" (1997); peepholes: Gers and Schmidhuber, "Recurrent Nets that Time
and Count" (2000); projection: Sak et al. (2014); layer norm: Ba et al., "Layer Normalization" (2016), equations 20 to
22; zoneout: Krueger et al. (2017).
Test: tests/test_lstm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._recurrent import (
    compute_dtype,
    layer_norm,
    layer_norm_backward,
    mix,
    of_direction,
    product,
    running,
    stacked,
    steps,
    zoneout,
)


def lstm_forward(
    gates_x: Tensor,
    h0: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    ln_weight: Tensor | None,
    peephole: Tensor | None,
    ln_c_weight: Tensor | None,
    ln_c_bias: Tensor | None,
    w_hr: Tensor | None,
    h_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    zoneout_h: float,
    zoneout_c: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gates_x [T, B, D, 4 H]; h0 [D, B, P], c0 [D, B, H] in the compute dtype; w_hh [D, 4 H, P]; ln_weight [D, 4 H];
    peephole [D, 3, H] for i f o; ln_c_weight, ln_c_bias [D, H]; w_hr [D, P, H]; h_mask [D, B, P]; lengths int64 [B];
    seed int64 [2] -> y [T, B, D, P], h_n [D, B, P], c_n [D, B, H], gates [T, B, D, 4 H] after their sigmoid or tanh (0
    past the end), cells [T, B, D, H]: c after each step."""
    wide, (count, batch, directions, _), hidden = compute_dtype(gates_x.dtype), gates_x.shape, c0.shape[-1]
    zone_h = zoneout(seed, 0, zoneout_h, (count, batch, directions, h0.shape[-1]), wide)
    zone_c = zoneout(seed, 1, zoneout_c, (count, batch, directions, hidden), wide)
    ys, saved, states, last_h, last_c = [], [], [], [], []
    for d in range(directions):
        h, c, w, ln, peep, ln_c, ln_b, project, mask = of_direction(
            d, h0, c0, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask
        )
        y_d, gates_d, cells_d = ([None] * count for _ in range(3))
        for t in steps(count, d):
            u = product(h if mask is None else h * mask, w)
            if ln is not None:
                u = layer_norm(u, ln, eps)
            i, f, g, o = (gates_x[t, :, d].to(wide) + u).chunk(4, -1)
            if peep is not None:
                i, f = i + peep[0] * c, f + peep[1] * c
            i, f, g = i.sigmoid(), f.sigmoid(), g.tanh()
            s = f * c + i * g
            o = (o if peep is None else o + peep[2] * s).sigmoid()
            m = o * (s if ln_c is None else layer_norm(s, ln_c, eps) + ln_b).tanh()
            new = m if project is None else product(m, project)
            here = running(lengths, t)
            c = mix(here, s if zone_c is None else s + zone_c[t, :, d] * (c - s), c)
            h = mix(here, new if zone_h is None else new + zone_h[t, :, d] * (h - new), h)
            y_d[t], gates_d[t], cells_d[t] = mix(here, h, 0.0), mix(here, torch.cat((i, f, g, o), -1), 0.0), c
        for parts, part in ((ys, y_d), (saved, gates_d), (states, cells_d), (last_h, h), (last_c, c)):
            parts.append(part)
    shape = (count, batch, directions)
    return (
        stacked(ys, gates_x, (*shape, h0.shape[-1]), gates_x.dtype),
        torch.stack(last_h),
        torch.stack(last_c),
        stacked(saved, gates_x, (*shape, 4 * hidden), gates_x.dtype),
        stacked(states, gates_x, (*shape, hidden), gates_x.dtype),
    )


def lstm_inference(*arguments) -> tuple[Tensor, Tensor, Tensor]:
    """The arguments of lstm_forward and, last, the packed weights (which only the CPU kernels read) -> y, h_n, c_n."""
    return lstm_forward(*arguments[:-1])[:3]


def lstm_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dc_n: Tensor | None,
    dgates: Tensor | None,
    dcells: Tensor | None,
    gates: Tensor,
    cells: Tensor,
    c0: Tensor,
    w_hh: Tensor,
    u: Tensor | None,
    ln_weight: Tensor | None,
    peephole: Tensor | None,
    ln_c_weight: Tensor | None,
    ln_c_bias: Tensor | None,
    w_hr: Tensor | None,
    h_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    zoneout_h: float,
    zoneout_c: float,
    eps: float,
) -> tuple[Tensor, ...]:
    """The gradients of the outputs of lstm_forward (None: zero; those of gates and cells only in a double backward),
    what it saved, and u [T, B, D, 4 H], the products w_hh (h * h_mask) of all steps, where there is layer norm ->

        da    [T, B, D, 4 H]   of gates_x                      du  [T, B, D, 4 H]  of u ([0] without layer norm)
        dh0   [D, B, P], dc0 [D, B, H]                         dln_weight [D, 4 H], dpeephole [D, 3, H]
        dln_c_weight, dln_c_bias [D, H]                        (the last four in the compute dtype, [0] where not given)
        dm_out [T, B, D, P]    of w_hr m                       m   [T, B, D, H]    ([0] without projection)
    """
    wide, (count, batch, directions, _), hidden = compute_dtype(gates.dtype), gates.shape, cells.shape[-1]
    size = w_hh.shape[-1]
    zone_h = zoneout(seed, 0, zoneout_h, (count, batch, directions, size), wide)
    zone_c = zoneout(seed, 1, zoneout_c, (count, batch, directions, hidden), wide)
    das, dus, outs, ms, dh0, dc0 = [], [], [], [], [], []
    dln, dpeep, dln_c, dln_b = ([] for _ in range(4))
    zero = cells.new_zeros((), dtype=wide)
    for d in range(directions):
        c_first, w, ln, peep, ln_c, ln_b, project, mask = of_direction(
            d, c0, w_hh, ln_weight, peephole, ln_c_weight, ln_c_bias, w_hr, h_mask
        )
        dh = cells.new_zeros(batch, size, dtype=wide) if dh_n is None else dh_n[d]
        dc = cells.new_zeros(batch, hidden, dtype=wide) if dc_n is None else dc_n[d]
        da_d, du_d, out_d, m_d = ([None] * count for _ in range(4))
        sums = [torch.zeros_like(t) if t is not None else zero for t in (ln, peep, ln_c, ln_c)]
        before = -1 if d == 0 else 1
        for t in reversed(steps(count, d)):
            here = running(lengths, t)
            c = cells[t + before, :, d].to(wide) if 0 <= t + before < count else c_first
            i, f, g, o = gates[t, :, d].to(wide).chunk(4, -1)
            di, df, dg, do = (zero,) * 4 if dgates is None else dgates[t, :, d].to(wide).chunk(4, -1)
            dh_t = dh if dy is None else dh + mix(here, dy[t, :, d].to(wide), 0.0)
            dc_t = dc if dcells is None else dc + dcells[t, :, d].to(wide)
            z_h, z_c = (zero if z is None else z[t, :, d] for z in (zone_h, zone_c))

            s = f * c + i * g
            v = (s if ln_c is None else layer_norm(s, ln_c, eps) + ln_b).tanh()
            out = (1 - z_h) * dh_t
            dm = out if project is None else product(out, project.t())
            do = (do + dm * v) * o * (1 - o)
            dv = dm * o * (1 - v * v)
            ds = (1 - z_c) * dc_t
            if ln_c is None:
                ds = ds + dv
            else:
                ds_norm, dscale = layer_norm_backward(dv, s, ln_c, eps)
                ds = ds + ds_norm
                sums[2] = sums[2] + mix(here, dscale, 0.0).sum(0)
                sums[3] = sums[3] + mix(here, dv, 0.0).sum(0)
            if peep is not None:
                ds = ds + do * peep[2]
            di = (di + ds * g) * i * (1 - i)
            df = (df + ds * c) * f * (1 - f)
            dg = (dg + ds * i) * (1 - g * g)
            dc_before = z_c * dc_t + ds * f
            if peep is not None:
                dc_before = dc_before + di * peep[0] + df * peep[1]
                sums[1] = sums[1] + torch.stack([mix(here, p, 0.0).sum(0) for p in (di * c, df * c, do * s)])
            da = mix(here, torch.cat((di, df, dg, do), -1), 0.0)
            du = da
            if ln is not None:
                du, dscale = layer_norm_backward(da, u[t, :, d].to(wide), ln, eps)
                sums[0] = sums[0] + dscale.sum(0)
            through = product(du, w.t())
            dh_before = z_h * dh_t + (through if mask is None else through * mask)
            dh, dc = mix(here, dh_before, dh_t), mix(here, dc_before, dc_t)
            da_d[t], du_d[t], out_d[t], m_d[t] = da, du, mix(here, out, 0.0), o * v
        for parts, part in ((das, da_d), (dus, du_d), (outs, out_d), (ms, m_d), (dh0, dh), (dc0, dc)):
            parts.append(part)
        for parts, part in ((dln, sums[0]), (dpeep, sums[1]), (dln_c, sums[2]), (dln_b, sums[3])):
            parts.append(part)
    shape, dtype, none = (count, batch, directions), gates.dtype, cells.new_empty(0, dtype=wide)
    empty = cells.new_empty(0)
    return (
        stacked(das, gates, (*shape, 4 * hidden), dtype),
        empty if ln_weight is None else stacked(dus, gates, (*shape, 4 * hidden), dtype),
        torch.stack(dh0),
        torch.stack(dc0),
        none if ln_weight is None else torch.stack(dln),
        none.clone() if peephole is None else torch.stack(dpeep),
        none.clone() if ln_c_weight is None else torch.stack(dln_c),
        none.clone() if ln_c_weight is None else torch.stack(dln_b),
        empty.clone() if w_hr is None else stacked(outs, gates, (*shape, size), dtype),
        empty.clone() if w_hr is None else stacked(ms, gates, (*shape, hidden), dtype),
    )
