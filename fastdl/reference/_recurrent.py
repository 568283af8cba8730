"""What the references of lstm, gru and rnn share: the order of the steps, masks, and the product with the last state.

Names and shapes, in all three rooms:

    T steps, B sequences, D directions (1; 2: the second runs backwards in time), H hidden units, G gates,
    P = the size of h: H, or proj_size

    gates_x  [T, B, D, G * H]   products with the input, biases added       w_hh  [D, G * H, P]
    y        [T, B, D, P]       the outputs, 0 past the end of a sequence   h0    [D, B, P] in the compute dtype
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import philox
from .norm import compute_dtype

__all__ = ["compute_dtype", "layer_norm", "layer_norm_backward", "mix", "of_direction", "product", "running", "steps"]
__all__ += ["stacked", "zoneout"]


def steps(count: int, direction: int) -> list[int]:
    """The times 0 .. count - 1 in the order in which a direction visits them."""
    return list(range(count)) if direction == 0 else list(range(count - 1, -1, -1))


def of_direction(direction: int, *tensors: Tensor | None) -> list[Tensor | None]:
    """tensors [D, ...] -> [...]"""
    return [None if t is None else t[direction] for t in tensors]


def product(h: Tensor, weight: Tensor) -> Tensor:
    """h [B, P] in the compute dtype, weight [N, P] -> [B, N]: h rounded to the dtype of weight, the sum in the compute
    dtype."""
    return h.to(weight.dtype).to(h.dtype) @ weight.to(h.dtype).t()


def running(lengths: Tensor | None, t: int) -> Tensor | None:
    """bool [B, 1]: the sequences that are not over at step t; None: all."""
    return None if lengths is None else (lengths > t)[:, None]


def mix(where: Tensor | None, new: Tensor, old: Tensor | float) -> Tensor:
    """new where a sequence runs, old where it is over."""
    return new if where is None else torch.where(where, new, torch.as_tensor(old, dtype=new.dtype, device=new.device))


def zoneout(seed: Tensor | None, which: int, p: float, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
    """How much of the old value each element keeps, [T, B, D, N]: 0 or 1 with probability p of 1 (training: a seed is
    given), p everywhere (evaluation: the expectation); None: nothing. ``which``: 0 for h, 1 for c."""
    if p == 0:
        return None
    if seed is None:
        return torch.full((1, 1, 1, 1), p, dtype=dtype).expand(*shape)
    return (~philox.keep_mask(seed[which : which + 1], tuple(shape), p)).to(dtype)


def layer_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., N] -> (x - mean) * rstd * weight"""
    apart = x - x.mean(-1, keepdim=True)
    return apart * torch.rsqrt(apart.square().mean(-1, keepdim=True) + eps) * weight


def layer_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x [..., N], and of weight before its sum over rows [..., N]."""
    apart = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(apart.square().mean(-1, keepdim=True) + eps)
    hat, g = apart * rstd, grad * weight
    return rstd * (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True)), grad * hat


def stacked(parts: list[list[Tensor]], like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """parts[direction][time] [B, N] -> [T, B, D, N] in ``dtype``; ``like``: where an empty one lives."""
    if not parts or not parts[0]:
        return like.new_zeros(tuple(shape), dtype=dtype)
    return torch.stack([torch.stack(times) for times in parts], 2).to(dtype)
