"""The selective scan of Mamba in plain PyTorch: the meaning of the ops, forward and backward by explicit formula.

    dt  = softplus(delta + delta_bias)              or delta + delta_bias
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        [dim, state] for each sequence
    y_t = (C_t h_t + D x_t) silu(z_t)               the sum over the state; without D, without z

States and sums are float32 (float64 for float64). Gu and Dao, "Mamba: linear-time sequence modeling with selective
state spaces" (2023). Test: tests/test_selective_scan.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import compute_dtype

CHUNK = 16  # steps between the states that the forward pass keeps for the backward pass


def _steps(delta: Tensor, delta_bias: Tensor | None, softplus: bool, wide: torch.dtype) -> tuple[Tensor, Tensor]:
    """dt and its derivative for delta, [batch, length, dim]."""
    raw = delta.to(wide)
    if delta_bias is not None:
        raw = raw + delta_bias
    if not softplus:
        return raw, torch.ones_like(raw)
    return torch.logaddexp(raw, torch.zeros_like(raw)), torch.sigmoid(raw)


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, h0: Tensor | None) -> list[Tensor]:
    """h before the first step and after each, [batch, dim, state]; x, dt, B in the compute dtype."""
    batch, length, dim = x.shape
    h = [x.new_zeros((batch, dim, A.shape[1])) if h0 is None else h0]
    for t in range(length):
        now, step = x[:, t, :, None], dt[:, t, :, None]
        h.append(torch.exp(step * A) * h[-1] + step * now * B[:, t, None])
    return h


def selective_scan_forward(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h0: Tensor | None,
    softplus: bool,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, delta, z [batch, length, dim]; B, C [batch, length, state]; A [dim, state], D, delta_bias [dim] and h0 [batch,
    dim, state] in the compute dtype -> y like x, the last h [batch, dim, state], and with keep the states before steps
    0, CHUNK, 2 CHUNK, ... [batch, chunks, state, dim], else [0]."""
    wide = compute_dtype(x.dtype)
    batch, length, dim = x.shape
    dt, _ = _steps(delta, delta_bias, softplus, wide)
    now = x.to(wide)
    h = _states(now, dt, A, B.to(wide), h0)
    y = now.new_zeros(now.shape)
    if length:
        y = torch.einsum("btdn,btn->btd", torch.stack(h[1:], 1), C.to(wide))
    if D is not None:
        y = y + D * now
    if z is not None:
        y = y * torch.nn.functional.silu(z.to(wide))
    kept = [state.transpose(1, 2) for state in h[:-1:CHUNK]]
    shape = (batch, len(kept), A.shape[1], dim)
    states = (torch.stack(kept, 1) if kept else now.new_empty(shape)) if keep else now.new_empty(0)
    return y.to(x.dtype), h[-1].clone(), states


def selective_scan_backward(
    grad: Tensor,
    grad_last: Tensor | None,
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    h0: Tensor | None,
    states: Tensor,
    softplus: bool,
) -> tuple[Tensor, ...]:
    """grad [batch, length, dim]; grad_last [batch, dim, state] in the compute dtype or None; states: for kernels, not
    read here -> dx, ddelta, dz ([0] without z) like x, and in the compute dtype dB, dC [batch, length, state], dA [dim,
    state], dD, dbias [dim] (zeros where there is none), dh0 [batch, dim, state]."""
    wide = compute_dtype(x.dtype)
    length = x.shape[1]
    dt, slope = _steps(delta, delta_bias, softplus, wide)
    now, rows_b, rows_c, g = (t.to(wide) for t in (x, B, C, grad))
    h = _states(now, dt, A, rows_b, h0)
    dz = x.new_empty(0)
    if z is not None:
        y = now.new_zeros(now.shape)
        if length:
            y = torch.einsum("btdn,btn->btd", torch.stack(h[1:], 1), rows_c)
        if D is not None:
            y = y + D * now
        gate = z.to(wide)
        sigmoid = torch.sigmoid(gate)
        dz = (g * y * sigmoid * (1 + gate * (1 - sigmoid))).to(x.dtype)
        g = g * gate * sigmoid
    dh = torch.zeros_like(h[0]) if grad_last is None else grad_last
    dx, ddt, dB, dC = [], [], [], []
    dA = torch.zeros_like(A)
    for t in range(length - 1, -1, -1):
        step = dt[:, t, :, None]
        decay = torch.exp(step * A)
        dh = dh + g[:, t, :, None] * rows_c[:, t, None]
        dC.append(torch.einsum("bd,bdn->bn", g[:, t], h[t + 1]))
        dB.append(torch.einsum("bdn,bd->bn", dh, dt[:, t] * now[:, t]))
        along = torch.einsum("bdn,bn->bd", dh, rows_b[:, t])
        of_decay = dh * h[t] * decay
        dA = dA + (of_decay * step).sum(0)
        ddt.append((of_decay * A).sum(-1) + along * now[:, t])
        dx.append(along * dt[:, t])
        dh = decay * dh
    if not length:
        none = x.new_empty(x.shape)
        empty = rows_b.new_empty(rows_b.shape)
        zeros = A.new_zeros(A.shape[0])
        return none, none.clone(), dz, empty, empty.clone(), dA, zeros, zeros.clone(), dh.clone()
    all_dx, all_ddt, all_dB, all_dC = (torch.stack(found[::-1], 1) for found in (dx, ddt, dB, dC))
    dD = (g * now).sum((0, 1))
    if D is not None:
        all_dx = all_dx + D * g
    ddelta = all_ddt * slope
    dbias = ddelta.sum((0, 1))
    return all_dx.to(x.dtype), ddelta.to(x.dtype), dz, all_dB, all_dC, dA, dD, dbias, dh
