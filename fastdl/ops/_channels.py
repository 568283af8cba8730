"""What the rooms that normalize over channels, group_norm and batch_norm, check of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor

from ._checks import check_dense, check_optional


def readable(x: Tensor, t: Tensor | None) -> Tensor | None:
    """The kernels read parameters in the dtype of x or in float32."""
    return t if t is None or t.dtype in (x.dtype, torch.float32) else t.float()


def check_images(x: Tensor) -> None:
    """Raise unless x is a dense floating point tensor [N, C, *] with a channel."""
    check_dense("x", x)
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected shape [N, C, *] with C of at least 1, got {tuple(x.shape)}")


def check_parameter(name: str, value: Tensor | None, x: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless value is None, or a floating point tensor of the expected shape on the device of x."""
    check_optional(name, value)
    if value is None:
        return
    if value.shape != expected:
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} for x of shape {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}; move one to the other")
