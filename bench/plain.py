"""Formulas as people write them in torch, in the dtype of their input: peers of several benchmarks."""

from __future__ import annotations

import torch
from torch import Tensor


def plain_rope(x: Tensor, cos_sin: Tensor, pairs: str) -> Tensor:
    """x [..., n, head_dim], cos_sin [n, rope_dim] of `fastdl.ops.rope_table` -> like x."""
    half = cos_sin.shape[1] // 2
    cos, sin = (cos_sin[:, first::2].to(x.dtype) for first in (0, 1))
    rest = x[..., 2 * half :]
    if pairs == "half":
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)
    a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    return torch.cat((torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2), rest), -1)


def plain_additive_attention(q: Tensor, k: Tensor, v: Tensor, w: Tensor) -> Tensor:
    """q [batch, queries, hidden], k [batch, keys, hidden], v [batch, keys, d_v], w [hidden] -> like q, d_v wide."""
    scores = torch.tanh(q[:, :, None] + k[:, None]) @ w
    return torch.softmax(scores, -1) @ v
