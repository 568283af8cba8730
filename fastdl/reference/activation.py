"""SwiGLU's product in plain PyTorch: the meaning of the op.

    y = silu(gate) * up,    silu(t) = t * sigmoid(t)

Computed in float32 (float64 for float64 input); y has the dtype of gate.
Shazeer, "GLU Variants Improve Transformer" (2020).  Test: tests/test_activation.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import compute_dtype


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [...] of one shape -> [...] in the dtype of gate."""
    g, u = gate.to(compute_dtype(gate.dtype)), up.to(compute_dtype(gate.dtype))
    return (g * torch.sigmoid(g) * u).to(gate.dtype)


def swiglu_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up.  With s = sigmoid(gate):  dgate = grad * up * s * (1 + gate * (1 - s)),  dup = grad *
    gate * s."""
    wide = compute_dtype(gate.dtype)
    d, g, u = grad.to(wide), gate.to(wide), up.to(wide)
    s = torch.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)
