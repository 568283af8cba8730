"""Room position in Triton (contract: fastdl/ops/position.py; meaning: fastdl/reference/position.py).

    y = dropout(scale * x + table[position]);   dx = scale * mask * grad;   dtable[p] = sum of mask * grad at position p

Forward: a program keeps a tile of table rows in registers and walks over the rows of x that they are added to.
Backward: a program takes one position and some columns, reads grad of its tokens once for dx and dtable, and adds in an
order that the shape alone decides. An entry is a token with a position of its own; `inner` rows of x share it. Floor:
one read and one write of x over the bandwidth.

Test: pytest tests/test_position.py, make triton-compile        Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, as_rows, capability, case, dropout, dropout_scale, on, processors
from .configs import block_for, blocks, config

__all__ = ["compile_cases", "position_backward", "position_forward"]


@triton.jit
def forward(
    x, table, positions, seed, y, n, entries, inner, cols, x_stride, start, table_len, p, keep, scale,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Without a table y is mask * scale * x. Grid: (tiles of entries, parts of inner, tiles of columns)."""
    entry = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    col = (tl.program_id(2).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (entry < entries) & (col < cols)
    added = tl.zeros([ROWS, BLOCK], tl.float32)
    if table is not None:
        position = start + entry
        if positions is not None:
            position = tl.load(positions + entry, mask=entry < entries, other=0)
            position = tl.minimum(tl.maximum(position, 0), table_len - 1)
        added = tl.load(table + position * cols + col, mask=mask, other=0.0).to(tl.float32)
    part, parts = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    for j in range(inner * part // parts, inner * (part + 1) // parts):
        row = (entry // n * inner + j) * n + entry % n
        tile = tl.load(x + row * x_stride + col, mask=mask, other=0.0).to(tl.float32) * scale + added
        if seed is not None:
            tile = dropout(tile, tl.load(seed), row * cols + col, p, keep)
        tl.store(y + row * cols + col, tile.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward(
    grad, order, begin, seed, dx, dtable, n, entries, inner, cols, x_stride, start, p, keep, scale,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Grid: (rows of the table, tiles of columns)."""
    position = tl.program_id(0).to(tl.int64)
    col = (tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK))[None, :]
    first = position - start
    count = tl.where((first >= 0) & (first < n), inner, 0).to(tl.int64)
    if order is not None:
        first = tl.minimum(tl.maximum(tl.load(begin + position), 0), entries)
        last = tl.minimum(tl.maximum(tl.load(begin + position + 1), 0), entries)
        count = (last - first) * inner
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(0, count, ROWS):
        at = (k + tl.arange(0, ROWS))[:, None]
        inside = at < count
        mask = inside & (col < cols)
        entry = first + at // inner
        if order is not None:
            entry = tl.load(order + entry, mask=inside, other=0)
            entry = tl.minimum(tl.maximum(entry, 0), entries - 1)
        row = (entry // n * inner + at % inner) * n + entry % n
        tile = tl.load(grad + row * x_stride + col, mask=mask, other=0.0).to(tl.float32)
        if seed is not None:
            tile = dropout(tile, tl.load(seed), row * cols + col, p, keep)
        total += tile
        if dx is not None:
            tl.store(dx + row * cols + col, (tile * scale).to(dx.dtype.element_ty), mask=mask)
    tl.store(dtable + position * cols + col, tl.sum(total, 0)[None, :], mask=col < cols)


def _entries(x: Tensor, positions: Tensor | None) -> tuple[int, int, int]:
    """n, entries, inner: tokens of a sequence, tokens with a position of their own, rows of x that share each."""
    n = x.shape[-2]
    entries = n if positions is None or positions.dim() == 1 else positions.numel()
    return n, entries, x.shape[:-1].numel() // entries


def _tile(kernel: str, x: Tensor) -> tuple[int, Any]:
    block = block_for(kernel, x.shape[-1]) or blocks(kernel)[-1]
    return block, config(kernel, capability(x.device), block)


def _forward(x, table, positions, start, seed, p, scale, table_len) -> Tensor:
    """With a table y, without one dx."""
    y = x.new_empty(x.shape)
    if x.numel() == 0:
        return y
    (n, entries, inner), cols = _entries(x, positions), x.shape[-1]
    x, x_stride = as_rows(x)
    positions = None if positions is None else positions.contiguous()
    block, c = _tile("position_forward", x)
    tiles, columns = triton.cdiv(entries, c.rows), triton.cdiv(cols, block)
    parts = min(inner, 65535, triton.cdiv(processors(x.device) * c.programs, tiles * columns))
    with on(x.device):
        forward[(tiles, parts, columns)](
            x, table, positions, seed, y, n, entries, inner, cols, x_stride, start, table_len, p, dropout_scale(p),
            scale, BLOCK=block, ROWS=c.rows, **c.options,
        )  # fmt: skip
    return y


def position_forward(x, table, positions, start, seed, p, scale) -> Tensor:
    """Arguments and result: fastdl/reference/position.py."""
    return _forward(x, table.contiguous(), positions, start, seed, p, scale, table.shape[0])


def position_backward(
    grad, positions, order, begin, start, seed, p, scale, table_len, need_x, need_table
) -> tuple[Tensor, Tensor]:
    """Arguments and results: fastdl/reference/position.py."""
    none, cols = grad.new_empty(0), grad.shape[-1]
    if not need_table:
        dx = _forward(grad, None, positions, start, seed, p, scale, table_len) if need_x else none
        return dx, none.to(torch.float32, copy=True)
    dx = grad.new_empty(grad.shape) if need_x else none
    dtable = grad.new_empty((table_len, cols), dtype=torch.float32)
    if grad.numel() == 0:
        return dx, dtable.zero_()
    n, entries, inner = _entries(grad, positions)
    grad, stride = as_rows(grad)
    block, c = _tile("position_backward", grad)
    with on(grad.device):
        backward[(table_len, triton.cdiv(cols, block))](
            grad, order, begin, seed, dx if need_x else None, dtable, n, entries, inner, cols, stride, start, p,
            dropout_scale(p), scale, BLOCK=block, ROWS=c.rows, **c.options,
        )  # fmt: skip
    return dx, dtable


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: every kernel and tile with every option, and once without."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    types = dict.fromkeys(("x", "y", "grad", "dx"), dtype) | dict.fromkeys(("table", "dtable"), "*fp32")
    types |= dict.fromkeys(("positions", "order", "begin", "seed"), "*i64")
    types |= dict.fromkeys(("n", "entries", "inner", "cols", "x_stride", "start", "table_len"), "i32")
    types |= dict.fromkeys(("p", "keep", "scale"), "fp32")
    bare: dict[str, Any] = dict.fromkeys(("table", "positions", "order", "begin", "seed", "dx"))
    for kernel in (forward, backward):
        name = f"position_{kernel.__name__}"
        for block in blocks(name):
            yield case(name, kernel, types, block, config(name, cc, block))
        yield case(name, kernel, types, block, config(name, cc, block), bare, "bare")
