"""Batch norm in plain PyTorch: the meaning of the op, forward and backward by explicit formula.

    mean, var    of a channel over all samples and positions (of the batch), or given (evaluation)
    h = (x - mean) / sqrt(var + eps)
    y = relu(h * weight + bias + residual)                     rounded to the dtype of x; without what is not asked for

Statistics and products are float32 (float64 for float64 input).
Ioffe and Szegedy, "Batch Normalization: Accelerating Deep Network Training by Reducing Internal Covariate
Shift" (2015).
Test: tests/test_batch_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import compute_dtype


def per_channel(t: Tensor, x: Tensor) -> Tensor:
    """t [C] in the compute dtype, to be multiplied with x [N, C, *]."""
    return t.to(compute_dtype(x.dtype)).reshape(-1, *[1] * (x.dim() - 2))


def channel_sums(t: Tensor) -> Tensor:
    """t [N, C, *] -> [C]"""
    return t.sum([d for d in range(t.dim()) if d != 1], dtype=torch.float64).to(t.dtype)  # long sums lose no digits


def statistics(t: Tensor) -> tuple[Tensor, Tensor]:
    """t [N, C, *] in the compute dtype -> mean, var (biased) [C]; zeros where there is nothing."""
    count = max(t.numel() // t.shape[1], 1)
    mean = channel_sums(t) / count
    return mean, channel_sums((t - per_channel(mean, t)).square()) / count


def batch_norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """x, residual [N, C, *]; weight, bias [C]; mean, var [C], or None: those of the batch -> y [N, C, *], and the mean
    and biased variance of the batch [C] ([0] where they were given)."""
    t = x.to(compute_dtype(x.dtype))
    found = statistics(t) if mean is None or var is None else (t.new_empty(0), t.new_empty(0))
    m, v = found if mean is None or var is None else (mean.to(t.dtype), var.to(t.dtype))
    y = (t - per_channel(m, t)) * per_channel(torch.rsqrt(v + eps), t)
    if weight is not None:
        y = y * per_channel(weight, t)
    if bias is not None:
        y = y + per_channel(bias, t)
    if residual is not None:
        y = y + residual.to(t.dtype)
    if relu:
        y = y.relu()
    return y.to(x.dtype).contiguous(), *found


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    training: bool,
    need_residual: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of residual ([0] where not needed), of weight and bias [C] in the compute dtype ([0] where not
    needed). y: the output, where a ReLU made it, or None. In training mean and var are recomputed from x, so that this
    function is itself differentiable.

        g = grad where y > 0, else 0 (grad without a ReLU);   dresidual = g
        dweight = sum(g * h),  dbias = sum(g)                            over samples and positions
        training    dx = weight * rstd * (g - mean(g) - h * mean(g * h))
        evaluation  dx = weight * rstd * g
    """
    t, g = (z.to(compute_dtype(x.dtype)) for z in (x, grad))
    if y is not None:
        g = torch.where(y <= 0, torch.zeros_like(g), g)
    m, v = statistics(t) if training else (mean.to(t.dtype), var.to(t.dtype))
    rstd = torch.rsqrt(v + eps)
    h = (t - per_channel(m, t)) * per_channel(rstd, t)
    dweight, dbias = channel_sums(g * h), channel_sums(g)
    dx = g
    if training and t.numel():
        count = t.numel() // t.shape[1]
        dx = g - per_channel(dbias / count, t) - h * per_channel(dweight / count, t)
    dx = dx * per_channel(rstd if weight is None else rstd * weight.to(t.dtype), t)
    none = t.new_empty(0)
    return (
        dx.to(x.dtype).contiguous(),
        g.to(x.dtype).contiguous() if need_residual else x.new_empty(0),
        dweight if need_weight else none,
        dbias if need_bias else none.clone(),
    )
