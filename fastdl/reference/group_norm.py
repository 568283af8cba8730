"""Group norm in plain PyTorch: the meaning of the op, forward and backward by explicit formula.

    mean, rstd   of a sample's group of channels, over these channels and all positions;  rstd = 1 / sqrt(var + eps)
    h = (x - mean) * rstd
    y = scale * (h * weight + bias) + shift                    rounded to the dtype of x

Statistics and products are float32 (float64 for float64 input).
Wu and He, "Group Normalization" (2018); scale and shift a sample: AdaGN, Dhariwal and Nichol, "Diffusion Models Beat
GANs on Image Synthesis" (2021).
Test: tests/test_group_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import compute_dtype


def channels(t: Tensor | None, x: Tensor, fill: float) -> Tensor:
    """[C] or [N, C] -> [1 or N, C, 1, ...] in the compute dtype of x; ``fill`` where there is none."""
    wide, ones = compute_dtype(x.dtype), [1] * (x.dim() - 2)
    if t is None:
        return torch.full((1, 1, *ones), fill, dtype=wide, device=x.device)
    return t.to(wide).reshape(-1, t.shape[-1], *ones)


def grouped(t: Tensor, groups: int) -> Tensor:
    """t [N, C, *] -> [N, groups, elements of a group]"""
    return t.reshape(t.shape[0], groups, t[:1].numel() // groups if t.shape[0] else 1)


def normalized(x: Tensor, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, *] -> h [N, C, *] in the compute dtype, mean [N, groups], rstd [N, groups]."""
    t = x.to(compute_dtype(x.dtype))
    if not x.numel():
        zeros = t.new_zeros(x.shape[0], groups)
        return torch.zeros_like(t), zeros, zeros.clone()
    g = grouped(t, groups)
    mean = g.mean(-1)
    apart = g - mean[..., None]
    rstd = torch.rsqrt(apart.square().mean(-1) + eps)
    return (apart * rstd[..., None]).reshape(x.shape), mean, rstd


def group_norm_forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    groups: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [N, C, *]; weight, bias [C]; scale, shift [N, C] -> y [N, C, *], mean [N, groups], rstd [N, groups]."""
    h, mean, rstd = normalized(x, groups, eps)
    y = h * channels(weight, x, 1.0) + channels(bias, x, 0.0)
    y = y * channels(scale, x, 1.0) + channels(shift, x, 0.0)
    return y.to(x.dtype).contiguous(), mean, rstd


def group_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    need_weight: bool,
    need_bias: bool,
    need_scale: bool,
    need_shift: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of weight and bias [C], of scale and shift [N, C], the last four in the compute dtype ([0] where
    not needed). mean and rstd are recomputed from x, so that this function is itself differentiable.

        g  = grad * scale * weight
        dx = rstd * (g - mean(g) - h * mean(g * h))             means over the group
        P  = sum of grad over positions,  Q = sum of grad * h over positions                      [N, C]
        dweight = sum_n(scale * Q),  dbias = sum_n(scale * P),  dscale = weight * Q + bias * P,  dshift = P
    """
    h, _, rstd = normalized(x, groups, eps)
    d, (n, c) = grad.to(h.dtype), x.shape[:2]
    w, b, s = channels(weight, x, 1.0), channels(bias, x, 0.0), channels(scale, x, 1.0)
    positions = x.numel() // max(n * c, 1)
    p, q = (t.reshape(n, c, positions).sum(-1) for t in (d, d * h))
    dx = d * (s * w)
    if x.numel():
        g, u = grouped(dx, groups), grouped(h, groups)
        inner = g - g.mean(-1, keepdim=True) - u * (g * u).mean(-1, keepdim=True)
        dx = (inner * rstd[..., None]).reshape(x.shape).clone()  # a view of an op's output could not be written to
    none = h.new_empty(0)
    s, w, b = (t.reshape(t.shape[:2]) for t in (s, w, b))
    return (
        dx.to(x.dtype).contiguous(),
        (s * q).sum(0) if need_weight else none,
        (s * p).sum(0) if need_bias else none.clone(),
        (w * q + b * p) if need_scale else none.clone(),
        p if need_shift else none.clone(),
    )
