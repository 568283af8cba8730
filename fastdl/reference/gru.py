"""GRU over whole sequences in plain PyTorch: the meaning of the op, forward and backward by explicit formula.

One step of one direction, with shapes as in fastdl/reference/_recurrent.py, P = H and G = 3 gates in the order r z n:

    u       = w_hh (h * h_mask)                        h rounded to the dtype of w_hh before the product
    u       = LN(u) * ln_weight                        with layer norm
    u_n    += bias_n
    r, z    = sigmoid(gates_x + u)
    n       = tanh(gates_x + r * u_n)
    new     = (1 - z) * n + z * h
    h       = zone * h + (1 - zone) * new              zone: 0 or 1 in training, the probability in evaluation

h is kept in float32 (float64 for float64). A sequence that is over keeps its h and gives 0.

Cho et al., "Learning Phrase Representations using RNN Encoder-Decoder" (2014), in torch's variant, which multiplies r
with the product and not with h. Layer norm: Ba et al. (2016); zoneout: Krueger et al. (2017).
Test: tests/test_gru.py.
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


def gru_forward(
    gates_x: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    bias_n: Tensor | None,
    ln_weight: Tensor | None,
    h_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    zoneout_h: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """gates_x [T, B, D, 3 H]; h0 [D, B, H] in the compute dtype; w_hh [D, 3 H, H]; bias_n [D, H]; ln_weight [D, 3 H];
    h_mask [D, B, H]; lengths int64 [B]; seed int64 [2] -> y [T, B, D, H], h_n [D, B, H], gates [T, B, D, 4 H]: r, z, n
    and u_n (0 past the end)."""
    wide, (count, batch, directions, _), hidden = compute_dtype(gates_x.dtype), gates_x.shape, h0.shape[-1]
    zone = zoneout(seed, 0, zoneout_h, (count, batch, directions, hidden), wide)
    ys, saved, last = [], [], []
    for d in range(directions):
        h, w, bias, ln, mask = of_direction(d, h0, w_hh, bias_n, ln_weight, h_mask)
        y_d, gates_d = [None] * count, [None] * count
        for t in steps(count, d):
            u = product(h if mask is None else h * mask, w)
            if ln is not None:
                u = layer_norm(u, ln, eps)
            u_r, u_z, u_n = u.chunk(3, -1)
            if bias is not None:
                u_n = u_n + bias
            x_r, x_z, x_n = gates_x[t, :, d].to(wide).chunk(3, -1)
            r, z = (x_r + u_r).sigmoid(), (x_z + u_z).sigmoid()
            n = (x_n + r * u_n).tanh()
            new = n + z * (h - n)
            here = running(lengths, t)
            h = mix(here, new if zone is None else new + zone[t, :, d] * (h - new), h)
            y_d[t], gates_d[t] = mix(here, h, 0.0), mix(here, torch.cat((r, z, n, u_n), -1), 0.0)
        for parts, part in ((ys, y_d), (saved, gates_d), (last, h)):
            parts.append(part)
    shape = (count, batch, directions)
    return (
        stacked(ys, gates_x, (*shape, hidden), gates_x.dtype),
        torch.stack(last),
        stacked(saved, gates_x, (*shape, 4 * hidden), gates_x.dtype),
    )


def gru_inference(*arguments) -> tuple[Tensor, Tensor]:
    """The arguments of gru_forward and, last, the packed weights (which only the CPU kernels read) -> y, h_n."""
    return gru_forward(*arguments[:-1])[:2]


def gru_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dgates: Tensor | None,
    gates: Tensor,
    y: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    u: Tensor | None,
    ln_weight: Tensor | None,
    h_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    zoneout_h: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the outputs of gru_forward (None: zero; that of gates only in a double backward), what it gave,
    and u [T, B, D, 3 H], the products w_hh (h * h_mask) of all steps, where there is layer norm ->

        da  [T, B, D, 3 H]  of gates_x          du  [T, B, D, 3 H]  of u           dh0  [D, B, H]
        dbias_n  [D, H]                         dln_weight [D, 3 H] ([0] without)  in the compute dtype
    """
    wide, (count, batch, directions, _), hidden = compute_dtype(gates.dtype), gates.shape, h0.shape[-1]
    zone = zoneout(seed, 0, zoneout_h, (count, batch, directions, hidden), wide)
    das, dus, dh0, dbias, dln = ([] for _ in range(5))
    zero = y.new_zeros((), dtype=wide)
    for d in range(directions):
        h_first, w, ln, mask = of_direction(d, h0, w_hh, ln_weight, h_mask)
        dh = y.new_zeros(batch, hidden, dtype=wide) if dh_n is None else dh_n[d]
        da_d, du_d = [None] * count, [None] * count
        dbias_d, dln_d = y.new_zeros(hidden, dtype=wide), zero if ln is None else torch.zeros_like(ln)
        before = -1 if d == 0 else 1
        for t in reversed(steps(count, d)):
            here = running(lengths, t)
            h = h_first
            if 0 <= t + before < count:
                h = mix(running(lengths, t + before), y[t + before, :, d].to(wide), h_first)
            r, z, n, u_n = gates[t, :, d].to(wide).chunk(4, -1)
            dr, dz, dn, du_n = (zero,) * 4 if dgates is None else dgates[t, :, d].to(wide).chunk(4, -1)
            dh_t = dh if dy is None else dh + mix(here, dy[t, :, d].to(wide), 0.0)
            keep = zero if zone is None else zone[t, :, d]

            dnew = (1 - keep) * dh_t
            dn = (dn + dnew * (1 - z)) * (1 - n * n)
            dz = (dz + dnew * (h - n)) * z * (1 - z)
            dr = (dr + dn * u_n) * r * (1 - r)
            du_n = du_n + dn * r
            da = mix(here, torch.cat((dr, dz, dn), -1), 0.0)
            du = mix(here, torch.cat((dr, dz, du_n), -1), 0.0)
            dbias_d = dbias_d + du[:, 2 * hidden :].sum(0)
            if ln is not None:
                du, dscale = layer_norm_backward(du, u[t, :, d].to(wide), ln, eps)
                dln_d = dln_d + dscale.sum(0)
            through = product(du, w.t())
            dh_before = keep * dh_t + dnew * z + (through if mask is None else through * mask)
            dh = mix(here, dh_before, dh_t)
            da_d[t], du_d[t] = da, du
        for parts, part in ((das, da_d), (dus, du_d), (dh0, dh), (dbias, dbias_d), (dln, dln_d)):
            parts.append(part)
    shape = (count, batch, directions, 3 * hidden)
    return (
        stacked(das, gates, shape, gates.dtype),
        stacked(dus, gates, shape, gates.dtype),
        torch.stack(dh0),
        torch.stack(dbias),
        y.new_empty(0, dtype=wide) if ln_weight is None else torch.stack(dln),
    )
