"""What several rooms check of their arguments."""

from __future__ import annotations

import numbers

import torch
from torch import Tensor

_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def check_dense(name: str, x: Tensor) -> None:
    """Raise unless x is a dense tensor of one of the dtypes that kernels and references compute with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES or x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else f"layout {x.layout}"
        raise TypeError(
            f"{name}: expected a dense floating point tensor of 16, 32 or 64 bits, got {x.dtype}, {kind}; "
            "convert it first"
        )


def check_optional(name: str, value: Tensor | None) -> None:
    """Raise unless value is None or a dense floating point tensor."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES or value.layout != torch.strided:
        got = f"{value.dtype}, layout {value.layout}" if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating point tensor or None, got {got}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps: expected a number > 0, got {eps}")
