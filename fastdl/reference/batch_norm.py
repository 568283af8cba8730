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


def statistics(t: Tensor) -> tuple[Tensor, Tensor]:
    """t [N, C, S] -> mean, var (biased) [C]; zeros where there is nothing."""
    if not t.numel():
        return t.new_zeros(t.shape[1]), t.new_zeros(t.shape[1])
    mean = t.mean((0, 2))
    return mean, (t - mean[:, None]).square().mean((0, 2))


def images(x: Tensor) -> Tensor:
    """x [N, C, *] -> [N, C, S] in the compute dtype."""
    spatial = 1
    for size in x.shape[2:]:
        spatial *= size
    return x.to(compute_dtype(x.dtype)).reshape(x.shape[0], x.shape[1], spatial)


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
    t = images(x)
    none = t.new_empty(0), t.new_empty(0)
    found = statistics(t) if mean is None or var is None else none
    m, v = found if mean is None or var is None else (mean.to(t.dtype), var.to(t.dtype))
    y = (t - m[:, None]) * torch.rsqrt(v + eps)[:, None]
    if weight is not None:
        y = y * weight.to(t.dtype)[:, None]
    if bias is not None:
        y = y + bias.to(t.dtype)[:, None]
    if residual is not None:
        y = y + images(residual)
    if relu:
        y = y.relu()
    return y.to(x.dtype).reshape(x.shape).contiguous(), *found


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
    t, g = images(x), images(grad)
    if y is not None:
        g = torch.where(images(y) <= 0, torch.zeros_like(g), g)
    m, v = statistics(t) if training else (mean.to(t.dtype), var.to(t.dtype))
    rstd = torch.rsqrt(v + eps)[:, None]
    h = (t - m[:, None]) * rstd
    dweight, dbias = (g * h).sum((0, 2)), g.sum((0, 2))
    dx = g
    if training and t.numel():
        count = t.numel() // t.shape[1]
        dx = g - (dbias / count)[:, None] - h * (dweight / count)[:, None]
    dx = dx * rstd if weight is None else dx * (rstd * weight.to(t.dtype)[:, None])
    none = t.new_empty(0)
    return (
        dx.to(x.dtype).reshape(x.shape).contiguous(),
        g.to(x.dtype).reshape(x.shape).contiguous() if need_residual else x.new_empty(0),
        dweight if need_weight else none,
        dbias if need_bias else none.clone(),
    )
