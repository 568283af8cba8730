"""RMS norm in plain PyTorch: the meaning of the op.

    y[r, i] = x[r, i] * rstd[r] * weight[i],    rstd[r] = 1 / sqrt(mean_i(x[r, i]^2) + eps)

Statistics and products are float32 (float64 for float64 input); y has the dtype of x, as in torch.
Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).  Test: tests/test_norm.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums are kept in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x [..., width], weight [width] or None -> [..., width] in the dtype of x."""
    wide = x.to(compute_dtype(x.dtype))
    y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(wide.dtype)
    return y.to(x.dtype)


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    """Gradients of x and of weight (None without one), by formula.

    With h = x * rstd and g = grad * weight:   dx = rstd * (g - h * mean(g * h)),   dweight = sum over rows of grad * h.
    """
    wide, g = x.to(compute_dtype(x.dtype)), grad.to(compute_dtype(x.dtype))
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    h = wide * rstd
    d_weight = None
    if weight is not None:
        d_weight = (g * h).reshape(-1, x.shape[-1]).sum(0).to(weight.dtype)
        g = g * weight.to(wide.dtype)
    dx = rstd * (g - h * (g * h).mean(-1, keepdim=True))
    return dx.to(x.dtype), d_weight
