"""Room norm: layer norm and RMS norm, with the residual add and the dropout that stand before them in a transformer.

    s     = residual + dropout(x)                 x without the two; rounded to the dtype of x, returned on request
    layer h = (s - mean(s)) / sqrt(var(s) + eps)          var: mean of the squared distances from the mean
    rms   h = s / sqrt(mean(s^2) + eps)
    y     = h * (weight + offset) + bias          rounded to the dtype of x; statistics and products are float32

dtypes of x: float32, bfloat16, float16, and float64 on the torch back end. weight and bias may have another dtype.
Gradients to x, residual, weight and bias; twice (statistics are recomputed from s in the double backward).

Back ends: cpu (csrc/cpu/norm*.cpp), cuda (csrc/cuda/norm*.cuh), triton (kernels/norm.py), torch
(fastdl/reference/norm.py). What they refuse:

    | back end          | refuses                | because                              |
    | cpu, cuda, triton | float64                | its kernels accumulate in float32    |
    | cpu, cuda, triton | torch.func, forward AD | kernels have no rules for transforms |

Under CUDA autocast an op computes in float32 where torch's own does (rms_norm: from some version on).
Test: ``pytest tests/test_norm.py``; benchmark: ``pytest bench/bench_norm.py``.
"""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, plain_call, tracing, triton_twin, twin_of
from ..reference import norm as reference

__all__ = ["layer_norm", "rms_norm"]


def _fake_forward(x, residual, weight, bias, seed, p, eps, offset, rms):
    rows, wide = x.shape[:-1], reference.compute_dtype(x.dtype)
    plain = residual is None and seed is None
    return (
        x.new_empty(x.shape),
        x.new_empty(0 if plain else x.shape),
        x.new_empty(0 if rms else rows, dtype=wide),
        x.new_empty(rows, dtype=wide),
    )


def _fake_inference(x, residual, weight, bias, eps, offset, rms, need_sum):
    return x.new_empty(x.shape), x.new_empty(x.shape if need_sum and residual is not None else 0)


def _fake_backward(
    grad, grad_sum, s, weight, mean, rstd, seed, p, eps, offset, rms, need_weight, need_bias
):  # fmt: skip
    cols, wide = s.shape[-1], reference.compute_dtype(s.dtype)
    return (
        s.new_empty(s.shape),
        s.new_empty(0 if seed is None else s.shape),
        s.new_empty(cols if need_weight else 0, dtype=wide),
        s.new_empty(cols if need_bias else 0, dtype=wide),
    )


FORWARD = Op(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float p, float eps, "
    "float offset, bool rms) -> (Tensor y, Tensor s, Tensor mean, Tensor rstd)",
    fake=_fake_forward,
    reference=reference.norm_forward,
    triton=triton_twin("norm", "norm_forward"),
)
INFERENCE = Op(  # where no gradient is asked for: nothing is written that only a backward pass reads
    "norm_inference(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, float offset, bool rms, "
    "bool need_sum) -> (Tensor y, Tensor s)",
    fake=_fake_inference,
    reference=reference.norm_inference,
    triton=triton_twin("norm", "norm_inference"),
)
BACKWARD = Op(
    "norm_backward(Tensor grad, Tensor? grad_sum, Tensor s, Tensor? weight, Tensor mean, Tensor rstd, Tensor? seed, "
    "float p, float eps, float offset, bool rms, bool need_weight, bool need_bias) "
    "-> (Tensor ds, Tensor dx, Tensor dweight, Tensor dbias)",
    fake=_fake_backward,
    reference=reference.norm_backward,
    triton=triton_twin("norm", "norm_backward"),
)


def _setup(ctx, inputs, output):
    x, residual, weight, bias, seed, ctx.p, ctx.eps, ctx.offset, ctx.rms = inputs
    _, s, mean, rstd = output
    plain = residual is None and seed is None
    ctx.save_for_backward(x if plain else s, weight, mean, rstd, seed)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
    ctx.mark_non_differentiable(*((s, mean, rstd) if plain else (mean, rstd)))
    ctx.set_materialize_grads(False)


def _backward(twin, ctx, grad, grad_sum, _mean, _rstd):
    s, weight, mean, rstd, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    if grad is None:
        grad = torch.zeros_like(s)
    ds, dx, dweight, dbias = BACKWARD[twin](
        grad, grad_sum, s, weight, mean, rstd, seed, ctx.p, ctx.eps, ctx.offset, ctx.rms, need[2], need[3]
    )
    return (
        (ds if seed is None else dx) if need[0] else None,
        ds if need[1] else None,
        dweight.to(ctx.dtypes[0]) if need[2] else None,
        dbias.to(ctx.dtypes[1]) if need[3] else None,
        *[None] * 5,
    )


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.norm_backward))


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels accumulate in float32; use backend='torch' or another dtype"
    return None


for _room in ("layer_norm", "rms_norm"):
    backends.register_room(_room, {"cpu": _refuse, "cuda": _refuse, "triton": _refuse})


_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
# Whether CUDA autocast runs torch's own op in float32: rms_norm was added to its list later than layer_norm.
_WIDENED = {
    room: torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{room}", "AutocastCUDA")
    for room in ("layer_norm", "rms_norm")
}


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Layer norm over the last dimension, of ``s = residual + dropout(x)``:

        y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias

    x           [..., cols], float32, bfloat16, float16 (float64: torch back end); any strides
    weight      [cols], floating, or None (ones)
    bias        [cols], floating, or None (zeros)
    eps         > 0
    residual    like x, or None; of another dtype both are promoted, as ``residual + x`` would be
    dropout_p   0 <= p <= 1: each element of x is zeroed with probability p and scaled by 1 / (1 - p) otherwise, by one
                seed drawn from torch's generator; pass 0 in evaluation
    return_sum  return (y, s): s is what the next pre-norm block adds to (x itself without residual and dropout)
    backend     None or "auto", "cpu", "cuda", "triton", "torch"

    Returns y [..., cols] in the dtype of x. Zero rows give zero rows. Differentiable twice in all four tensors.
    Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch, fastdl
    >>> x, residual = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    >>> y, s = fastdl.ops.layer_norm(x, torch.ones(8), torch.zeros(8), residual=residual, return_sum=True)
    >>> torch.equal(s, residual + x), y.shape
    (True, torch.Size([2, 3, 8]))

    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
    """
    return _norm("layer_norm", x, residual, weight, bias, dropout_p, eps, 0.0, return_sum, backend)


def rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    eps: float = 1e-6,
    weight_offset: float = 0.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    return_sum: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Root-mean-square norm over the last dimension, of ``s = residual + dropout(x)``:

        y = s / sqrt(mean(s^2) + eps) * (weight + weight_offset)

    weight_offset  1.0 for models that store weight - 1 (Gemma)

    The other arguments, what is returned and what is raised are those of `layer_norm`.

    >>> import torch
    >>> from fastdl import ops
    >>> ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]))
    tensor([[0.8485, 2.2627]])

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    return _norm("rms_norm", x, residual, weight, None, dropout_p, eps, weight_offset, return_sum, backend)


def _quick(room, x, residual, weight, bias, eps, offset, return_sum, backend):
    """A plain call of inference, without most checks in Python, which take as long as the norm of a few rows: the
    compiled op checks what memory safety needs. None where the call is another, or wrong: `_norm` then says how."""
    if type(x) is not Tensor or not type(eps) is type(offset) is float or not eps > 0:
        return None
    try:
        dtype, device = x.dtype, x.device
        chosen = backends.choose(room, backend, device=device, dtype=dtype)
        if (
            chosen not in ("cpu", "cuda")
            or x.layout != torch.strided
            or (weight is not None and (weight.dtype != dtype or weight.device != device))
            or (bias is not None and (bias.dtype != dtype or bias.device != device))
            or (residual is not None and residual.device != device)
            or (chosen == "cuda" and torch.is_autocast_enabled("cuda"))
        ):
            return None
        call = INFERENCE[twin_of(chosen, device)]
        y, s = call(x, residual, weight, bias, eps, offset, room == "rms_norm", return_sum)
    except (AttributeError, RuntimeError, TypeError):
        return None
    return (y, x if residual is None else s) if return_sum else y


def _norm(room, x, residual, weight, bias, p, eps, offset, return_sum, backend):
    if p == 0 and plain_call():
        found = _quick(room, x, residual, weight, bias, eps, offset, return_sum, backend)
        if found is not None:
            return found
    _check(x, residual, weight, bias, p, eps, offset)
    if x.device.type == "cuda" and _WIDENED[room] and torch.is_autocast_enabled("cuda"):
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # what autocast does to torch's op
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    refusals = backends.in_a_transform()
    chosen = backends.choose(room, backend, device=x.device, dtype=x.dtype, refusals=refusals)
    if chosen != "torch":
        weight, bias = _parameters(x, weight, bias)
    twin, rms = twin_of(chosen, x.device), room == "rms_norm"
    if p == 0 and refusals is None and not _needs_gradient(x, residual, weight, bias):
        y, s = INFERENCE[twin](x, residual, weight, bias, eps, offset, rms, return_sum)
        return (y, x if residual is None else s) if return_sum else y
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if p > 0 else None
    y, s, _, _ = FORWARD[twin](x, residual, weight, bias, seed, p, eps, offset, rms)
    if not return_sum:
        return y
    return y, (x if residual is None and seed is None else s)


def _needs_gradient(*tensors: Tensor | None) -> bool:
    if tracing() is not None:  # a graph of torch.jit.trace may be asked for a gradient later
        return True
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _parameters(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The kernels read weight and bias of one dtype: that of x, or float32."""
    dtype = x.dtype
    if (weight is None or weight.dtype == dtype) and (bias is None or bias.dtype == dtype):
        return weight, bias
    dtypes = {t.dtype for t in (weight, bias) if t is not None}
    if len(dtypes) > 1 or not dtypes <= {x.dtype, torch.float32}:
        weight, bias = (None if t is None else t.float() for t in (weight, bias))
    return weight, bias


def _check(x, residual, weight, bias, p, eps, offset) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES or x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else f"layout {x.layout}"
        raise TypeError(
            f"x: expected a dense floating point tensor of 16, 32 or 64 bits, got {x.dtype}, {kind}; convert it first"
        )
    shape, device = x.shape, x.device
    if not shape or shape[-1] == 0:
        raise ValueError(f"x: expected shape [..., cols] with cols of at least 1, got {tuple(shape)}")
    cols = (shape[-1],)
    if weight is not None:
        _check_like("weight", weight, cols, shape, device)
    if bias is not None:
        _check_like("bias", bias, cols, shape, device)
    if residual is not None:
        _check_like("residual", residual, shape, shape, device)
    if not type(eps) is type(p) is type(offset) is float:  # all three at every call: the loop only where it may matter
        for name, value in (("eps", eps), ("dropout_p", p), ("weight_offset", offset)):
            if not isinstance(value, _NUMBERS):
                raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not eps > 0:
        raise ValueError(f"eps: expected a number > 0, got {eps}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p: expected 0 <= p <= 1, got {p}")


def _check_like(name: str, value: Tensor, expected: tuple[int, ...], shape: torch.Size, device: torch.device) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.layout != torch.strided:
        got = f"{value.dtype}, layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating point tensor or None, got {got}")
    if value.shape != expected:
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} for x of shape {tuple(shape)}, got {tuple(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{name}: expected the device of x, {device}, got {value.device}; move one to the other")
