"""What the rooms rope and position check of positions: an int, or one number a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ._masks import values_are_known


def check_positions(positions: Tensor | int, table: Tensor, n: int, batches: list[int]) -> tuple[int, Tensor | None]:
    """The first position and None, or 0 and the positions as ops take them.

    table    [max_len, ...]: positions are its rows
    n        number of tokens
    batches  sizes of the dimensions that the batch of positions [batch, n] stands for; empty: there is none
    """
    length = table.shape[0]
    if isinstance(positions, (int, torch.SymInt)):
        if positions < 0 or positions + n > length:
            raise ValueError(
                f"positions: {positions} .. {positions + n - 1} do not lie in the table's 0 .. {length - 1}"
            )
        return positions, None
    shapes = [(n,)] + [(batch, n) for batch in batches[:1]]
    if not isinstance(positions, Tensor) or positions.dtype != torch.int64:
        got = positions.dtype if isinstance(positions, Tensor) else type(positions).__name__
        raise TypeError(f"positions: expected an int or an int64 tensor, got {got}")
    if tuple(positions.shape) not in shapes or (positions.dim() == 2 and len(set(batches)) > 1):
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(f"positions: expected an int or int64 {expected}, got {list(positions.shape)}")
    if positions.device != table.device:
        raise ValueError(f"positions: expected the device of the table, {table.device}, got {positions.device}")
    if positions.numel() and length == 0:
        raise ValueError("positions: the table has no rows")
    if positions.numel() and values_are_known(positions):
        low, high = (int(t) for t in torch.aminmax(positions))
        if low < 0 or high >= length:
            raise ValueError(f"positions: {low} .. {high} do not lie in the table's 0 .. {length - 1}")
    return 0, positions
