"""What the rooms that normalize over channels, group_norm and batch_norm, check of their arguments."""

from __future__ import annotations

import torch
from torch import Tensor


def readable(x: Tensor, t: Tensor | None) -> Tensor | None:
    """The kernels read parameters in the dtype of x or in float32."""
    return t if t is None or t.dtype in (x.dtype, torch.float32) else t.float()


def check_images(x: Tensor) -> None:
    """Raise unless x is a dense floating point tensor [N, C, *] with a channel."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point() or x.layout != torch.strided:
        raise TypeError(f"x: expected a dense floating point tensor, got {x.dtype}, layout {x.layout}")
    if x.dim() < 2 or x.shape[1] == 0:
        raise ValueError(f"x: expected shape [N, C, *] with C of at least 1, got {tuple(x.shape)}")


def check_parameter(name: str, value: Tensor | None, x: Tensor, expected: tuple[int, ...]) -> None:
    """Raise unless value is None, or a floating point tensor of the expected shape on the device of x."""
    if value is None:
        return
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise TypeError(f"{name}: expected a floating point tensor or None, got {got}")
    if value.shape != expected:
        raise ValueError(
            f"{name}: expected shape {tuple(expected)} for x of shape {tuple(x.shape)}, got {tuple(value.shape)}"
        )
    if value.device != x.device:
        raise ValueError(f"{name}: expected the device of x, {x.device}, got {value.device}; move one to the other")
