"""Room activation: an activation with what stands beside it, and the gated products of SwiGLU and GEGLU.

    t = x + bias                     bias over one dimension of x
    y = residual + dropout(f(t))     f: relu, leaky_relu, gelu, gelu_tanh, swish (silu), tanh, sigmoid, identity
    y = f(gate) * up                 f: silu, gelu, gelu_tanh
                                     rounded to the dtype of x or gate; float32 inside

f and f' are in the table of fastdl/reference/activation.py. dtypes: float32, bfloat16, float16, and float64 on the
torch back end; bias and beta may have another dtype. Gradients to x, bias, residual, beta, gate and up; twice.

Back ends: cpu (csrc/cpu/activation*.cpp), cuda (csrc/cuda/activation.cuh), triton (kernels/activation.py), torch
(fastdl/reference/activation.py). What they refuse:

    | back end          | refuses                | because                             |
    | cpu, cuda, triton | float64                | its kernels compute in float32      |

Test: ``pytest tests/test_activation.py``; benchmark: ``pytest bench/bench_activation.py``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, plain_call, triton_twin, twin_of
from ..reference import activation as reference
from ..reference.norm import compute_dtype
from ._checks import check_dense, check_number, check_optional

__all__ = ["activation", "geglu", "swiglu"]

_KINDS = {name: number for number, name in enumerate(reference.KINDS)} | {"silu": reference.KINDS.index("swish")}


def _fake_forward(x, bias, residual, beta, seed, kind, alpha, p, inner, by_channel):
    return x.new_empty(x.shape)


def _fake_backward(
    grad, x, bias, beta, seed, kind, alpha, p, inner, by_channel, need_bias, need_beta
):  # fmt: skip
    wide = compute_dtype(x.dtype)
    return (
        x.new_empty(x.shape),
        x.new_empty(bias.numel() if need_bias else 0, dtype=wide),
        x.new_empty(1 if need_beta else 0, dtype=wide),
    )


FORWARD = Op(
    "activation_forward(Tensor x, Tensor? bias, Tensor? residual, Tensor? beta, Tensor? seed, int kind, float alpha, "
    "float p, int inner, bool by_channel) -> Tensor",
    fake=_fake_forward,
    reference=reference.activation_forward,
    triton=triton_twin("activation", "activation_forward"),
)
BACKWARD = Op(
    "activation_backward(Tensor grad, Tensor x, Tensor? bias, Tensor? beta, Tensor? seed, int kind, float alpha, "
    "float p, int inner, bool by_channel, bool need_bias, bool need_beta) -> (Tensor dx, Tensor dbias, Tensor dbeta)",
    fake=_fake_backward,
    reference=reference.activation_backward,
    triton=triton_twin("activation", "activation_backward"),
)
GLU_FORWARD = Op(
    "glu_forward(Tensor gate, Tensor up, int kind) -> Tensor",
    fake=lambda gate, up, kind: gate.new_empty(gate.shape),
    reference=reference.glu_forward,
    triton=triton_twin("activation", "glu_forward"),
)
GLU_BACKWARD = Op(
    "glu_backward(Tensor grad, Tensor gate, Tensor up, int kind) -> (Tensor dgate, Tensor dup)",
    fake=lambda grad, gate, up, kind: (gate.new_empty(gate.shape), gate.new_empty(gate.shape)),
    reference=reference.glu_backward,
    triton=triton_twin("activation", "glu_backward"),
)


def _setup(ctx, inputs, output):
    x, bias, _, beta, seed, *ctx.options = inputs
    ctx.save_for_backward(x, bias, beta, seed)


def _backward(twin, ctx, grad):
    x, bias, beta, seed = ctx.saved_tensors
    need = ctx.needs_input_grad
    dx = dbias = dbeta = None
    if need[0] or need[1] or need[3]:
        dx, dbias, dbeta = BACKWARD[twin](grad, x, bias, beta, seed, *ctx.options, need[1], need[3])
    return (
        dx if need[0] else None,
        dbias.to(bias.dtype) if need[1] else None,
        grad if need[2] else None,
        dbeta.to(beta.dtype) if need[3] else None,
        *[None] * 6,
    )


def _glu_setup(ctx, inputs, output):
    gate, up, ctx.kind = inputs
    ctx.save_for_backward(gate, up)


def _glu_backward(twin, ctx, grad):
    return *GLU_BACKWARD[twin](grad, *ctx.saved_tensors, ctx.kind), None


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.activation_backward))
GLU_FORWARD.autograd(_glu_setup, _glu_backward)
GLU_BACKWARD.autograd(*gradient_of(reference.glu_backward))


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels compute in float32; use backend='torch' or another dtype"
    return None


for _room in ("activation", "swiglu", "geglu"):
    backends.register_room(_room, {"cpu": _refuse, "cuda": _refuse, "triton": _refuse})


def activation(
    x: Tensor,
    kind: str,
    bias: Tensor | None = None,
    *,
    slope: float = 0.01,
    beta: float | Tensor = 1.0,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
    channel_dropout: bool = False,
    channel_dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """``residual + dropout(f(x + bias))`` in one pass.

    x                [...], float32, bfloat16, float16 (float64: torch back end); any strides
    kind             "relu", "leaky_relu", "gelu" (exact, by erf), "gelu_tanh", "swish"
                     (``t * sigmoid(beta * t)``), "silu" (with beta 1), "tanh", "sigmoid", "identity"
    bias             [x.shape[channel_dim]], floating, or None
    slope            of leaky_relu where t <= 0
    beta             of swish: a number, or a floating tensor with one element, which then gets a gradient
    residual         like x, or None; of another dtype both are promoted, as ``residual + x`` would be
    dropout_p        0 <= p <= 1: f(t) is zeroed with probability p and scaled by 1 / (1 - p) otherwise, by one seed
                     drawn from torch's generator; pass 0 in evaluation
    channel_dropout  zero whole channels, the elements behind one index of channel_dim, as ``nn.Dropout2d``
    channel_dim      the dimension of bias and of channel_dropout: -1 after a linear layer, 1 after a convolution
    backend          None or "auto", "cpu", "cuda", "triton", "torch"

    Returns y like x. Empty tensors give empty tensors. Differentiable twice in x, bias, residual and beta.
    Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch
    >>> from fastdl import ops
    >>> ops.activation(torch.tensor([[-1.0, 1.0]]), "leaky_relu", torch.tensor([0.0, 2.0]), slope=0.1)
    tensor([[-0.1000,  3.0000]])
    >>> image = torch.randn(2, 8, 5, 5)
    >>> ops.activation(image, "relu", torch.zeros(8), dropout_p=0.5, channel_dropout=True, channel_dim=1).shape
    torch.Size([2, 8, 5, 5])

    Source: Hendrycks and Gimpel (2016) for GELU; Ramachandran et al. (2017) for swish; Tompson et al., "Efficient
    Object Localization Using Convolutional Networks" (2015) for dropout of channels.
    """
    if type(dropout_p) is float and dropout_p == 0 and channel_dim == -1 and not channel_dropout and plain_call():
        y = _quick(x, kind, bias, slope, beta, residual, backend)
        if y is not None:
            return y
    number = _check(x, kind, bias, slope, beta, residual, dropout_p, channel_dropout, channel_dim)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    refusals = backends.in_a_transform()
    chosen = backends.choose("activation", backend, device=x.device, dtype=x.dtype, refusals=refusals)
    inner = math.prod(x.shape[channel_dim % max(x.dim(), 1) + 1 :])
    by_channel = channel_dropout and dropout_p > 0
    if bias is None and not by_channel:
        inner = 1
    wide = compute_dtype(x.dtype)
    alpha, tensor = (float(slope) if kind == "leaky_relu" else 1.0), None
    if kind == "swish":
        alpha, tensor = (1.0, beta.to(wide).reshape(1)) if isinstance(beta, Tensor) else (float(beta), None)
    if bias is not None and bias.dtype not in (x.dtype, wide):
        bias = bias.to(wide)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None
    call = FORWARD[twin_of(chosen, x.device)]
    # Channels last in memory: no copy with bias at the end. Behind them one position: the end is where they are.
    last = (inner > 1 and seed is None and not x.is_contiguous()) or (inner == 1 and bias is not None)
    last = last and channel_dim % x.dim() != x.dim() - 1
    if last:
        x, residual = (None if t is None else t.movedim(channel_dim, -1) for t in (x, residual))
    y = call(x, bias, residual, tensor, seed, number, alpha, dropout_p, 1 if last else max(inner, 1), by_channel)
    return y.movedim(-1, channel_dim) if last else y


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """The gated product of a SwiGLU layer: ``silu(gate) * up``, with ``silu(t) = t * sigmoid(t)``.

    gate, up  [...], float32, bfloat16, float16 (float64: torch back end), of one shape, dtype and device; any strides,
              so that the halves of one product (``t.chunk(2, -1)``) are not copied
    backend   None or "auto", "cpu", "cuda", "triton", "torch"

    Returns a tensor like gate. Differentiable twice. Raises TypeError or ValueError naming the argument;
    fastdl.BackendError if ``backend`` cannot.

    >>> import torch
    >>> from fastdl import ops
    >>> ops.swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.4621])

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    return _glu("swiglu", gate, up, "swish", backend)


def geglu(gate: Tensor, up: Tensor, *, approximate: str = "none", backend: str | None = None) -> Tensor:
    """The gated product of a GEGLU layer: ``gelu(gate) * up``.

    approximate  "none" (by erf) or "tanh", as in ``torch.nn.functional.gelu``

    The other arguments, what is returned and what is raised are those of `swiglu`.

    >>> import torch
    >>> from fastdl import ops
    >>> ops.geglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.6827])

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return _glu("geglu", gate, up, "gelu" if approximate == "none" else "gelu_tanh", backend)


def _glu(room: str, gate: Tensor, up: Tensor, kind: str, backend: str | None) -> Tensor:
    if plain_call() and type(gate) is type(up) is Tensor and gate.device == up.device and gate.layout == torch.strided:
        try:
            chosen = backends.choose(room, backend, device=gate.device, dtype=gate.dtype)
            if chosen in ("cpu", "cuda"):
                return GLU_FORWARD[twin_of(chosen, gate.device)](gate, up, _KINDS[kind])
        except RuntimeError:
            pass  # what is wrong is said below
    check_dense("gate", gate)
    check_dense("up", up)
    if gate.dtype != up.dtype:
        raise TypeError(f"up: expected the dtype of gate, {gate.dtype}, got {up.dtype}")
    if gate.shape != up.shape:
        raise ValueError(f"up: expected the shape of gate, {tuple(gate.shape)}, got {tuple(up.shape)}")
    if gate.device != up.device:
        raise ValueError(f"up: expected the device of gate, {gate.device}, got {up.device}; move one to the other")
    refusals = backends.in_a_transform()
    chosen = backends.choose(room, backend, device=gate.device, dtype=gate.dtype, refusals=refusals)
    return GLU_FORWARD[twin_of(chosen, gate.device)](gate, up, _KINDS[kind])


def _quick(x, kind, bias, slope, beta, residual, backend) -> Tensor | None:
    """A plain call of inference, without most checks in Python, which take as long as a few rows: the compiled op has
    those of memory safety. None where the call is another, or wrong: the caller then says how."""
    if type(x) is not Tensor or type(slope) is not float or type(beta) is not float:
        return None
    if (slope != 0.01 and kind != "leaky_relu") or (beta != 1.0 and kind != "swish"):
        return None
    try:
        device, dtype = x.device, x.dtype
        chosen = backends.choose("activation", backend, device=device, dtype=dtype)
        if (
            chosen not in ("cpu", "cuda")
            or x.layout != torch.strided
            or (bias is not None and (bias.dtype != dtype or bias.device != device))
            or (residual is not None and residual.device != device)
        ):
            return None
        alpha = slope if kind == "leaky_relu" else beta
        call = FORWARD[twin_of(chosen, device)]
        return call(x, bias, residual, None, None, _KINDS[kind], alpha, 0.0, 1, False)
    except (AttributeError, KeyError, RuntimeError, TypeError):
        return None


def _check(x, kind, bias, slope, beta, residual, p, channel_dropout, channel_dim) -> int:
    """The kind's number."""
    check_dense("x", x)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(f"kind: expected one of {', '.join(_KINDS)}, got {kind!r}")
    for name, given, default, owner in (("slope", slope, 0.01, "leaky_relu"), ("beta", beta, 1.0, "swish")):
        if kind != owner and (isinstance(given, Tensor) or given != default):
            raise ValueError(f"{name}: belongs to kind {owner!r}, got {given} with {kind!r}")
    check_number("slope", slope)
    check_number("dropout_p", p)
    if not isinstance(beta, Tensor):
        check_number("beta", beta)
    if not isinstance(channel_dim, int):
        raise TypeError(f"channel_dim: expected an int, got {type(channel_dim).__name__}")
    dims, shape = x.dim(), tuple(x.shape)
    if not -max(dims, 1) <= channel_dim < max(dims, 1):
        raise ValueError(f"channel_dim: expected a dimension of x of shape {shape}, got {channel_dim}")
    tensors = {"bias": bias, "residual": residual}
    if isinstance(beta, Tensor):
        if beta.numel() != 1:
            raise ValueError(f"beta: expected one element, got shape {tuple(beta.shape)}")
        tensors["beta"] = beta
    for name, value in tensors.items():
        check_optional(name, value)
        if value is not None and value.device != x.device:
            raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}; move one to the other")
    if bias is not None and (not dims or tuple(bias.shape) != (shape[channel_dim],)):
        expected = f"({shape[channel_dim]},)" if dims else "an x with a dimension"
        raise ValueError(
            f"bias: expected shape {expected} for x of shape {shape} and channel_dim {channel_dim}, "
            f"got {tuple(bias.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual: expected shape {shape}, got {tuple(residual.shape)}")
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p: expected 0 <= p <= 1, got {p}")
    if channel_dropout and (not dims or channel_dim % dims == dims - 1):
        raise ValueError(
            f"channel_dropout: expected dimensions behind channel_dim, got x of shape {shape} and channel_dim "
            f"{channel_dim}; pass channel_dim=1 after a convolution"
        )
    return _KINDS[kind]
