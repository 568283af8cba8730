"""Layer norm and RMS norm in plain PyTorch: the meaning of the ops, forward and backward by explicit formula.

    s     = residual + dropout(x)                          rounded to the dtype of x; s = x without the two
    layer   mean = mean_i(s),  rstd = 1 / sqrt(mean_i((s - mean)^2) + eps),  h = (s - mean) * rstd
    rms                        rstd = 1 / sqrt(mean_i(s^2) + eps),           h = s * rstd
    y     = h * (weight + offset) + bias                   rounded to the dtype of x

Statistics and products are float32 (float64 for float64 input).
Ba et al., "Layer Normalization" (2016); Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
Test: tests/test_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import philox


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def statistics(s: Tensor, eps: float, rms: bool) -> tuple[Tensor, Tensor]:
    """s [..., cols] in the compute dtype -> mean [...] ([0] for RMS norm), rstd [...]."""
    if rms:
        return s.new_empty(0), torch.rsqrt(s.square().mean(-1) + eps)
    mean = s.mean(-1)
    return mean, torch.rsqrt((s - mean[..., None]).square().mean(-1) + eps)


def normalized(s: Tensor, mean: Tensor, rstd: Tensor, rms: bool) -> Tensor:
    """h [..., cols]."""
    return (s if rms else s - mean[..., None]) * rstd[..., None]


def norm_forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    seed: Tensor | None,
    p: float,
    eps: float,
    offset: float,
    rms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, residual [..., cols]; weight, bias [cols]; seed int64 [1] -> y [..., cols], s [..., cols] ([0] where s is x),
    mean [...] ([0] for RMS norm), rstd [...]."""
    wide = compute_dtype(x.dtype)
    s = x.to(wide)
    if seed is not None:
        s = philox.dropout(s, seed, p)
    if residual is not None:
        s = residual.to(wide) + s
    plain = seed is None and residual is None
    kept = x.new_empty(0) if plain else s.to(x.dtype)
    s = (x if plain else kept).to(wide)
    mean, rstd = statistics(s, eps, rms)
    y = normalized(s, mean, rstd, rms)
    if weight is not None:
        y = y * (weight.to(wide) + offset)
    if bias is not None:
        y = y + bias.to(wide)
    return y.to(x.dtype).contiguous(), kept.contiguous(), mean, rstd


def norm_inference(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    rms: bool,
    need_sum: bool,
) -> tuple[Tensor, Tensor]:
    """norm_forward without dropout and without what only a backward pass reads -> y [..., cols], s [..., cols] ([0]
    where s is x or not asked for)."""
    y, s, _, _ = norm_forward(x, residual, weight, bias, None, 0.0, eps, offset, rms)
    return y, (s if need_sum else x.new_empty(0))


def norm_backward(
    grad: Tensor,
    grad_sum: Tensor | None,
    s: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    seed: Tensor | None,
    p: float,
    eps: float,
    offset: float,
    rms: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of s, of x where dropout makes it another ([0] without), of weight and bias in the compute dtype ([0]
    where not needed). mean and rstd are recomputed from s, so that this function is itself differentiable.

        g  = grad * (weight + offset)
        ds = rstd * (g - mean_i(g) - h * mean_i(g * h)) + grad_sum        (RMS norm: without mean_i(g))
        dweight = sum over rows of grad * h,   dbias = sum over rows of grad,   dx = dropout's mask of ds
    """
    wide = compute_dtype(s.dtype)
    d, t = grad.to(wide), s.to(wide)
    mean, rstd = statistics(t, eps, rms)
    h = normalized(t, mean, rstd, rms)
    g = d if weight is None else d * (weight.to(wide) + offset)
    inner = g - h * (g * h).mean(-1, keepdim=True)
    if not rms:
        inner = inner - g.mean(-1, keepdim=True)
    ds = inner * rstd[..., None]
    if grad_sum is not None:
        ds = ds + grad_sum.to(wide)
    cols = s.shape[-1]
    dx = s.new_empty(0) if seed is None else philox.dropout(ds, seed, p).to(s.dtype).contiguous()
    dweight = (d * h).reshape(-1, cols).sum(0) if need_weight else d.new_empty(0)
    dbias = d.reshape(-1, cols).sum(0) if need_bias else d.new_empty(0)
    return ds.to(s.dtype).contiguous(), dx, dweight, dbias


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMS norm for other references: x [..., cols], weight [cols] or None -> [..., cols] in the dtype of x."""
    return norm_forward(x, None, weight, None, None, 0.0, eps, 0.0, True)[0]
