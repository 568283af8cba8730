"""What the contracts of lstm, gru and rnn share: checks, the products of all steps with the input, and the gradient of
w_hh. Names and shapes: fastdl/reference/_recurrent.py.

Products over all steps at once (with the input, and for the gradients of weights) are in _recurrent_products.py. What
happens step by step is the op.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend as backends
from .._library import define, is_compiling, tracing, twin_of
from ..reference.norm import compute_dtype
from ._checks import check_dense, check_eps, check_number
from ._recurrent_products import outer, product
from .norm import layer_norm

define("recurrent_pack(Tensor weight, int gates) -> Tensor")


@torch.library.register_fake("fastdl::recurrent_pack")
def _fake_pack(weight: Tensor, gates: int) -> Tensor:
    directions, rows, cols = weight.shape
    panels = gates * ((rows // max(gates, 1) + 15) // 16)
    wide = 2 if weight.dtype == torch.bfloat16 else 4
    return weight.new_empty(directions * panels * 16 * ((cols + 1) // 2 * 2) * wide, dtype=torch.uint8)


def pack(weight: Tensor, gates: int) -> Tensor:
    """w_hh [D, gates * H, P] in the layout that the CPU kernels read (csrc/cpu/recurrent_pack.h), as bytes. The
    inference ops take it, so that weights that do not change are packed once."""
    return torch.ops.fastdl.recurrent_pack(weight, gates)


define("recurrent_input(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor")


@torch.library.register_fake("fastdl::recurrent_input")
def _fake_input(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


def packed_products(x: Tensor, packed: Tensor, bias: Tensor | None, outputs: int) -> Tensor:
    """x [..., I] times a matrix [outputs, I] that ``pack(matrix[None], 1)`` packed, plus bias [outputs]: for inference
    on the CPU. Without gradient."""
    return torch.ops.fastdl.recurrent_input(x, packed, bias, outputs)


def refuse(*, dtype: torch.dtype, **facts) -> str | None:
    """What every back end with kernels refuses."""
    if dtype == torch.float64:
        return "float64: its kernels accumulate in float32; use backend='torch' or another dtype"
    return None


@dataclass
class Call:
    """One checked call: what the three public functions hand to their ops.

    gates_x [T, B, D, G * H], states [D, B, ...] in the compute dtype, weights in the dtype of gates_x, the rest in the
    compute dtype; twin: which of an op's; dtypes: what the states are returned in.
    """

    gates_x: Tensor
    states: list[Tensor]
    w_hh: Tensor
    rest: list[Tensor | None]
    h_mask: Tensor | None
    lengths: Tensor | None
    seed: Tensor | None
    twin: str
    dtypes: list[torch.dtype]

    def outputs(self, y: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """y [T, B, D, P] -> [T, B, D * P], and the states in the dtypes that they came in."""
        return y.flatten(2), *(s.to(dtype) for s, dtype in zip(states, self.dtypes, strict=True))

    def needs_gradient(self) -> bool:
        if tracing() is not None:  # a graph of torch.jit.trace may be asked for a gradient later
            return True
        tensors = (self.gates_x, *self.states, self.w_hh, *self.rest)
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def prepare(
    room: str,
    gates: int,
    x: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b_ih: Tensor | None,
    b_hh: Tensor | None,
    states: Sequence[tuple[str, Tensor | None, int]],
    *,
    lengths: Tensor | None,
    ln_ih: Tensor | None,
    rest: Sequence[tuple[str, Tensor | None, tuple[int, ...]]],
    h_mask: Tensor | None,
    zoneout: Sequence[tuple[str, float]],
    training: bool,
    eps: float,
    backend: str | None,
) -> Call:
    """Check a call and compute its products with the input.

    states  (name, [D, B, size] or None, size); the first is h
    rest    (name, tensor or None, shape): what else the op takes, in its order
    b_hh    added to the products with the input, where the room lets it
    """
    check_dense("x", x)
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [time, batch, input_size], got {tuple(x.shape)}")
    count, batch, size = x.shape
    _check_weight("w_ih", w_ih, x, 3)
    _check_weight("w_hh", w_hh, x, 3)
    directions, rows, wide = w_hh.shape[0], w_hh.shape[1], compute_dtype(x.dtype)
    if directions not in (1, 2) or rows == 0 or rows % gates:
        raise ValueError(
            f"w_hh: expected shape [1 or 2 directions, {gates} * hidden_size, size of h], got {tuple(w_hh.shape)}"
        )
    hidden, out = rows // gates, states[0][2]
    if w_hh.shape[2] != out:
        raise ValueError(f"w_hh: expected shape {(directions, rows, out)}, got {tuple(w_hh.shape)}")
    check_shape("w_ih", w_ih, (directions, rows, size), x)
    check_shape("b_ih", b_ih, (directions, rows), x)
    check_shape("b_hh", b_hh, (directions, rows), x)
    check_shape("h_mask", h_mask, (directions, batch, out), x)
    check_shape("ln_ih", ln_ih, (directions, rows), x)
    for name, tensor, shape in rest:
        check_shape(name, tensor, shape, x)
    for name, state, columns in states:
        check_shape(name, state, (directions, batch, columns), x)
    for name, p in zoneout:
        check_number(name, p)
        if not 0 <= p <= 1:
            raise ValueError(f"{name}: expected a probability from 0 to 1, got {p}")
    check_eps(eps)
    lengths = check_lengths(lengths, batch, count, x.device)

    kind = x.device.type
    if kind != "meta" and x.dtype != torch.float64 and torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    chosen = backends.choose(
        room, backend, device=x.device, dtype=x.dtype, refusals=backends.in_a_transform(), hidden=hidden
    )
    dtypes = [x.dtype if state is None else state.dtype for _, state, _ in states]
    first = [
        x.new_zeros(directions, batch, columns, dtype=wide) if state is None else state.to(wide)
        for _, state, columns in states
    ]
    bias = b_ih if b_hh is None else b_hh if b_ih is None else b_ih + b_hh
    gates_x = _input_products(x, w_ih.to(x.dtype), bias, ln_ih, eps, chosen)
    seed = None
    if training and any(p > 0 for _, p in zoneout):
        seed = torch.randint(-(2**63), 2**63 - 1, (2,), device=x.device)
    return Call(
        gates_x,
        first,
        w_hh.to(x.dtype),
        [None if t is None else t.to(x.dtype if name == "w_hr" else wide) for name, t, _ in rest],
        None if h_mask is None else h_mask.to(wide),
        lengths,
        seed,
        twin_of(chosen, x.device),
        dtypes,
    )


def _input_products(
    x: Tensor, w_ih: Tensor, bias: Tensor | None, ln_ih: Tensor | None, eps: float, backend: str
) -> Tensor:
    """x [T, B, I], w_ih [D, G * H, I], bias and ln_ih [D, G * H] -> gates_x [T, B, D, G * H]: one product for all
    steps, normalized a direction at a time where there is layer norm."""
    directions, rows, size = w_ih.shape
    shape = (*x.shape[:2], directions, rows)
    twin = twin_of(backend, x.device)
    with torch.autocast(x.device.type, enabled=False):
        if ln_ih is None:
            flat = None if bias is None else bias.to(x.dtype).reshape(-1)
            return product(x, w_ih.reshape(directions * rows, size), flat, twin).view(shape)
        plain = product(x, w_ih.reshape(directions * rows, size), None, twin).view(shape)
        return normalized(plain, ln_ih, bias, eps, backend)


def normalized(plain: Tensor, ln_ih: Tensor, bias: Tensor | None, eps: float, backend: str) -> Tensor:
    """plain [T, B, D, G * H], ln_ih and bias [D, G * H] -> gates_x: layer norm of every direction."""
    parts = [
        layer_norm(plain[:, :, d], ln_ih[d], None if bias is None else bias[d], eps=eps, backend=backend)
        for d in range(plain.shape[2])
    ]
    return parts[0].unsqueeze(2) if len(parts) == 1 else torch.stack(parts, 2)


# ---- Checks ---------------------------------------------------------------------------------------------------------


def _check_weight(name: str, value: Tensor, x: Tensor, dims: int) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        got = f"{value.dtype}, layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a dense floating point tensor, got {got}")
    if value.dim() != dims:
        raise ValueError(f"{name}: expected shape [directions, gates * hidden_size, size], got {tuple(value.shape)}")
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}; move one to the other")


def check_shape(name: str, value: Tensor | None, shape: tuple[int, ...], x: Tensor) -> None:
    """Raise unless value is None or a floating tensor of this shape on x's device."""
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        got = f"{value.dtype}, layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a dense floating point tensor or None, got {got}")
    if tuple(value.shape) != tuple(shape):
        raise ValueError(
            f"{name}: expected shape {tuple(shape)} for x of shape {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}; move one to the other")


def check_lengths(lengths: Tensor | None, batch: int, count: int, device: torch.device) -> Tensor | None:
    """lengths as int64 [B] on the device. Values are looked at where that costs no synchronization: on the CPU, and
    with FASTDL_CHECK=1 everywhere. A kernel only compares them with the time."""
    if lengths is None:
        return None
    if not isinstance(lengths, Tensor) or lengths.dtype not in (torch.int64, torch.int32):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"lengths: expected an int64 tensor of shape [batch], got {got}")
    if tuple(lengths.shape) != (batch,):
        raise ValueError(f"lengths: expected shape {(batch,)}, one length a sequence, got {tuple(lengths.shape)}")
    looked = lengths.device.type == "cpu" or os.environ.get("FASTDL_CHECK") == "1"
    if looked and batch and not is_compiling() and tracing() is None and not backends.in_a_transform():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > count:
            raise ValueError(f"lengths: expected values from 0 to {count}, the time steps of x, got {low} to {high}")
    return lengths.to(device, torch.int64, non_blocking=True)


# ---- Gradients of the weights ---------------------------------------------------------------------------------------


def previous(y: Tensor, h0: Tensor, h_mask: Tensor | None, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What w_hh was multiplied with in each step: h of the step before, times its mask, [T, B, D, P] in ``dtype``."""
    first = h0.to(y.dtype)
    if not y.shape[0]:
        return y.to(dtype)
    parts = []
    for d in range(y.shape[2]):
        if d == 0:
            h = torch.cat((first[:1], y[:-1, :, 0]))[: y.shape[0]]
        else:
            h = torch.cat((y[1:, :, 1], first[1:]))[: y.shape[0]]
            if lengths is not None:  # a sequence starts at its own last step
                times = torch.arange(1, y.shape[0] + 1, device=y.device)
                h = torch.where((times[:, None] == lengths)[..., None], first[1:], h)
        parts.append(h if h_mask is None else h * h_mask[d].to(h.dtype))
    return (parts[0].unsqueeze(2) if len(parts) == 1 else torch.stack(parts, 2)).to(dtype)


def all_products(h: Tensor, weight: Tensor, twin: str) -> Tensor:
    """h [T, B, D, P], weight [D, N, P] -> [T, B, D, N]"""
    parts = [product(h[:, :, d], weight[d], None, twin) for d in range(h.shape[2])]
    return parts[0].unsqueeze(2) if len(parts) == 1 else torch.stack(parts, 2)


def weight_gradient(du: Tensor, h: Tensor, twin: str) -> Tensor:
    """Sum over steps and batch of du [T, B, D, N] times h [T, B, D, P] -> [D, N, P]"""
    rows = du.shape[0] * du.shape[1]
    a, b = du.reshape(rows, *du.shape[2:]), h.reshape(rows, *h.shape[2:])
    parts = [outer(a[:, d], b[:, d], twin) for d in range(h.shape[2])]
    return parts[0].unsqueeze(0) if len(parts) == 1 else torch.stack(parts)
