"""The table of room rope: cosines and sines of every position and pair, in every scaling of the frequencies."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ..reference import rope as reference
from ._checks import check_finite, check_int, check_optional

SCALINGS = ("none", "linear", "ntk", "dynamic", "yarn", "llama3")


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
    length: int | None = None,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
) -> Tensor:
    """Cosines and sines of every position and pair, built in float64 and rounded once.

    Pair i turns by ``f[i] = base ** (-2 i / head_dim)`` radians a position, after scaling:

    - "none": as it is;  "linear": f / factor (position interpolation);
    - "ntk": f of the base ``base * factor ** (head_dim / (head_dim - 2))``: the slowest pair turns `factor` times more
      slowly, the fastest as before;
    - "dynamic": the same with ``factor * length / original_context - (factor - 1)`` for the factor where `length` is
      over `original_context`, else f. The table then holds for sequences of that length alone;
    - "yarn": f / factor for pairs that turn fewer than `beta_slow` times in `original_context` positions, f for those
      that turn at least `beta_fast` times, a ramp between; cos and sin are multiplied by `attention_factor` (None: 0.1
      ln(factor) + 1);
    - "llama3": f / factor for wavelengths over original_context / low_freq_factor, f for those under original_context /
      high_freq_factor, interpolated between.

    Parameters
    ----------
    head_dim: how many elements of a head are turned (even; GGUF's rope.dimension_count).
    base: > 1, e.g. 10000.
    max_len: number of positions.
    scaling, factor, original_context, beta_fast, beta_slow, attention_factor, low_freq_factor, high_freq_factor: see
        above; original_context is the length that the model was trained with.
    factors: [head_dim / 2], divides f pair by pair (the tensor rope_freqs.weight of Llama 3's files).
    start: the first position.
    length: of the whole sequence, for "dynamic"; None: start + max_len.

    Returns
    -------
    float32 [max_len, head_dim]: row p is cos, sin of pair 0, cos, sin of pair 1, ... at position start + p.

    Raises
    ------
    ValueError: head_dim odd, base, max_len or factor out of range, unknown scaling, original_context missing.

    Source: Su et al., "RoFormer" (2021); Chen et al. (linear, 2023); Peng et al., "YaRN" (2023), which has the two NTK
    rules; Grattafiori et al., "The Llama 3 Herd of Models" (2024).

    Example
    -------
    >>> from fastdl import ops
    >>> ops.rope_table(4, 10000.0, 2)
    tensor([[1.0000, 0.0000, 1.0000, 0.0000],
            [0.5403, 0.8415, 0.9999, 0.0100]])
    """
    check_int("head_dim", head_dim, 2)
    check_int("max_len", max_len, 0)
    check_int("start", start, 0)
    for name, value in (("base", base), ("factor", factor), ("beta_fast", beta_fast), ("beta_slow", beta_slow),
                        ("low_freq_factor", low_freq_factor), ("high_freq_factor", high_freq_factor)):  # fmt: skip
        check_finite(name, value)
    for name, value in (("original_context", original_context), ("length", length)):
        if value is not None:
            check_finite(name, value)
    if attention_factor is not None:
        check_finite("attention_factor", attention_factor)
    if head_dim % 2:
        raise ValueError(f"head_dim: expected an even number of at least 2, got {head_dim}")
    if not base > 1:
        raise ValueError(f"base: expected a finite number > 1, got {base}")
    if not factor > 0:
        raise ValueError(f"factor: expected a finite number > 0, got {factor}")
    if scaling not in SCALINGS:
        raise ValueError(f"scaling: expected one of {', '.join(SCALINGS)}, got {scaling!r}")
    if scaling in ("dynamic", "yarn", "llama3") and (not original_context or original_context < 1):
        raise ValueError(
            f"original_context: {scaling} needs the length the model was trained with, got {original_context}"
        )
    magnitude = 1.0
    if scaling == "yarn":
        if not 0 < beta_slow <= beta_fast:
            raise ValueError(f"beta_fast, beta_slow: expected 0 < slow <= fast, got {beta_fast} and {beta_slow}")
        f = reference.yarn_frequencies(head_dim, base, factor, original_context, beta_fast, beta_slow)
        magnitude = attention_factor if attention_factor is not None else 0.1 * math.log(max(factor, 1.0)) + 1.0
    elif scaling in ("ntk", "dynamic"):
        if scaling == "dynamic":
            if length is not None and length < 0:
                raise ValueError(f"length: expected a number >= 0, got {length}")
            whole = start + max_len if length is None else length
            factor = factor * max(whole, original_context) / original_context - (factor - 1)
        if head_dim == 2:
            raise ValueError(
                f"head_dim: {scaling} needs at least 4, because one pair has no other to differ from; got 2"
            )
        f = reference.frequencies(head_dim, reference.ntk_base(head_dim, base, factor))
    else:
        f = reference.frequencies(head_dim, base)
        if scaling == "linear":
            f = f / factor
        elif scaling == "llama3":
            if not 0 < low_freq_factor < high_freq_factor:
                raise ValueError(
                    f"low_freq_factor, high_freq_factor: expected 0 < low < high, got {low_freq_factor} and "
                    f"{high_freq_factor}"
                )
            f = f / reference.llama3_factors(
                head_dim, base, factor, original_context, low_freq_factor, high_freq_factor
            )
    if factors is not None:
        check_optional("factors", factors)
        if factors.shape != f.shape:
            raise ValueError(f"factors: expected shape ({head_dim // 2},), got {tuple(factors.shape)}")
        if not bool((factors > 0).all()):
            raise ValueError(f"factors: expected numbers > 0, got {float(factors[~(factors > 0)][0])}")
        f = f / factors.to(torch.float64)
    angles = np.arange(start, start + max_len, dtype=np.float64)[:, None] * f.numpy()
    table = np.empty((max_len, head_dim // 2, 2), np.float32)
    table[:, :, 0] = np.cos(angles) * magnitude
    table[:, :, 1] = np.sin(angles) * magnitude
    return torch.from_numpy(table.reshape(max_len, head_dim))
