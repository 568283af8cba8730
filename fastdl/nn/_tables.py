"""A table of positions that grows on demand, for the modules of rooms rope and position."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._library import is_compiling


class GrowingTable:
    """float32 [rows, ...] from ``make(rows)``, on the device where it was asked for last.

    A plain attribute of its module, not a buffer: it stays float32 when the module is cast, and out of the state_dict.
    """

    def __init__(self, make: Callable[[int], Tensor], rows: int) -> None:
        self.make, self.rows, self.table = make, rows, None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"table": None}

    def on(self, device: torch.device, rows: int) -> Tensor:
        """The table with at least ``rows`` rows; a longer one is made for the next power of two."""
        if self.table is None or rows > self.rows:
            if is_compiling():
                raise RuntimeError(
                    f"a table of {self.rows if self.table is not None else 0} rows for {rows}: inside torch.compile it "
                    "cannot grow; call reserve(rows, device) of the module before"
                )
            if rows > self.rows:
                self.rows = 1 << (rows - 1).bit_length()
            self.table = self.make(self.rows)
        if self.table.device != device:
            table = self.table.to(device)
            if is_compiling():
                return table
            self.table = table
        return self.table


def rows_needed(positions: Tensor | int, n: int, rows: int) -> int:
    """How many rows a call needs: known for an int and for a tensor on the CPU; else those that there are."""
    if not isinstance(positions, Tensor):
        if not isinstance(positions, (int, torch.SymInt)):
            raise TypeError(f"positions: expected an int or an int64 tensor, got {type(positions).__name__}")
        return positions + n
    if positions.device.type != "cpu" or is_compiling() or not positions.numel():
        return rows
    return int(positions.max()) + 1
