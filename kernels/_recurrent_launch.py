"""How the kernels of lstm, gru and rnn are launched: the product with the last state, tiles, which sequences run in one
kernel, sums over the steps, cases to compile. Names and shapes: fastdl/reference/_recurrent.py.

Test: pytest tests/test_recurrent_triton.py
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ._common import Case, capability, case, on
from .configs import Config, block_for, blocks, config
from .norm_backward import partials

# KiB of shared memory that a program may have, by architecture. Turing: Triton has no tensor core products for it.
SHARED = {75: 0, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
COLUMNS = 256  # the widest tile where programs share a row: more of them for few and wide rows


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
