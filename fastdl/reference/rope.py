"""Rotary position embedding in plain PyTorch: the meaning of the op, and the table of angles.

Pair i of a head is turned by the angle p * f[i] at position p, with f[i] = base ** (-2 i / rope_dim):

    y_a = x_a * cos - x_b * sin,    y_b = x_b * cos + x_a * sin

"interleaved" pairs are elements (2i, 2i+1): GGUF's llama.  "half" pairs are (i, i + rope_dim/2): GPT-NeoX, Hugging
Face, qwen2. Elements from rope_dim on pass through.  The table is built in float64 and rounded once: angles reach
131072 radians, where float32 keeps two decimals only.

Su et al., "RoFormer" (2021); YaRN: Peng et al. (2023).  Test: tests/test_rope.py.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .norm import compute_dtype


def frequencies(rope_dim: int, base: float) -> Tensor:
    """float64 [rope_dim / 2]: radians a position, pair by pair."""
    # numpy: torch's float64 kernels would bring 5 MB of library pages into memory for this alone
    return torch.from_numpy(float(base) ** (-np.arange(0, rope_dim, 2, dtype=np.float64) / rope_dim))


def yarn_frequencies(
    rope_dim: int, base: float, factor: float, original_context: int, beta_fast: float, beta_slow: float
) -> Tensor:
    """float64 [rope_dim / 2]: fast pairs as they are, slow pairs divided by `factor`, a linear ramp between them.

    A pair counts as fast when it turns at least beta_fast times within original_context, as slow below beta_slow turns.
    """

    def pair_with(turns: float) -> float:
        return rope_dim * math.log(original_context / (turns * 2 * math.pi)) / (2 * math.log(base))

    low = max(math.floor(pair_with(beta_fast)), 0)
    high = min(math.ceil(pair_with(beta_slow)), rope_dim - 1)
    ramp = (torch.arange(rope_dim // 2, dtype=torch.float64) - low) / max(high - low, 0.001)
    slow = ramp.clamp(0, 1)
    plain = frequencies(rope_dim, base)
    return plain * (1 - slow) + plain / factor * slow


def rope(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., n, head_dim], cos_sin [n, rope_dim] (cos, sin alternating) -> like x."""
    wide = x.to(compute_dtype(x.dtype))
    rope_dim = cos_sin.shape[-1]
    half = rope_dim // 2
    table = cos_sin.to(wide.dtype)
    cos, sin = table[:, 0::2], table[:, 1::2]
    turned, rest = wide[..., :rope_dim], wide[..., rope_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((y, rest), dim=-1).to(x.dtype)


def rope_backward(grad: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """The gradient of x: the same turn by the opposite angle (a rotation's transpose is its inverse)."""
    signs = torch.ones_like(cos_sin)
    signs[:, 1::2] = -1
    return rope(grad, cos_sin * signs, interleaved)
