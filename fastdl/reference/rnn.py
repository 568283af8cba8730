"""Elman RNN over whole sequences in plain PyTorch: the meaning of the op, forward and backward by explicit formula.

One step of one direction, with shapes as in fastdl/reference/_recurrent.py, P = H and one gate:

    u    = w_hh (h * h_mask)                           h rounded to the dtype of w_hh before the product
    u    = LN(u) * ln_weight                           with layer norm
    new  = tanh(gates_x + u)  or  max(gates_x + u, 0)
    h    = zone * h + (1 - zone) * new                 zone: 0 or 1 in training, the probability in evaluation

h is kept in float32 (float64 for float64). A sequence that is over keeps its h and gives 0.

Elman, "Finding Structure in Time" (1990). Layer norm: Ba et al. (2016); zoneout: Krueger et al. (2017).
Test: tests/test_rnn.py.
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


def rnn_forward(
    gates_x: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    ln_weight: Tensor | None,
    h_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    zoneout_h: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """gates_x [T, B, D, H]; h0 [D, B, H] in the compute dtype; w_hh [D, H, H]; ln_weight [D, H]; h_mask [D, B, H];
    lengths int64 [B]; seed int64 [2] -> y [T, B, D, H], h_n [D, B, H], gates [T, B, D, H]: what the activation gave (0
    past the end)."""
    wide, (count, batch, directions, hidden) = compute_dtype(gates_x.dtype), gates_x.shape
    zone = zoneout(seed, 0, zoneout_h, gates_x.shape, wide)
    ys, saved, last = [], [], []
    for d in range(directions):
        h, w, ln, mask = of_direction(d, h0, w_hh, ln_weight, h_mask)
        y_d, gates_d = [None] * count, [None] * count
        for t in steps(count, d):
            u = product(h if mask is None else h * mask, w)
            if ln is not None:
                u = layer_norm(u, ln, eps)
            a = gates_x[t, :, d].to(wide) + u
            new = a.relu() if relu else a.tanh()
            here = running(lengths, t)
            h = mix(here, new if zone is None else new + zone[t, :, d] * (h - new), h)
            y_d[t], gates_d[t] = mix(here, h, 0.0), mix(here, new, 0.0)
        for parts, part in ((ys, y_d), (saved, gates_d), (last, h)):
            parts.append(part)
    shape = (count, batch, directions, hidden)
    return (
        stacked(ys, gates_x, shape, gates_x.dtype),
        torch.stack(last),
        stacked(saved, gates_x, shape, gates_x.dtype),
    )


def rnn_inference(*arguments) -> tuple[Tensor, Tensor]:
    """The arguments of rnn_forward and, last, the packed weights (which only the CPU kernels read) -> y, h_n."""
    return rnn_forward(*arguments[:-1])[:2]


def rnn_backward(
    dy: Tensor | None,
    dh_n: Tensor | None,
    dgates: Tensor | None,
    gates: Tensor,
    h0: Tensor,
    w_hh: Tensor,
    u: Tensor | None,
    ln_weight: Tensor | None,
    h_mask: Tensor | None,
    lengths: Tensor | None,
    seed: Tensor | None,
    zoneout_h: float,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of the outputs of rnn_forward (None: zero; that of gates only in a double backward), what it saved,
    and u [T, B, D, H], the products w_hh (h * h_mask) of all steps, where there is layer norm ->

        da  [T, B, D, H]  of gates_x            du  [T, B, D, H]  of u ([0] without layer norm: it is da)
        dh0 [D, B, H]                           dln_weight [D, H] ([0] without) in the compute dtype
    """
    wide, (count, batch, directions, hidden) = compute_dtype(gates.dtype), gates.shape
    zone = zoneout(seed, 0, zoneout_h, gates.shape, wide)
    das, dus, dh0, dln = ([] for _ in range(4))
    zero = gates.new_zeros((), dtype=wide)
    for d in range(directions):
        w, ln, mask = of_direction(d, w_hh, ln_weight, h_mask)
        dh = gates.new_zeros(batch, hidden, dtype=wide) if dh_n is None else dh_n[d]
        da_d, du_d = [None] * count, [None] * count
        dln_d = zero if ln is None else torch.zeros_like(ln)
        for t in reversed(steps(count, d)):
            here = running(lengths, t)
            new = gates[t, :, d].to(wide)
            dh_t = dh if dy is None else dh + mix(here, dy[t, :, d].to(wide), 0.0)
            keep = zero if zone is None else zone[t, :, d]
            dnew = (1 - keep) * dh_t + (zero if dgates is None else dgates[t, :, d].to(wide))
            da = mix(here, dnew * ((new > 0).to(wide) if relu else 1 - new * new), 0.0)
            du = da
            if ln is not None:
                du, dscale = layer_norm_backward(da, u[t, :, d].to(wide), ln, eps)
                dln_d = dln_d + dscale.sum(0)
            through = product(du, w.t())
            dh_before = keep * dh_t + (through if mask is None else through * mask)
            dh = mix(here, dh_before, dh_t)
            da_d[t], du_d[t] = da, du
        for parts, part in ((das, da_d), (dus, du_d), (dh0, dh), (dln, dln_d)):
            parts.append(part)
    return (
        stacked(das, gates, gates.shape, gates.dtype),
        gates.new_empty(0) if ln_weight is None else stacked(dus, gates, gates.shape, gates.dtype),
        torch.stack(dh0),
        gates.new_empty(0, dtype=wide) if ln_weight is None else torch.stack(dln),
    )
