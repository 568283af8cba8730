"""Rotary position embedding in plain PyTorch: the meaning of the op, and the frequencies of its table.

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


def ntk_base(rope_dim: int, base: float, stretch: float) -> float:
    """The base with which the slowest pair turns `stretch` times more slowly, the fastest as fast as before."""
    return base * stretch ** (rope_dim / (rope_dim - 2))


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


def llama3_factors(
    rope_dim: int, base: float, factor: float, original_context: float, low_freq_factor: float, high_freq_factor: float
) -> Tensor:
    """float64 [rope_dim / 2], what Llama 3 divides each frequency by.

    Wavelengths shorter than original_context / high_freq_factor stay, those longer than original_context /
    low_freq_factor are stretched by ``factor``, those between are interpolated.
    """
    wavelength = 2 * math.pi / frequencies(rope_dim, base).numpy()
    smooth = (original_context / wavelength - low_freq_factor) / (high_freq_factor - low_freq_factor)
    smooth = np.clip(smooth, 0.0, 1.0)
    return torch.from_numpy(1.0 / ((1.0 - smooth) / factor + smooth))


def memory_order(x: Tensor) -> list[int]:
    """The dimensions of x from the outermost in memory to the innermost, where the elements of a head lie side by side
    and no memory is shared; else as they are numbered."""
    sizes, strides, dims = x.shape, x.stride(), x.dim()
    if (strides[-1] != 1 and sizes[-1] != 1) or any(
        stride == 0 and size > 1 for size, stride in zip(sizes, strides, strict=True)
    ):
        return list(range(dims))
    return [*sorted(range(dims - 1), key=lambda d: -strides[d]), dims - 1]


def inverse(order: list[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def like(x: Tensor) -> Tensor:
    """Memory for a result: dense, in the order of x."""
    order = memory_order(x)
    return x.new_empty([x.shape[d] for d in order]).permute(inverse(order))


def table_rows(cos_sin: Tensor, positions: Tensor | None, start: int, n: int, dims: int) -> Tensor:
    """The table's rows for n tokens, clamped to the table: [n, rope_dim], or for positions [batch, n] what broadcasts
    to the `dims` dimensions of [batch, ..., n, rope_dim]."""
    if positions is None:
        return cos_sin[start : start + n]
    if not n:
        return cos_sin[:0]
    rows = cos_sin[positions.clamp(0, cos_sin.shape[0] - 1)]
    return rows if positions.dim() == 1 else rows.reshape(len(positions), *[1] * (dims - 3), n, cos_sin.shape[1])


def rope(x: Tensor, cos_sin: Tensor, interleaved: bool) -> Tensor:
    """x [..., n, head_dim], cos_sin [n, rope_dim] (cos, sin alternating) or what broadcasts -> like x."""
    wide = x.to(compute_dtype(x.dtype))
    rope_dim = cos_sin.shape[-1]
    half = rope_dim // 2
    table = cos_sin.to(wide.dtype)
    cos, sin = table[..., 0::2], table[..., 1::2]
    turned, rest = wide[..., :rope_dim], wide[..., rope_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
    else:
        a, b = turned[..., :half], turned[..., half:]
        y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
    return torch.cat((y, rest), dim=-1).to(x.dtype)


def opposite(cos_sin: Tensor) -> Tensor:
    """The table of the opposite angles. A rotation's transpose is its inverse: the gradient's turn."""
    signs = torch.ones_like(cos_sin)
    signs[..., 1::2] = -1
    return cos_sin * signs


def rope_turn(
    q: Tensor,
    k: Tensor | None,
    cos_sin: Tensor,
    positions: Tensor | None,
    start: int,
    interleaved: bool,
    backward: bool,
) -> tuple[Tensor, Tensor]:
    """q [..., n, head_dim], k the same or None, cos_sin [max_len, rope_dim], positions int64 [n] or [batch, n], or None
    for start, start + 1, ... -> q and k ([0] without one) turned, by the opposite angles if ``backward``, each in the
    order of its own memory."""

    def turned(x: Tensor) -> Tensor:
        rows = table_rows(cos_sin, positions, start, x.shape[-2], x.dim())
        y, order = rope(x, opposite(rows) if backward else rows, interleaved), memory_order(x)
        return y.permute(order).contiguous().permute(inverse(order))

    return turned(q), q.new_empty(0) if k is None else turned(k)
