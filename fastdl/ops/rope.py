"""Rotary position embedding: contract of the room `rope`.

    y_a = x_a cos(p f) - x_b sin(p f),    y_b = x_b cos(p f) + x_a sin(p f)   pair (a, b), position p

| back end | status |
| --- | --- |
| torch | the reference, differentiable twice, any device |
| cpu, cuda, triton | none of their own yet: on the CPU the rotation runs inside `decoder_blocks` |

Test: pytest tests/test_rope.py
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .. import backend as backends
from ..reference import rope as reference

backends.register_room("rope", {})
PAIRS = ("interleaved", "half")
SCALINGS = ("none", "linear", "yarn")


def rope_table(
    head_dim: int,
    base: float,
    max_len: int,
    *,
    scaling: str = "none",
    factor: float = 1.0,
    original_context: int | None = None,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    attention_factor: float | None = None,
    factors: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """Cosines and sines of every position and pair, built in float64 and rounded once.

    Pair i turns by ``f[i] = base ** (-2 i / head_dim)`` radians a position, after scaling:

    - "none": as it is;  "linear": f / factor (position interpolation);
    - "yarn": f / factor for pairs that turn fewer than `beta_slow` times in `original_context` positions, f for those
      that turn at least `beta_fast` times, a ramp between; cos and sin are multiplied by `attention_factor` (None: 0.1
      ln(factor) + 1).

    Parameters
    ----------
    head_dim: how many elements of a head are turned (even; GGUF's rope.dimension_count).
    base: > 1, e.g. 10000.
    max_len: number of positions.
    scaling, factor, original_context, beta_fast, beta_slow, attention_factor: see above.
    factors: [head_dim / 2], divides f pair by pair (the tensor rope_freqs.weight of Llama 3's files).
    start: the first position.

    Returns
    -------
    float32 [max_len, head_dim]: row p is cos, sin of pair 0, cos, sin of pair 1, ... at position start + p.

    Raises
    ------
    ValueError: head_dim odd, base, max_len or factor out of range, unknown scaling, yarn without original_context.

    Source: Su et al., "RoFormer" (2021); Chen et al. (linear, 2023); Peng et al., "YaRN" (2023).

    Example
    -------
    >>> from fastdl import ops
    >>> ops.rope_table(4, 10000.0, 2)
    tensor([[1.0000, 0.0000, 1.0000, 0.0000],
            [0.5403, 0.8415, 0.9999, 0.0100]])
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim: expected an even number of at least 2, got {head_dim}")
    if not (base > 1 and math.isfinite(base)):
        raise ValueError(f"base: expected a finite number > 1, got {base}")
    if max_len < 0 or start < 0:
        raise ValueError(f"max_len, start: expected numbers >= 0, got {max_len} and {start}")
    if not (factor > 0 and math.isfinite(factor)):
        raise ValueError(f"factor: expected a finite number > 0, got {factor}")
    magnitude = 1.0
    if scaling == "none":
        f = reference.frequencies(head_dim, base)
    elif scaling == "linear":
        f = reference.frequencies(head_dim, base) / factor
    elif scaling == "yarn":
        if not original_context or original_context < 1:
            raise ValueError(
                f"original_context: yarn needs the length the model was trained with, got {original_context}"
            )
        f = reference.yarn_frequencies(head_dim, base, factor, original_context, beta_fast, beta_slow)
        magnitude = attention_factor if attention_factor is not None else 0.1 * math.log(max(factor, 1.0)) + 1.0
    else:
        raise ValueError(f"scaling: expected one of {', '.join(SCALINGS)}, got {scaling!r}")
    if factors is not None:
        if factors.shape != f.shape:
            raise ValueError(f"factors: expected shape ({head_dim // 2},), got {tuple(factors.shape)}")
        f = f / factors.to(torch.float64)
    angles = np.arange(start, start + max_len, dtype=np.float64)[:, None] * f.numpy()
    table = np.empty((max_len, head_dim // 2, 2), np.float32)
    table[:, :, 0] = np.cos(angles) * magnitude
    table[:, :, 1] = np.sin(angles) * magnitude
    return torch.from_numpy(table.reshape(max_len, head_dim))


def rope(
    x: Tensor,
    cos_sin: Tensor,
    *,
    pairs: str = "interleaved",
    positions: Tensor | int = 0,
    backend: str | None = None,
) -> Tensor:
    """Turn the pairs of each head by the angles of its position.

    Parameters
    ----------
    x: floating point, [..., n, head_dim]: n consecutive tokens (heads before them).
    cos_sin: float, [max_len, rope_dim] from `rope_table`; rope_dim <= head_dim, the elements behind it pass through.
    pairs: "interleaved" (2i, 2i+1: GGUF's llama) or "half" (i, i + rope_dim/2: GPT-NeoX, Hugging Face, qwen2).
    positions: the first position (int), or int64 [n], one for each token.
    backend: "torch", or None for the automatic choice.

    Returns
    -------
    Tensor like x; float32 inside, float64 for float64.

    Raises
    ------
    TypeError, ValueError: dtypes, shapes or devices that do not fit, positions outside the table.
    fastdl.BackendError: a back end without this room is asked for.

    Example
    -------
    >>> import torch
    >>> from fastdl import ops
    >>> ops.rope(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), ops.rope_table(4, 10000.0, 8), positions=1)
    tensor([[0.5403, 0.8415, 0.9999, 0.0100]])
    """
    if not x.is_floating_point() or not cos_sin.is_floating_point():
        raise TypeError(f"x, cos_sin: expected floating point tensors, got {x.dtype} and {cos_sin.dtype}")
    if pairs not in PAIRS:
        raise ValueError(f"pairs: expected one of {', '.join(PAIRS)}, got {pairs!r}")
    if x.dim() < 2 or cos_sin.dim() != 2 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos_sin: expected [max_len, rope_dim], rope_dim even and at most head_dim, for x [..., n, head_dim]; "
            f"got {tuple(cos_sin.shape)} for {tuple(x.shape)}"
        )
    if cos_sin.device != x.device:
        raise ValueError(f"cos_sin: expected the device of x, {x.device}, got {cos_sin.device}")
    backends.choose("rope", backend, device=x.device, dtype=x.dtype)
    return reference.rope(x, _rows(cos_sin, positions, x.shape[-2]), pairs == "interleaved")


def _rows(cos_sin: Tensor, positions: Tensor | int, n: int) -> Tensor:
    """[n, rope_dim]: the table's rows for n tokens."""
    length = cos_sin.shape[0]
    if isinstance(positions, int):
        if positions < 0 or positions + n > length:
            raise ValueError(
                f"positions: {positions} .. {positions + n - 1} do not lie in the table's 0 .. {length - 1}"
            )
        return cos_sin[positions : positions + n]
    if positions.dtype != torch.int64 or positions.shape != (n,):
        raise ValueError(f"positions: expected an int or int64 [{n}], got {positions.dtype} {tuple(positions.shape)}")
    if positions.device != cos_sin.device:
        raise ValueError(f"positions: expected the device of cos_sin, {cos_sin.device}, got {positions.device}")
    if n and positions.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(t) for t in torch.aminmax(positions))
        if low < 0 or high >= length:
            raise ValueError(f"positions: {low} .. {high} do not lie in the table's 0 .. {length - 1}")
    return cos_sin[positions]
