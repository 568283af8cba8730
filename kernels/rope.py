"""Room rope in Triton (contract: fastdl/ops/rope.py; meaning: fastdl/reference/rope.py).

    y_a = x_a cos - x_b sin,   y_b = x_b cos + x_a sin          pair (a, b) of a head, angles of the row's position

A program takes a tile of positions and pairs, keeps its cosines and sines in registers and walks over heads. Floor: one
read of x and one write of y over the bandwidth.

Test: pytest tests/test_rope.py, make triton-compile        Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastdl.reference.rope import like

from ._common import Case, capability, case, on, processors
from .configs import block_for, blocks, config

__all__ = ["compile_cases", "rope_turn"]


@triton.jit
def turn(
    x, y, cos_sin, positions, n, heads, start, batch_stride, max_len, rope_dim, head_dim,
    x_batch, x_head, x_row, y_batch, y_head, y_row,
    INTERLEAVED: tl.constexpr, BACK: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """x, y [batch, heads, n, head_dim] with their distances. Grid: (tiles of positions x batch, parts of the heads)."""
    tiles, part, parts = tl.cdiv(n, ROWS), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    row = ((tl.program_id(0) % tiles).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    inside, half = row < n, rope_dim // 2
    if positions is None:
        position = tl.where(inside, start + row, 0)
    else:
        position = tl.load(positions + batch * batch_stride + row, mask=inside, other=0)
        position = tl.minimum(tl.maximum(position, 0), max_len - 1)
    x += batch * x_batch
    y += batch * y_batch
    head0, head1 = heads * part // parts, heads * (part + 1) // parts
    for first in range(0, half, BLOCK):
        i = first + tl.arange(0, BLOCK)[None, :]
        both = i[:, :, None] * 2 + tl.arange(0, 2)[None, None, :]
        mask, mask_both = inside & (i < half), inside[:, :, None] & (both < rope_dim)
        angles = tl.load(cos_sin + position[:, :, None] * rope_dim + both, mask=mask_both, other=0.0)
        c, s = tl.split(angles)
        if BACK:
            s = -s
        for head in range(head0, head1):
            if INTERLEAVED:
                pair = tl.load(x + head * x_head + row[:, :, None] * x_row + both, mask=mask_both, other=0.0)
                a, b = tl.split(pair.to(tl.float32))
                turned = tl.join(a * c - b * s, b * c + a * s).to(y.dtype.element_ty)
                tl.store(y + head * y_head + row[:, :, None] * y_row + both, turned, mask=mask_both)
            else:
                a_at = x + head * x_head + row * x_row + i
                a = tl.load(a_at, mask=mask, other=0.0).to(tl.float32)
                b = tl.load(a_at + half, mask=mask, other=0.0).to(tl.float32)
                y_at = y + head * y_head + row * y_row + i
                tl.store(y_at, (a * c - b * s).to(y.dtype.element_ty), mask=mask)
                tl.store(y_at + half, (b * c + a * s).to(y.dtype.element_ty), mask=mask)
    for first in range(rope_dim, head_dim, BLOCK):
        i = first + tl.arange(0, BLOCK)[None, :]
        mask = inside & (i < head_dim)
        for head in range(head0, head1):
            rest = tl.load(x + head * x_head + row * x_row + i, mask=mask)
            tl.store(y + head * y_head + row * y_row + i, rest, mask=mask)


def _pieces(x: Tensor, y: Tensor, by_batch: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """x and y as [batch, heads, n, head_dim], in several pieces where the dimensions of heads do not merge."""
    if x.dim() < 4:
        at = 1 if by_batch and x.dim() == 3 else 0
        yield from _pieces(x.unsqueeze(at), y.unsqueeze(at), by_batch)
    elif x.dim() == 4:
        yield x, y
    else:
        shape = (x.shape[0], -1, *x.shape[-2:])
        try:
            yield x.view(shape), y.view(shape)
        except RuntimeError:
            for piece in zip(x.unbind(1), y.unbind(1), strict=True):
                yield from _pieces(*piece, by_batch)


def _turn(
    x: Tensor, cos_sin: Tensor, positions: Tensor | None, start: int, interleaved: bool, backward: bool
) -> Tensor:
    y = like(x)
    if x.numel() == 0:
        return y
    if x.stride(-1) != 1 and x.shape[-1] != 1:
        x = x.contiguous()
    by_batch = positions is not None and positions.dim() == 2
    for piece, into in _pieces(x, y, by_batch):
        batch, heads, n, head_dim = piece.shape
        block = block_for("rope_turn", cos_sin.shape[1] // 2) or blocks("rope_turn")[-1]
        c = config("rope_turn", capability(x.device), block)
        tiles = triton.cdiv(n, c.rows) * batch
        parts = min(heads, 32768, triton.cdiv(processors(x.device) * c.programs, tiles))
        with on(x.device):
            turn[(tiles, parts)](
                piece, into, cos_sin, positions, n, heads, start, n if by_batch else 0, *cos_sin.shape, head_dim,
                *piece.stride()[:3], *into.stride()[:3], INTERLEAVED=interleaved, BACK=backward, BLOCK=block,
                ROWS=c.rows, **c.options,
            )  # fmt: skip
    return y


def rope_turn(q, k, cos_sin, positions, start, interleaved, backward) -> tuple[Tensor, Tensor]:
    """Arguments and results: fastdl/reference/rope.py."""
    cos_sin = cos_sin.to(torch.float32).contiguous()
    positions = None if positions is None else positions.contiguous()
    rest = (cos_sin, positions, start, interleaved, backward)
    return _turn(q, *rest), q.new_empty(0) if k is None else _turn(k, *rest)


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: both pairings at every tile, with and without positions."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    types = {"x": dtype, "y": dtype, "cos_sin": "*fp32", "positions": "*i64"}
    sizes = ("n", "heads", "start", "batch_stride", "max_len", "rope_dim", "head_dim")
    types |= dict.fromkeys((*sizes, "x_batch", "x_head", "x_row", "y_batch", "y_head", "y_row"), "i32")
    for block in blocks("rope_turn"):
        c = config("rope_turn", cc, block)
        yield case("rope_turn", turn, types, block, c, {"INTERLEAVED": True, "BACK": False}, "interleaved")
        yield case("rope_turn", turn, types, block, c, {"INTERLEAVED": False, "BACK": True, "positions": None}, "half")
