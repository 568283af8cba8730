"""Room selective_scan: the state space model of Mamba, whose steps and matrices depend on the input.

    dt  = softplus(delta + delta_bias)              without delta_softplus: delta + delta_bias
    h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t        for each sequence [dim, state]: channels share B and C
    y_t = (sum over state of C_t h_t + D x_t) silu(z_t)

dtypes of x, delta, B, C and z: float32, bfloat16, float16, promoted to one, and float64 on the torch back end; A, D,
delta_bias and the states are float32. Gradients to all of them, twice. The tensor [batch, length, dim, state] never
exists: the forward pass keeps the states before every 16th step, and the backward pass runs these 16 steps again.

Back ends: cpu (csrc/cpu/selective_scan*.cpp), cuda (csrc/cuda/selective_scan*.cuh), triton
(kernels/selective_scan.py), torch (fastdl/reference/selective_scan.py). What they refuse:

    | back end          | refuses                | because                               |
    | cpu, cuda, triton | float64                | its kernels keep states in float32    |
    | cpu, cuda, triton | torch.func, forward AD | kernels have no rules for transforms  |
    | cuda, triton      | more than 128 states   | a channel's states stay in registers  |

Test: ``pytest tests/test_selective_scan.py``; benchmark: ``pytest bench/bench_selective_scan.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, tracing, triton_twin, twin_of
from ..reference import selective_scan as reference
from ._checks import check_dense, check_optional

__all__ = ["selective_scan"]


def _fake_forward(x, delta, A, B, C, D, z, delta_bias, h0, softplus, keep):
    batch, length, dim = x.shape
    wide, state = reference.compute_dtype(x.dtype), A.shape[1]
    chunks = (length + reference.CHUNK - 1) // reference.CHUNK
    return (
        x.new_empty(x.shape),
        x.new_empty((batch, dim, state), dtype=wide),
        x.new_empty((batch, chunks, state, dim) if keep else 0, dtype=wide),
    )


def _fake_backward(grad, grad_last, x, delta, A, B, C, D, z, delta_bias, h0, states, softplus):
    batch, _, dim = x.shape
    wide = reference.compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape),
        x.new_empty(0 if z is None else x.shape),
        x.new_empty(B.shape, dtype=wide),
        x.new_empty(B.shape, dtype=wide),
        x.new_empty(A.shape, dtype=wide),
        x.new_empty(dim, dtype=wide),
        x.new_empty(dim, dtype=wide),
        x.new_empty((batch, dim, A.shape[1]), dtype=wide),
    )


FORWARD = Op(
    "selective_scan_forward(Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? delta_bias, Tensor? h0, bool softplus, bool keep) -> (Tensor y, Tensor last, Tensor states)",
    fake=_fake_forward,
    reference=reference.selective_scan_forward,
    triton=triton_twin("selective_scan", "selective_scan_forward"),
)
BACKWARD = Op(
    "selective_scan_backward(Tensor grad, Tensor? grad_last, Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, "
    "Tensor? D, Tensor? z, Tensor? delta_bias, Tensor? h0, Tensor states, bool softplus) -> (Tensor dx, Tensor ddelta, "
    "Tensor dz, Tensor dB, Tensor dC, Tensor dA, Tensor dD, Tensor dbias, Tensor dh0)",
    fake=_fake_backward,
    reference=reference.selective_scan_backward,
    triton=triton_twin("selective_scan", "selective_scan_backward"),
)


def _setup(ctx, inputs, output):
    *tensors, ctx.softplus, _ = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _backward(twin, ctx, grad, grad_last, _states):
    x, delta, A, B, C, D, z, delta_bias, h0, states = ctx.saved_tensors
    if grad is None:
        grad = torch.zeros_like(x)
    found = BACKWARD[twin](grad, grad_last, x, delta, A, B, C, D, z, delta_bias, h0, states, ctx.softplus)
    dx, ddelta, dz, dB, dC, dA, dD, dbias, dh0 = found
    gradients = (dx, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, dz, dbias, dh0)
    return (*(g if need else None for g, need in zip(gradients, ctx.needs_input_grad, strict=False)), None, None)


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.selective_scan_backward))


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels keep states in float32; use backend='torch' or another dtype"
    return None


def _refuse_gpu(*, dtype: torch.dtype, state: int = 1, **facts) -> str | None:
    if state > 128:
        return f"A: {state} states; its kernels hold at most 128 of a channel in registers; use another back end"
    return _refuse(dtype=dtype)


backends.register_room("selective_scan", {"cpu": _refuse, "cuda": _refuse_gpu, "triton": _refuse_gpu})


def selective_scan(
    x: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    *,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    h0: Tensor | None = None,
    return_state: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan: h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t and y_t = (C_t h_t + D x_t) silu(z_t).

    x               [batch, length, dim], float32, bfloat16, float16 (float64: torch back end)
    delta           [batch, length, dim], the step sizes dt before bias and softplus
    A               [dim, state], as a rule negative
    B, C            [batch, length, state]
    D               [dim], or None: no skip
    z               [batch, length, dim], the gate, or None
    delta_bias      [dim], or None
    delta_softplus  dt = softplus(delta + delta_bias) instead of delta + delta_bias
    h0              [batch, dim, state], the state before the first step, or None for zeros
    return_state    return (y, h): h [batch, dim, state] float32, the state after the last step
    backend         None or "auto", "cpu", "cuda", "triton", "torch"

    x, delta, B, C and z are promoted to one dtype; the others are widened to float32. Any strides.
    Returns y [batch, length, dim]. Length 0 and batch 0 give empty y and pass the state through. Differentiable twice.
    Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch, fastdl
    >>> x, B = torch.ones(1, 3, 1), torch.ones(1, 3, 1)
    >>> fastdl.ops.selective_scan(x, x, torch.zeros(1, 1), B, B).flatten()      # A = 0: a sum
    tensor([1., 2., 3.])

    Source: Gu and Dao, "Mamba: linear-time sequence modeling with selective state spaces" (2023).
    """
    for name, value in (("x", x), ("delta", delta), ("A", A), ("B", B), ("C", C)):
        check_dense(name, value)
    for name, value in (("D", D), ("z", z), ("delta_bias", delta_bias), ("h0", h0)):
        check_optional(name, value)
    if x.dim() != 3:
        raise ValueError(f"x: expected shape [batch, length, dim], got {tuple(x.shape)}")
    batch, length, dim = x.shape
    if A.dim() != 2 or A.shape[0] != dim or A.shape[1] == 0:
        raise ValueError(f"A: expected shape [{dim}, state] for x of shape {tuple(x.shape)}, got {tuple(A.shape)}")
    state = A.shape[1]
    for name, value, shape in (
        ("delta", delta, (batch, length, dim)),
        ("B", B, (batch, length, state)),
        ("C", C, (batch, length, state)),
        ("D", D, (dim,)),
        ("z", z, (batch, length, dim)),
        ("delta_bias", delta_bias, (dim,)),
        ("h0", h0, (batch, dim, state)),
    ):
        if value is not None and value.shape != shape:
            facts = f"x of shape {tuple(x.shape)} and A of shape {tuple(A.shape)}"
            raise ValueError(f"{name}: expected shape {shape} for {facts}, got {tuple(value.shape)}")
        if value is not None and value.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}; move one to the other")
    if A.device != x.device:
        raise ValueError(f"A: expected the device of x, {x.device}, got {A.device}; move one to the other")
    dtype = x.dtype
    for value in (delta, B, C, z):
        dtype = dtype if value is None else torch.promote_types(dtype, value.dtype)
    x, delta, B, C, z = (None if t is None else t.to(dtype) for t in (x, delta, B, C, z))
    wide = reference.compute_dtype(dtype)
    A, D, delta_bias, h0 = (None if t is None else t.to(wide) for t in (A, D, delta_bias, h0))
    refusals = backends.in_a_transform()
    chosen = backends.choose("selective_scan", backend, device=x.device, dtype=dtype, refusals=refusals, state=state)
    tensors = (x, delta, A, B, C, D, z, delta_bias, h0)
    keep = tracing() is not None or (
        torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    )
    y, last, _ = FORWARD[twin_of(chosen, x.device)](*tensors, bool(delta_softplus), keep)
    return (y, last) if return_state else y
