"""What several rooms check of their arguments."""

from __future__ import annotations

import numbers

import numpy as np
import torch
from torch import Tensor

_FLOAT32_MAX = torch.finfo(torch.float32).max
_NUMBERS = (int, float, torch.SymInt, torch.SymFloat, numbers.Real)
_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def kind_of(x: Tensor) -> str:
    """Of a tensor that is refused, for the error."""
    return f"{x.dtype}, nested" if x.is_nested else f"{x.dtype}, layout {x.layout}"


def check_dense(name: str, x: Tensor) -> None:
    """Raise unless x is a dense tensor of one of the dtypes that kernels and references compute with."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if x.dtype not in _DTYPES or x.layout != torch.strided or x.is_nested:
        raise TypeError(
            f"{name}: expected a dense floating point tensor of 16, 32 or 64 bits, got {kind_of(x)}; convert it first"
        )


def check_optional(name: str, value: Tensor | None) -> None:
    """Raise unless value is None or a dense floating point tensor."""
    if value is None:
        return
    if not isinstance(value, Tensor) or value.dtype not in _DTYPES or value.layout != torch.strided or value.is_nested:
        got = kind_of(value) if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating point tensor or None, got {got}")


def check_number(name: str, value: float) -> None:
    if not isinstance(value, _NUMBERS):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")


def check_finite(name: str, value: float) -> None:
    """Raise unless value is a number that float32, in which kernels take it, can hold."""
    check_number(name, value)
    if not abs(value) <= _FLOAT32_MAX:
        raise ValueError(f"{name}: expected a finite number, at most {_FLOAT32_MAX:.2g}, got {value}")


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, (bool, torch.SymBool, np.bool_)):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_int(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name}: expected a number >= {least}, got {value}")


def check_eps(eps: float) -> None:
    check_number("eps", eps)
    if not eps > 0:
        raise ValueError(f"eps: expected a number > 0, got {eps}")
