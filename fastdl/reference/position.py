"""Absolute positions in plain PyTorch: tables, and the add of a table's rows, forward and backward by explicit formula.

    y = dropout(scale * x + table[position])
    dx = scale * mask * grad,    dtable[p] = sum over the tokens at position p of mask * grad

Vaswani et al., "Attention Is All You Need" (2017); ALiBi: Press et al. (2022).  Test: tests/test_position.py.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import philox
from .norm import compute_dtype
from .rope import table_rows


def sinusoidal_table(length: int, dim: int, base: float, start: int) -> Tensor:
    """float32 [length, dim]: sin at even and cos at odd columns, of angles in float64."""
    columns = np.arange(dim)
    f = float(base) ** (-(columns - columns % 2) / dim)
    angles = np.arange(start, start + length, dtype=np.float64)[:, None] * f
    table = np.where(columns % 2 == 0, np.sin(angles), np.cos(angles))
    return torch.from_numpy(table.astype(np.float32))


def alibi_slopes(heads: int) -> list[float]:
    """2^(-8 h / heads) for h = 1 .. heads where heads is a power of two; else those of the power of two below, and then
    every other one of the power above."""
    below = 1 << (heads.bit_length() - 1)

    def geometric(n: int) -> list[float]:
        return [2.0 ** (-8.0 * (h + 1) / n) for h in range(n)]

    return (geometric(below) + geometric(2 * below)[0::2])[:heads]


def position_forward(
    x: Tensor, table: Tensor, positions: Tensor | None, start: int, seed: Tensor | None, p: float, scale: float
) -> Tensor:
    """x [..., n, dim], table [max_len, dim], positions int64 [n] or [batch, n], or None for start, start + 1, ..., seed
    int64 [1] -> y like x, contiguous."""
    wide = compute_dtype(x.dtype)
    rows = table_rows(table, positions, start, x.shape[-2], x.dim())
    s = x.to(wide) * scale + rows.to(wide)
    if seed is not None:
        s = philox.dropout(s, seed, p)
    return s.to(x.dtype).contiguous()


def position_backward(
    grad: Tensor,
    positions: Tensor | None,
    order: Tensor | None,
    begin: Tensor | None,
    start: int,
    seed: Tensor | None,
    p: float,
    scale: float,
    table_len: int,
    need_x: bool,
    need_table: bool,
) -> tuple[Tensor, Tensor]:
    """grad [..., n, dim] -> dx like grad, dtable [table_len, dim] in the compute dtype; [0] where not needed.

    order and begin (`by_position`) are what kernels find the tokens of a position with.
    """
    d = grad.to(compute_dtype(grad.dtype))
    n, dim = grad.shape[-2:]
    if seed is not None:
        d = philox.dropout(d, seed, p)
    dx = (d * scale).to(grad.dtype).contiguous() if need_x else grad.new_empty(0)
    if not need_table:
        return dx, d.new_empty(0)
    # the tokens that share their positions
    shared = positions is None or positions.dim() == 1
    leading = (grad.shape[:-2].numel(),) if shared else (len(grad), grad.shape[1:-2].numel())
    d = d.reshape(*leading, n, dim).sum(-3)
    if positions is None:
        return dx, torch.nn.functional.pad(d, (0, 0, start, table_len - start - n))
    index = positions.clamp(0, table_len - 1).flatten()
    # index_put adds in the order of a sort, also on a GPU, where index_add does not
    return dx, d.new_zeros(table_len, dim).index_put((index,), d.reshape(len(index), dim), accumulate=True)


def by_position(positions: Tensor, table_len: int) -> tuple[Tensor, Tensor]:
    """Tokens sorted by their positions, those of one position in their own order: (order int64 [tokens], begin int64
    [table_len + 1]); position p has the tokens order[begin[p]:begin[p + 1]]."""
    ascending, order = positions.clamp(0, table_len - 1).flatten().sort(stable=True)
    return order, torch.searchsorted(ascending, torch.arange(table_len + 1, device=positions.device))
