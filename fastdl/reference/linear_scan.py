"""The affine recurrence in plain PyTorch: the meaning of the op, forward and backward by explicit formula.

    h_t = a_t * h_{t-1} + b_t                      in the order of time, or from the end with reverse
    g_t = dy_t + r_t,  r_{t-1} = conj(a_t) * g_t   in the opposite order, from r = 0
    da_t = g_t * conj(h_{t-1}),  db_t = g_t,  dh0 = the last r

States are float32 for 16-bit input, else of the dtype of a and b; outputs are rounded to that of a and b. A loop over
time: O(T) work and depth. Blelloch, "Prefix sums and their applications" (1990), has the parallel form of the kernels.
Test: tests/test_linear_scan.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype states are kept in: float32 for 16-bit numbers, else the dtype itself."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def _order(length: int, reverse: bool) -> range:
    return range(length - 1, -1, -1) if reverse else range(length)


def conjugate(x: Tensor) -> Tensor:
    """The conjugate, computed: as a lazy view it is lost where AOTAutograd calls the op."""
    return torch.conj_physical(x) if x.is_complex() else x


def linear_scan_forward(a: Tensor, b: Tensor, h0: Tensor | None, reverse: bool) -> Tensor:
    """a, b [batch, length, channels]; h0 [batch, channels] in the state's dtype, or None -> h like b."""
    wide = state_dtype(b.dtype)
    batch, length, channels = b.shape
    state = b.new_zeros((batch, channels), dtype=wide) if h0 is None else h0
    steps_a, steps_b = a.to(wide).unbind(1), b.to(wide).unbind(1)
    states: list[Tensor] = []
    for t in _order(length, reverse):
        state = steps_a[t] * state + steps_b[t]
        states.append(state)
    if not states:
        return b.new_empty(b.shape)
    return torch.stack(states[::-1] if reverse else states, 1).to(b.dtype)


def linear_scan_backward(
    grad: Tensor, a: Tensor, h: Tensor, h0: Tensor | None, reverse: bool, need_a: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """grad, a, h [batch, length, channels]; h0 [batch, channels] in the state's dtype, or None
    -> da (shape [0] unless need_a), db [batch, length, channels], dh0 [batch, channels] in the state's dtype."""
    wide = state_dtype(h.dtype)
    batch, length, channels = h.shape
    initial = h.new_zeros((batch, channels), dtype=wide) if h0 is None else h0
    carried = torch.zeros_like(initial)
    grads, coefficients, states = (t.to(wide).unbind(1) for t in (grad, conjugate(a), conjugate(h)))
    db: list[Tensor] = [carried] * length
    da: list[Tensor] = [carried] * length
    order = _order(length, reverse)
    for index in range(length - 1, -1, -1):
        t = order[index]
        g = grads[t] + carried
        before = states[order[index - 1]] if index else conjugate(initial)
        db[t], da[t] = g, g * before
        carried = coefficients[t] * g
    if not length:
        return h.new_empty(h.shape if need_a else 0), h.new_empty(h.shape), carried
    da_all = torch.stack(da, 1).to(h.dtype) if need_a else h.new_empty(0)
    return da_all, torch.stack(db, 1).to(h.dtype), carried
