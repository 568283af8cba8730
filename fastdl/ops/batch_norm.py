"""Room batch_norm: batch norm with the residual add and the ReLU that follow it in a ResNet, in the same pass.

    h = (x - mean) / sqrt(var + eps)         training: mean and var of a channel over the batch; evaluation: the running
    y = relu(h * weight + bias + residual)   rounded to the dtype of x; statistics and products are float32

dtypes of x: float32, bfloat16, float16, and float64 on the torch back end. The statistics, weight and bias may have
another dtype. Gradients to x, residual, weight and bias; twice (the double backward recomputes statistics from x).

Back ends: cpu (csrc/cpu/batch_norm*.cpp), cuda (csrc/cuda/batch_norm*.cuh), triton (kernels/batch_norm.py), torch
(fastdl/reference/batch_norm.py). What they refuse, and what they copy:

    | back end          | what          |                                                                        |
    | cpu, cuda, triton | float64       | refused: their kernels accumulate in float32                           |
    | all               | channels last | read as it lies, and y is channels last; a residual is brought to that |
    | cpu, cuda, triton | other strides | taken; x is copied to one piece first, and y is contiguous             |

Test: ``pytest tests/test_batch_norm.py``; benchmark: ``pytest bench/bench_batch_norm.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, triton_twin, twin_of
from ..reference import batch_norm as reference
from ..reference.norm import compute_dtype
from ._channels import check_images, check_parameter, readable
from ._checks import check_eps

__all__ = ["batch_norm"]


def _fake_forward(x, residual, weight, bias, mean, var, eps, relu):
    wide, channels = compute_dtype(x.dtype), x.shape[1] if mean is None else 0
    return x.new_empty(x.shape), x.new_empty(channels, dtype=wide), x.new_empty(channels, dtype=wide)


def _fake_backward(grad, x, y, weight, mean, var, eps, training, need_residual, need_weight, need_bias):
    wide, channels = compute_dtype(x.dtype), x.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if need_residual else 0),
        x.new_empty(channels if need_weight else 0, dtype=wide),
        x.new_empty(channels if need_bias else 0, dtype=wide),
    )


FORWARD = Op(
    "batch_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? mean, Tensor? var, "
    "float eps, bool relu) -> (Tensor y, Tensor batch_mean, Tensor batch_var)",
    fake=_fake_forward,
    reference=reference.batch_norm_forward,
    triton=triton_twin("batch_norm", "batch_norm_forward"),
)
BACKWARD = Op(
    "batch_norm_backward(Tensor grad, Tensor x, Tensor? y, Tensor? weight, Tensor mean, Tensor var, float eps, "
    "bool training, bool need_residual, bool need_weight, bool need_bias) "
    "-> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
    fake=_fake_backward,
    reference=reference.batch_norm_backward,
    triton=triton_twin("batch_norm", "batch_norm_backward"),
)


def _setup(ctx, inputs, output):
    x, _, weight, bias, mean, var, ctx.eps, ctx.relu = inputs
    y, batch_mean, batch_var = output
    ctx.training = mean is None
    # Running statistics may be updated before the backward pass: it takes them as they were.
    statistics = (batch_mean, batch_var) if ctx.training else (mean.clone(), var.clone())
    ctx.save_for_backward(x, y if ctx.relu else None, weight, *statistics)
    ctx.dtypes = tuple(None if t is None else t.dtype for t in (weight, bias))
    ctx.mark_non_differentiable(batch_mean, batch_var)
    ctx.set_materialize_grads(False)


def _backward(twin, ctx, grad, _mean, _var):
    need = ctx.needs_input_grad
    if grad is None:
        return (None,) * 8
    # Without a ReLU the residual's gradient is that of y.
    needs = (need[1] and ctx.relu, need[2], need[3])
    dx, dresidual, dweight, dbias = BACKWARD[twin](grad, *ctx.saved_tensors, ctx.eps, ctx.training, *needs)
    return (
        dx if need[0] else None,
        (dresidual if ctx.relu else grad) if need[1] else None,
        dweight.to(ctx.dtypes[0]) if need[2] else None,
        dbias.to(ctx.dtypes[1]) if need[3] else None,
        *[None] * 4,
    )


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.batch_norm_backward))


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels accumulate in float32; use backend='torch' or another dtype"
    return None


backends.register_room("batch_norm", {"cpu": _refuse, "cuda": _refuse, "triton": _refuse})


def batch_norm(
    x: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    training: bool = False,
    momentum: float | Tensor = 0.1,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    relu: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Batch norm of every channel, with a residual add and a ReLU in the same pass:

        y = relu((x - mean) / sqrt(var + eps) * weight + bias + residual)

    x             [N, C, *], float32, bfloat16, float16 (float64: torch back end); any strides
    running_mean  [C], floating; both or none. In training they are updated in place, where given:
    running_var   running += momentum * (batch's - running), with the unbiased variance. In evaluation: mean and var.
    weight, bias  [C], floating, or None (ones, zeros)
    training      mean and (biased) variance are those of the batch; needs more than one value a channel
    momentum      0 <= momentum <= 1, a number, or a tensor with one (whose value is not checked)
    eps           > 0
    residual      like x, or None; of another dtype both are promoted, as ``y + residual`` would be
    relu          cut off below 0 at the end
    backend       None or "auto", "cpu", "cuda", "triton", "torch"

    Returns y [N, C, *] in the dtype of x, channels last where x is, else contiguous. Zero rows give zero rows and leave
    the running statistics as they are. Differentiable twice in x, residual, weight and bias. Raises TypeError or
    ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch, fastdl
    >>> x, shortcut, mean, var = torch.randn(4, 8, 5, 5), torch.randn(4, 8, 5, 5), torch.zeros(8), torch.ones(8)
    >>> y = fastdl.ops.batch_norm(x, mean, var, training=True, residual=shortcut, relu=True)
    >>> h = torch.nn.functional.batch_norm(x, None, None, training=True)
    >>> torch.allclose(y, torch.relu(h + shortcut), atol=1e-5)
    True
    >>> torch.allclose(mean, 0.1 * x.mean((0, 2, 3)), atol=1e-6)
    True

    Source: Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
    Shift" (2015).
    """
    _check(x, running_mean, running_var, weight, bias, training, momentum, eps, residual)
    if residual is not None and residual.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        x, residual = x.to(dtype), residual.to(dtype)
    refusals = backends.in_a_transform()
    chosen = backends.choose("batch_norm", backend, device=x.device, dtype=x.dtype, refusals=refusals)
    last = not x.is_contiguous() and x.dim() > 2 and x.movedim(1, -1).is_contiguous()
    shape = x.shape
    if last:  # rows of channels, as the memory has them
        x = x.movedim(1, -1).reshape(-1, shape[1])
        residual = None if residual is None else residual.movedim(1, -1).reshape(-1, shape[1])
    mean, var = (None, None) if training else (running_mean, running_var)
    if chosen != "torch":
        weight, bias = readable(x, weight), readable(x, bias)
        mean, var = (None if t is None else t.float() for t in (mean, var))
    y, mean, var = FORWARD[twin_of(chosen, x.device)](x, residual, weight, bias, mean, var, eps, relu)
    count = x.numel() // x.shape[1]
    if training and running_mean is not None and count:
        with torch.no_grad():
            for running, batch in ((running_mean, mean), (running_var, var * (count / (count - 1)))):
                part = momentum.to(running.dtype) if isinstance(momentum, Tensor) else momentum
                running.lerp_(batch.to(running.dtype), part)
    return y.reshape(shape[0], *shape[2:], shape[1]).movedim(-1, 1) if last else y


def _check(x, running_mean, running_var, weight, bias, training, momentum, eps, residual) -> None:
    check_images(x)
    channels = x.shape[1]
    for name, value in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        check_parameter(name, value, x, (channels,))
    check_parameter("residual", residual, x, x.shape)
    for name, value in (("running_mean", running_mean), ("running_var", running_var)):
        if value is not None and value.requires_grad and torch.is_grad_enabled() and not backends.in_a_transform():
            raise ValueError(
                f"{name}: expected a tensor that requires no gradient, got one that does; pass {name}.detach()"
            )
    missing = [n for n, t in (("running_mean", running_mean), ("running_var", running_var)) if t is None]
    if len(missing) == 1:
        raise ValueError(f"{missing[0]}: expected running_mean and running_var, or neither; got one of them")
    if missing and not training:
        raise ValueError(
            "running_mean: expected a tensor [C] in evaluation, got None; pass training=True to take the batch's"
        )
    if training and x.numel() == channels:
        raise ValueError(
            f"x: expected more than 1 value per channel when training, got shape {tuple(x.shape)}; "
            "use a larger batch or training=False"
        )
    if isinstance(momentum, bool) or not isinstance(momentum, (int, float, Tensor)):
        raise TypeError(f"momentum: expected a number, got {type(momentum).__name__}")
    if isinstance(momentum, Tensor):
        if momentum.numel() != 1:
            raise ValueError(f"momentum: expected a number, or a tensor with one, got shape {tuple(momentum.shape)}")
    elif not 0 <= momentum <= 1:
        raise ValueError(f"momentum: expected 0 <= momentum <= 1, got {momentum}")
    check_eps(eps)
