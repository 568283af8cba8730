"""What the Triton kernels of lstm, gru and rnn share: the place of a program in a step, zoneout, layer norm over rows,
the product with the last state, tiles, sums over the steps. Names and shapes: fastdl/reference/_recurrent.py.

A step is two launches: torch's batched product of the last states of both directions with w_hh (torch.bmm, float32
sums), and one fused kernel of the room for all gates of both directions. Its programs are (block of batch rows,
direction, tile of columns); with layer norm, which needs whole rows, a program walks over all columns.

In the kernels d is the direction; row is int64 [ROWS, 1], the place in the batch; live [ROWS, 1], whether there is
such a row; t the time; state = row of [D, B]; at = row of [T, B, D]; col [1, BLOCK]; tiles are float32 [ROWS, BLOCK].

Test: pytest tests/test_recurrent_triton.py
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, capability, case, dropout, on
from .configs import Config, block_for, blocks, config
from .norm_backward import partials

# KiB of shared memory that a program may have, by architecture. Turing: Triton has no tensor core products for it.
SHARED = {75: 0, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
COLUMNS = 256  # the widest tile where programs share a row: more of them for few and wide rows


@triton.jit
def load(x, index, mask):
    return tl.load(x + index, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def store(x, index, value, mask):
    tl.store(x + index, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def place(step, count, batch, ROWS: tl.constexpr):
    """d, row, live, t, state, at: where program (block of rows, direction) is in the given step of its direction."""
    d = tl.program_id(1).to(tl.int64)
    row = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None]
    t = tl.where(d == 0, step, count - 1 - step).to(tl.int64)
    return d, row, row < batch, t, d * batch + row, (t * batch + row) * tl.num_programs(1) + d


@triton.jit
def running(lengths, row, live, t):
    """bool [ROWS, 1]: the rows whose sequence is not over at time t."""
    if lengths is None:
        return live
    else:
        return live & (tl.load(lengths + row, mask=live, other=0) > t)


@triton.jit
def zoned(seed, which: tl.constexpr, p, index):
    """How much of its old value an element keeps: p, or 0 or 1 where there is a seed. index: in [T, B, D, N]."""
    if seed is None:
        return p
    else:
        return 1.0 - dropout(1.0, tl.load(seed + which), index, p, 1.0)


@triton.jit
def normal(x, first, cols, live, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """mean and rstd [ROWS, 1] of the rows x[first .. first + cols]; first: int64 [ROWS, 1]."""
    lanes = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        total += load(x, first + col, live & (col < cols))
    mean = tl.sum(total, 1)[:, None] / cols
    squares = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        mask = live & (col < cols)
        apart = tl.where(mask, load(x, first + col, mask) - mean, 0.0)
        squares += apart * apart
    return mean, tl.rsqrt(tl.sum(squares, 1)[:, None] / cols + eps)


@triton.jit
def leave(
    new, h_in, h_mask, seed, y, h_out, operand, here, at, state, col, mask, size, zoneout_h, ZONE_H: tl.constexpr
):  # fmt: skip
    """h of the step from what the cell gives: y, the state, and what the next product takes, h * h_mask rounded."""
    h = load(h_in, state * size + col, mask)
    if ZONE_H:
        new = new + zoned(seed, 0, zoneout_h, at * size + col) * (h - new)
    h = tl.where(here, new, h)
    store(y, at * size + col, tl.where(here, h, 0.0), mask)
    store(h_out, state * size + col, h, mask)
    if h_mask is not None:
        h = h * load(h_mask, state * size + col, mask)
    store(operand, state * size + col, h, mask)


@triton.jit
def arrive(
    dy, through, direct, h_mask, seed, here, at, state, col, mask, size, zoneout_h, ZONE_H: tl.constexpr
):  # fmt: skip
    """The gradient of h of a step: what of it goes to the cell, and what stays with the h before.

    through: the gradient that came through the product of the step after; direct: what it left. What is over when it
    runs gave 0 to the product.
    """
    dh = load(through, state * size + col, mask)
    if h_mask is not None:
        dh = dh * load(h_mask, state * size + col, mask)
    dh = dh + load(direct, state * size + col, mask)
    if dy is not None:
        dh = dh + tl.where(here, load(dy, at * size + col, mask), 0.0)
    z = dh * 0.0
    if ZONE_H:
        z += zoned(seed, 0, zoneout_h, at * size + col)
    return (1.0 - z) * dh, tl.where(here, z * dh, dh)


@triton.jit
def accumulate(parts, index, tile, mask):
    """parts[index] += the sum of the tile's rows. A line of parts belongs to one program: no other one writes it."""
    tl.store(parts + index, tl.load(parts + index, mask=mask, other=0.0) + tl.sum(tile, 0)[None, :], mask=mask)


@triton.jit
def normal_backward(
    grad, u, weight, du, operand, parts, d, state, at, live, cols, eps, BLOCK: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """The gradient of u [T, B, D, cols] from that of LN(u) * weight, grad [D, B, cols] float32, which the program has
    written: du, the same as the operand [D, B, cols] of the next product, and the sum for weight in parts."""
    tl.debug_barrier()  # threads may read what others of the program have written
    mean, rstd = normal(u, at * cols, cols, live, eps, BLOCK, ROWS)
    lanes = tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    products = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, cols, BLOCK):
        col = start + lanes
        mask = live & (col < cols)
        g = load(grad, state * cols + col, mask) * load(weight, d * cols + col, mask)
        total += g
        products += g * (load(u, at * cols + col, mask) - mean)
    mean_g = tl.sum(total, 1)[:, None] / cols
    mean_gh = tl.sum(products, 1)[:, None] / cols * rstd
    line = (tl.program_id(0) * tl.num_programs(1) + d) * cols
    for start in range(0, cols, BLOCK):
        col = start + lanes
        mask = live & (col < cols)
        g = load(grad, state * cols + col, mask)
        hat = (load(u, at * cols + col, mask) - mean) * rstd
        accumulate(parts, line + col, g * hat, col < cols)
        tile = rstd * (g * load(weight, d * cols + col, mask) - mean_g - hat * mean_gh)
        store(du, at * cols + col, tile, mask)
        store(operand, state * cols + col, tile, mask)


# ---- Whole sequences ------------------------------------------------------------------------------------------------
# A program runs all steps of a block of rows of one direction, and w_hh of all gates stays on the multiprocessor.
# 16 bits: 16 rows, which tensor cores take at least; w_hh in shared memory, where Triton moves a product's operand that
# is the same in every step. float32: one row, w_hh in registers, multiplied and summed in float32: three products of
# tensor cores ("tf32x3") missed the rule of tolerances on long sequences, and with "ieee" Triton 3.9 crashed.


@triton.jit
def weight_tile(w_hh, d, gate: tl.constexpr, gates: tl.constexpr, hidden, TURNED: tl.constexpr, BLOCK: tl.constexpr):
    """w_hh [D, gates * H, H] of one gate, zeros around it: [BLOCK outputs, BLOCK inputs], or turned."""
    one, other = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    first = (d * gates + gate) * hidden * hidden
    at = one + other * hidden if TURNED else one * hidden + other
    return tl.load(w_hh + first + at, mask=(one < hidden) & (other < hidden), other=0.0)


@triton.jit
def product(a, w, plus):
    """float32 a [ROWS, K], rounded to the dtype of w [K, N]: float32 plus + a w [ROWS, N]; ROWS = 1 in float32."""
    if w.dtype == tl.float32:
        return plus + tl.sum(tl.trans(a) * w, 0)[None, :]
    else:
        return tl.dot(a.to(w.dtype), w, plus)


# ---- Launchers ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def quiet(device: torch.device) -> Iterator[None]:
    """On the tensors' device, and products in the dtypes that they are given in."""
    with on(device), torch.autocast(device.type, enabled=False):
        yield


class Tiling(NamedTuple):
    """How a step's kernel is launched. span: columns of a program; parts: blocks of rows, each with its own sums."""

    grid: tuple[int, int, int]
    block: int
    span: int
    config: Config

    @property
    def parts(self) -> int:
        return self.grid[0]

    @property
    def options(self) -> dict[str, int | bool]:
        return {"BLOCK": self.block, "ROWS": self.config.rows, **self.config.options}


def tiling(kernel: str, device: torch.device, batch: int, directions: int, cols: int, whole: bool) -> Tiling:
    """whole: a program sees whole rows."""
    block = block_for(kernel, cols) or blocks(kernel)[-1]
    if not whole:
        block = min(block, COLUMNS)
    c = config(kernel, capability(device), block)
    span = triton.cdiv(cols, block) * block if whole else block
    return Tiling((triton.cdiv(batch, c.rows), directions, triton.cdiv(cols, span)), block, span, c)


def sequence_table(kernel: str, dtype: torch.dtype) -> str:
    """The entry of kernels/configs.py for a kernel that runs whole sequences."""
    return f"{kernel}_float32" if dtype == torch.float32 else kernel


def sequence_fits(table: str, cc: int | None, block: int, gates: int, dtype: torch.dtype) -> bool:
    """Whether the weights of all gates stay on a multiprocessor. float32: in registers, up to the table's widest tile.
    16 bits: in shared memory beside the operands; interpreted, in the largest there is."""
    if dtype == torch.float32:
        return True
    known = [size for first, size in SHARED.items() if cc is not None and first <= cc] or [max(SHARED.values())]
    rows = config(table, cc, block).rows
    return (gates * block * block + (gates + 1) * rows * block) * dtype.itemsize <= known[-1] * 1024


def sequence_block(kernel: str, device: torch.device, gates: int, hidden: int, dtype: torch.dtype) -> int | None:
    """The tile of a kernel that runs whole sequences; None where the step loop has to: a function of shape, dtype and
    the GPU's architecture."""
    table = sequence_table(kernel, dtype)
    block = block_for(table, hidden)
    return block if block is not None and sequence_fits(table, capability(device), block, gates, dtype) else None


def sequence_config(kernel: str, device: torch.device, block: int, dtype: torch.dtype) -> Config:
    return config(sequence_table(kernel, dtype), capability(device), block)


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def multiplier(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """weight [D, K, N] -> a function of a [D, B, K] in the dtype of weight that gives a @ weight [D, B, N] float32."""
    if weight.dtype == torch.float32:
        return lambda a: torch.bmm(a, weight)
    if weight.is_cuda:
        return lambda a: torch.bmm(a, weight, out_dtype=torch.float32)
    wide = weight.float()  # torch.bmm has float32 results of narrower operands on GPUs alone
    return lambda a: torch.bmm(a.float(), wide)


def first_operand(h0: Tensor, h_mask: Tensor | None, weight: Tensor) -> Tensor:
    """What the first product takes, [D, B, P] in the dtype of weight."""
    return (h0 if h_mask is None else h0 * h_mask).to(weight.dtype, copy=True)


def first_gradients(*grads: tuple[Tensor | None, tuple[int, ...]], like: Tensor) -> list[Tensor]:
    """The gradients of the last states, zeros where there is none."""
    return [
        like.new_zeros(shape, dtype=torch.float32) if grad is None else grad.to(torch.float32).contiguous()
        for grad, shape in grads
    ]


def zero_parts(like: Tensor, wanted: Tensor | None, tile: Tiling) -> Tensor | None:
    """Where a kernel keeps the sums for the gradient of ``wanted``, a line for each block of rows."""
    return None if wanted is None else like.new_zeros(tile.parts, *wanted.shape, dtype=torch.float32)


def refuse_double_backward(**grads: Tensor | None) -> None:
    for name, grad in grads.items():
        if grad is not None:
            raise RuntimeError(f"fastdl: {name}: only a double backward gives it, which the torch twin computes")


def two(like: Tensor) -> list[Tensor]:
    """Memory for a state that is read by a step while the new one is written."""
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for _ in range(2)]


def sums(like: Tensor, *parts: Tensor | None) -> list[Tensor]:
    """parts float32 [programs, ...] -> [...], always added in the same order; None -> [0], where ``like`` lives."""
    found: list[Tensor] = []
    for part in parts:
        if part is None:
            found.append(like.new_empty(0, dtype=torch.float32))
            continue
        total, cols = part.new_empty(part.shape[1:]), math.prod(part.shape[1:])
        tile = blocks("norm_partials")[-1]
        c = config("norm_partials", capability(part.device), tile)
        grid = (triton.cdiv(cols, tile),)
        partials[grid](part, None, total, None, part.shape[0], cols, BLOCK=tile, ROWS=c.rows, **c.options)
        found.append(total)
    return found


_NARROW = "gates_x y gates cells gates_out cells_out operand w_hh m dy u_all da du out"
_TYPES = dict.fromkeys(_NARROW.split(), "narrow") | {"lengths": "*i64", "seed": "*i64"}
_TYPES |= dict.fromkeys(("time", "count", "batch", "hidden", "size", "span"), "i32")
_TYPES |= dict.fromkeys(("zoneout_h", "zoneout_c", "eps"), "fp32")


def room_cases(
    room: str,
    cc: int,
    gates: int,
    kernels: Sequence[Any],
    options: Sequence[Mapping[str, Any]],
) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for a room: every kernel and tile with every option on, and the narrowest
    tile with others; those that hold w_hh in float32 too, where it fits.

    options  what is constant in each set: tensors that are None, switches. BARE: all that may be 1 is. NOTE: its name
    """
    half = torch.float16 if cc < 80 else torch.bfloat16
    for kernel in kernels:
        sequences = "w_hh" in kernel.arg_names
        for dtype in (half, torch.float32)[: 1 + sequences]:
            name = f"{room}_{kernel.__name__}"
            name = sequence_table(name, dtype) if sequences else name
            narrow = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32"}[dtype]
            found = {key: _TYPES.get(key, "*fp32") for key in kernel.arg_names}
            found = {key: narrow if kind == "narrow" else kind for key, kind in found.items()}
            ones = {key: 1 for key, kind in found.items() if kind == "i32" and key != "time"}
            for block in blocks(name):
                if sequences and not sequence_fits(name, cc, block, gates, dtype):
                    continue
                seen: list[dict[str, Any]] = []
                for constants in options[:1] if block != blocks(name)[0] else options:
                    constants = {**constants, **(ones if constants.get("BARE") else {})}
                    note = str(constants.get("NOTE", ""))
                    one = case(name, kernel, found, block, config(name, cc, block), constants, note)
                    if one.constexprs not in seen:
                        seen.append(one.constexprs)
                        yield one
