"""What the rooms of attention check of masks and lengths, and the dtype that autocast gives their tensors.

A mask is boolean and True where a query may attend; lengths hide the keys from them on. A value of a tensor on a GPU is
not looked at, because that would wait for the GPU, unless FASTDL_CHECK=1.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from .. import backend as backends
from .._library import is_compiling, tracing
from ._checks import kind_of


def values_are_known(t: Tensor) -> bool:
    """Whether the values of t may be looked at here."""
    if t.device.type == "meta" or is_compiling() or tracing() is not None or backends.in_a_transform() is not None:
        return False
    return t.device.type == "cpu" or os.environ.get("FASTDL_CHECK") == "1"


def check_ints(name: str, value: Tensor) -> None:
    """Raise unless value is a dense tensor of whole numbers, 32 or 64 bits each."""
    if isinstance(value, Tensor) and value.dtype in (torch.int32, torch.int64):
        if value.layout == torch.strided and not value.is_nested:
            return
        raise TypeError(f"{name}: expected a dense tensor, got {kind_of(value)}")
    got = value.dtype if isinstance(value, Tensor) else type(value).__name__
    raise TypeError(f"{name}: expected an int64 or int32 tensor, got {got}")


def check_mask(mask: Tensor | None, scores: tuple[int, ...], device: torch.device) -> Tensor | None:
    """mask as a view of len(scores) dimensions, each that of the scores or 1."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.layout != torch.strided or mask.is_nested:
        odd = isinstance(mask, Tensor) and (mask.is_nested or mask.layout != torch.strided)
        got = kind_of(mask) if odd else mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"mask: expected a boolean tensor, True where a query attends, got {got}; a floating point mask is a bias"
        )
    return broadcastable("mask", mask, scores, device)


def broadcastable(name: str, t: Tensor, scores: tuple[int, ...], device: torch.device) -> Tensor:
    """t with leading dimensions of 1, so that it has those of the scores; raises unless it can be broadcast to them."""
    fits = t.dim() <= len(scores) and all(
        n == 1 or n == m for n, m in zip(reversed(t.shape), reversed(scores), strict=False)
    )
    if not fits:
        raise ValueError(f"{name}: expected a shape that can be broadcast to {tuple(scores)}, got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{name}: expected the device of q, {device}, got {t.device}; move one to the other")
    return t.reshape((1,) * (len(scores) - t.dim()) + tuple(t.shape)) if t.dim() < len(scores) else t


def check_valid_lens(
    valid_lens: Tensor | None, batch: int, queries: int, keys: int, device: torch.device
) -> Tensor | None:
    """valid_lens as int32 [batch] or [batch, queries] on the device."""
    if valid_lens is None:
        return None
    check_ints("valid_lens", valid_lens)
    if tuple(valid_lens.shape) not in ((batch,), (batch, queries)):
        raise ValueError(
            f"valid_lens: expected shape ({batch},) or ({batch}, {queries}), a length a sequence or a query, got "
            f"{tuple(valid_lens.shape)}"
        )
    if valid_lens.numel() and values_are_known(valid_lens):
        low, high = (int(n) for n in torch.aminmax(valid_lens))
        if low < 0 or high > keys:
            raise ValueError(f"valid_lens: expected values from 0 to {keys}, the number of keys, got {low} to {high}")
    return valid_lens.to(device, torch.int32, non_blocking=True)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype in which autocast wants products with x; None where it is off."""
    kind = x.device.type
    if kind == "meta" or x.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
