"""Room linear_scan: the affine recurrence of QRNN, S4 and Mamba.

    h_t = a_t * h_{t-1} + b_t        t = 1 .. length, from h_0 (zeros where none is given); reverse: from the end

Channels do not see each other; a and b depend on time as they like. dtypes: float32, bfloat16 and float16 with the
state in float32 (h is rounded, the state that goes on is not), complex64 for a complex diagonal; float64 and complex128
on the torch back end. Gradients to a, b and h0, twice. Padding: a step with a = 1 and b = 0 passes the state through.

Method: affine maps compose, (a, b) then (a', b') is (a' a, a' b + b'), so time is cut into chunks whose maps are found
side by side, the states at their ends follow from one short scan, and each chunk then runs from its state (Blelloch
1990; Martin and Cundy 2018). How time is cut is a function of the shape (cuda, triton: and of the GPU), never of the
number of threads. Where there are channels enough time is not cut, and memory is read once. A product of a over a chunk
may overflow where |a| > 1 for long; a state of exactly 0 stays clear of it.

Back ends: cpu (csrc/cpu/linear_scan*.cpp), cuda (csrc/cuda/linear_scan.cuh), triton (kernels/linear_scan.py), torch
(fastdl/reference/linear_scan.py). What they refuse:

    | back end          | refuses                | because                              |
    | cpu, cuda, triton | float64, complex128    | its kernels keep states in float32   |
    | cpu, cuda, triton | torch.func, forward AD | kernels have no rules for transforms |

Test: ``pytest tests/test_linear_scan.py``; benchmark: ``pytest bench/bench_linear_scan.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, triton_twin, twin_of
from ..reference import linear_scan as reference

__all__ = ["linear_scan"]


def _fake_forward(a, b, h0, reverse):
    return b.new_empty(b.shape)


def _fake_backward(grad, a, h, h0, reverse, need_a):
    batch, _, channels = h.shape
    dh0 = h.new_empty((batch, channels), dtype=reference.state_dtype(h.dtype))
    return h.new_empty(h.shape if need_a else 0), h.new_empty(h.shape), dh0


FORWARD = Op(
    "linear_scan_forward(Tensor a, Tensor b, Tensor? h0, bool reverse) -> Tensor h",
    fake=_fake_forward,
    reference=reference.linear_scan_forward,
    triton=triton_twin("linear_scan", "linear_scan_forward"),
)
BACKWARD = Op(
    "linear_scan_backward(Tensor grad, Tensor a, Tensor h, Tensor? h0, bool reverse, bool need_a) "
    "-> (Tensor da, Tensor db, Tensor dh0)",
    fake=_fake_backward,
    reference=reference.linear_scan_backward,
    triton=triton_twin("linear_scan", "linear_scan_backward"),
)


def _setup(ctx, inputs, output):
    a, _, h0, ctx.reverse = inputs
    ctx.save_for_backward(a, output, h0)


def _backward(twin, ctx, grad):
    a, h, h0 = ctx.saved_tensors
    need = ctx.needs_input_grad
    da, db, dh0 = BACKWARD[twin](grad, a, h, h0, ctx.reverse, need[0])
    return da if need[0] else None, db if need[1] else None, dh0 if need[2] else None, None


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.linear_scan_backward))

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.complex64, torch.complex128)


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype in (torch.float64, torch.complex128):
        return f"{dtype}: its kernels keep states in float32; use backend='torch' or another dtype"
    return None


backends.register_room("linear_scan", {"cpu": _refuse, "cuda": _refuse, "triton": _refuse})


def linear_scan(
    a: Tensor, b: Tensor, h0: Tensor | None = None, *, reverse: bool = False, backend: str | None = None
) -> Tensor:
    """The recurrence h_t = a_t * h_{t-1} + b_t over dimension 1; with ``reverse`` h_t = a_t * h_{t+1} + b_t.

    a        [batch, length, channels], or a shape that expands to it (a[None, None] is constant over batch and time)
    b        [batch, length, channels], float32, bfloat16, float16 or complex64 (float64, complex128: torch back end).
             Any strides: the transpose of [length, batch, channels] costs nothing. a and b are promoted to one dtype.
    h0       [batch, channels], the state before the first step (with reverse: after the last), or None for zeros
    reverse  run from the last step to the first
    backend  None or "auto", "cpu", "cuda", "triton", "torch"

    Returns h [batch, length, channels], all states; the final one is h[:, -1] (h[:, 0] with reverse). Length 0 and
    batch 0 give empty h. Differentiable twice in a, b and h0.
    Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch, fastdl
    >>> b = torch.ones(1, 4, 1)
    >>> fastdl.ops.linear_scan(torch.full_like(b, 0.5), b).flatten()
    tensor([1.0000, 1.5000, 1.7500, 1.8750])
    >>> fastdl.ops.linear_scan(torch.tensor([[[0.5]]]), b, torch.tensor([[8.0]]), reverse=True).flatten()
    tensor([2.3750, 2.7500, 3.5000, 5.0000])

    Source: Blelloch, "Prefix sums and their applications" (1990); Martin and Cundy, "Parallelizing linear recurrent
    neural nets over sequence length" (2018).
    """
    _check("a", a)
    _check("b", b)
    if b.dim() != 3:
        raise ValueError(f"b: expected shape [batch, length, channels], got {tuple(b.shape)}")
    if a.dim() != 3 or any(n not in (1, wanted) for n, wanted in zip(a.shape, b.shape, strict=True)):
        raise ValueError(f"a: expected shape {tuple(b.shape)} as b, or one that expands to it, got {tuple(a.shape)}")
    if not isinstance(reverse, bool):
        raise TypeError(f"reverse: expected True or False, got {type(reverse).__name__}")
    _same_device("a", a, b)
    dtype = torch.promote_types(a.dtype, b.dtype)
    if h0 is not None:
        _check("h0", h0)
        if h0.shape != (b.shape[0], b.shape[2]):
            expected = (b.shape[0], b.shape[2])
            raise ValueError(f"h0: expected shape {expected} for b of shape {tuple(b.shape)}, got {tuple(h0.shape)}")
        if h0.is_complex() and not dtype.is_complex:
            raise TypeError(f"h0: expected a real tensor for real a and b, got {h0.dtype}")
        _same_device("h0", h0, b)
        h0 = h0.to(reference.state_dtype(dtype))
    a, b = a.to(dtype).expand(b.shape), b.to(dtype)
    chosen = backends.choose("linear_scan", backend, device=b.device, dtype=dtype, refusals=backends.in_a_transform())
    return FORWARD[twin_of(chosen, b.device)](a, b, h0, reverse)


def _check(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES or x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else f"layout {x.layout}"
        raise TypeError(f"{name}: expected a dense floating point or complex tensor, got {x.dtype}, {kind}")


def _same_device(name: str, x: Tensor, b: Tensor) -> None:
    if x.device != b.device:
        raise ValueError(f"{name}: expected the device of b, {b.device}, got {x.device}; move one to the other")
