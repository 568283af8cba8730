"""Activations in plain PyTorch: the meaning of the ops, forward and backward by explicit formula.

    t = x + bias                              bias over one dimension of x
    y = residual + dropout(f(t))              rounded to the dtype of x

    | kind       | f(t)                            | f'(t)                                  |
    | relu       | max(t, 0)                       | 1 where t > 0, else 0                  |
    | leaky_relu | t where t > 0, else slope * t   | 1 where t > 0, else slope              |
    | gelu       | t * P(t)                        | P(t) + t * p(t)                        |
    | gelu_tanh  | t * (1 + tanh(u)) / 2           | (1 + tanh(u)) / 2 + t (1 - tanh(u)^2) u'(t) / 2 |
    | swish      | t * sigmoid(beta * t)           | g + beta * t * g (1 - g),  g = sigmoid(beta * t) |
    | tanh       | tanh(t)                         | 1 - tanh(t)^2                          |
    | sigmoid    | sigmoid(t)                      | g (1 - g)                              |
    | identity   | t                               | 1                                      |

P and p are the distribution and the density of the standard normal, u(t) = sqrt(2 / pi) (t + 0.044715 t^3), and the
derivative of swish by beta is t^2 g (1 - g). Gated: y = f(gate) * up.

Computed in float32 (float64 for float64 input). Hendrycks and Gimpel, "Gaussian Error Linear Units" (2016);
Ramachandran et al., "Searching for Activation Functions" (2017); Shazeer, "GLU Variants Improve Transformer" (2020).
Test: tests/test_activation.py.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import philox
from .norm import compute_dtype

# A kind's place here is its number in the schemas, in csrc/common/activations.h and in kernels/activation.py.
KINDS = ("relu", "leaky_relu", "gelu", "gelu_tanh", "swish", "tanh", "sigmoid", "identity")
_ROOT = math.sqrt(2.0 / math.pi)


def value(kind: int, t: Tensor, alpha: float | Tensor) -> Tensor:
    """f(t); alpha is the slope of leaky_relu or the beta of swish."""
    match KINDS[kind]:
        case "relu":
            return torch.where(t <= 0, 0.0, t)
        case "leaky_relu":
            return torch.where(t <= 0, t * alpha, t)
        case "gelu":
            return t * _normal(t)
        case "gelu_tanh":
            return t * (0.5 + 0.5 * torch.tanh(_ROOT * (t + 0.044715 * t * t * t)))
        case "swish":
            return t * torch.sigmoid(t * alpha)
        case "tanh":
            return torch.tanh(t)
        case "sigmoid":
            return torch.sigmoid(t)
    return t


def slope(kind: int, t: Tensor, alpha: float | Tensor) -> Tensor:
    """f'(t)."""
    match KINDS[kind]:
        case "relu":
            return torch.where(t <= 0, 0.0, torch.ones_like(t))
        case "leaky_relu":
            return torch.where(t <= 0, torch.ones_like(t) * alpha, torch.ones_like(t))
        case "gelu":
            return _normal(t) + t * torch.exp(-0.5 * t * t) / math.sqrt(2.0 * math.pi)
        case "gelu_tanh":
            h = torch.tanh(_ROOT * (t + 0.044715 * t * t * t))
            return 0.5 + 0.5 * h + 0.5 * t * (1 - h * h) * _ROOT * (1 + 3 * 0.044715 * t * t)
        case "swish":
            g = torch.sigmoid(t * alpha)
            return g + alpha * t * g * (1 - g)
        case "tanh":
            return 1 - torch.tanh(t).square()
        case "sigmoid":
            g = torch.sigmoid(t)
            return g * (1 - g)
    return torch.ones_like(t)


def _normal(t: Tensor) -> Tensor:
    return 0.5 * torch.erfc(t * -math.sqrt(0.5))


def _wide(x: Tensor, bias: Tensor | None, inner: int) -> Tensor:
    """x + bias in the compute dtype; bias runs over the dimension with ``inner`` elements behind each of its own."""
    t = x.to(compute_dtype(x.dtype))
    if bias is None or not t.numel():
        return t
    return (t.reshape(-1, bias.numel(), inner) + bias.to(t.dtype)[:, None]).reshape(x.shape)


def _dropout(t: Tensor, seed: Tensor | None, p: float, inner: int, by_channel: bool) -> Tensor:
    if seed is None:
        return t
    if by_channel:  # one decision for `inner` elements
        return philox.dropout(t.reshape(-1, inner), seed, p, (t.numel() // inner, 1)).reshape(t.shape)
    return philox.dropout(t, seed, p)


def activation_forward(
    x: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    beta: Tensor | None,
    seed: Tensor | None,
    kind: int,
    alpha: float,
    p: float,
    inner: int,
    by_channel: bool,
) -> Tensor:
    """x, residual [..., channels, *inner]; bias [channels]; beta [1], in place of alpha; seed int64 [1] -> y like x."""
    t = _wide(x, bias, inner)
    y = _dropout(value(kind, t, alpha if beta is None else beta.to(t.dtype)), seed, p, inner, by_channel)
    if residual is not None:
        y = residual.to(t.dtype) + y
    return y.to(x.dtype).contiguous()


def activation_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    beta: Tensor | None,
    seed: Tensor | None,
    kind: int,
    alpha: float,
    p: float,
    inner: int,
    by_channel: bool,
    need_bias: bool,
    need_beta: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x [like x], of bias [channels] and beta [1] in the compute dtype ([0] where not needed).

    dt = dropout's mask of grad, times f'(t);  dbias = sum of dt over the other dimensions;  dbeta = sum of
    dropout's mask of grad, times t^2 g (1 - g)
    """
    t = _wide(x, bias, inner)
    scale = alpha if beta is None else beta.to(t.dtype)
    d = _dropout(grad.to(t.dtype), seed, p, inner, by_channel)
    dt = d * slope(kind, t, scale)
    dbias, dbeta = t.new_empty(0), t.new_empty(0)
    if need_bias:
        dbias = dt.reshape(-1, bias.numel(), inner).sum((0, 2)) if dt.numel() else t.new_zeros(bias.numel())
    if need_beta:
        g = torch.sigmoid(t * scale)
        dbeta = (d * t * t * g * (1 - g)).sum().reshape(1)
    return dt.to(x.dtype).contiguous(), dbias, dbeta


def glu_forward(gate: Tensor, up: Tensor, kind: int) -> Tensor:
    """gate, up [...] -> f(gate) * up, like gate."""
    g, u = gate.to(compute_dtype(gate.dtype)), up.to(compute_dtype(gate.dtype))
    return (value(kind, g, 1.0) * u).to(gate.dtype).contiguous()


def glu_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: int) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up: grad * up * f'(gate), grad * f(gate)."""
    wide = compute_dtype(gate.dtype)
    d, g, u = grad.to(wide), gate.to(wide), up.to(wide)
    dgate, dup = d * u * slope(kind, g, 1.0), d * value(kind, g, 1.0)
    return dgate.to(gate.dtype).contiguous(), dup.to(up.dtype).contiguous()


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, for other references."""
    return glu_forward(gate, up, KINDS.index("swish"))
