"""Room position: tables of absolute positions, and their add to embeddings with scale and dropout in one pass.

    y = dropout(scale * x + table[position])              the embedding's scale is sqrt(dim) in Vaswani et al.
    dx = scale * mask * grad,   dtable[p] = sum over the tokens at position p of mask * grad

float32 inside, rounded once. The gradient of a learned table is added up in a fixed order: the tokens of a position are
found by a stable sort (torch's, of the positions alone) and one kernel reads grad once for dx and dtable. Both
gradients are linear in grad, and their own gradient is the forward op: differentiable any number of times.

Back ends: cpu (csrc/cpu/position*.cpp), cuda (csrc/cuda/position*), triton (kernels/position.py), torch
(fastdl/reference/position.py). What they refuse:

    | back end          | refuses                | because                              |
    | cpu, cuda, triton | float64                | its kernels compute in float32       |
    | cpu, cuda, triton | torch.func, forward AD | kernels have no rules for transforms |

Test: pytest tests/test_position.py; benchmark: pytest bench/bench_position.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, triton_twin, twin_of
from ..reference import position as reference
from ._checks import check_dense, check_finite, check_int, check_number
from ._positions import check_positions

__all__ = ["add_positions", "alibi_slopes", "sinusoidal_table"]


def _fake_forward(x, table, positions, start, seed, p, scale):
    return x.new_empty(x.shape)


def _fake_backward(grad, positions, order, begin, start, seed, p, scale, table_len, need_x, need_table):
    wide = reference.compute_dtype(grad.dtype)
    shape = (table_len, grad.shape[-1]) if need_table else 0
    return grad.new_empty(grad.shape if need_x else 0), grad.new_empty(shape, dtype=wide)


FORWARD = Op(
    "position_forward(Tensor x, Tensor table, Tensor? positions, int start, Tensor? seed, float p, float scale) "
    "-> Tensor",
    fake=_fake_forward,
    reference=reference.position_forward,
    triton=triton_twin("position", "position_forward"),
)
BACKWARD = Op(
    "position_backward(Tensor grad, Tensor? positions, Tensor? order, Tensor? begin, int start, Tensor? seed, float p, "
    "float scale, int table_len, bool need_x, bool need_table) -> (Tensor dx, Tensor dtable)",
    fake=_fake_backward,
    reference=reference.position_backward,
    triton=triton_twin("position", "position_backward"),
)


def _setup(ctx, inputs, output):
    _, table, positions, ctx.start, seed, ctx.p, ctx.scale = inputs
    ctx.save_for_backward(positions, seed)
    ctx.table_len, ctx.table_dtype = table.shape[0], table.dtype


def _backward(twin, ctx, grad):
    positions, seed = ctx.saved_tensors
    need_x, need_table = ctx.needs_input_grad[:2]
    plain = seed is None and ctx.scale == 1.0  # dx is grad itself
    dx, dtable = grad if need_x else None, None
    if need_table or (need_x and not plain):
        order, begin = (None, None)
        if need_table and positions is not None:
            order, begin = reference.by_position(positions, ctx.table_len)
        rest = (ctx.start, seed, ctx.p, ctx.scale, ctx.table_len, need_x and not plain, need_table)
        found, dtable = BACKWARD[twin](grad, positions, order, begin, *rest)
        dx = found if need_x and not plain else dx
        dtable = dtable.to(ctx.table_dtype) if need_table else None
    return dx, dtable, None, None, None, None, None


def _setup_twice(ctx, inputs, output):
    grad, positions, order, begin, ctx.start, seed, ctx.p, ctx.scale, ctx.table_len, need_x, need_table = inputs
    ctx.save_for_backward(positions, order, begin, seed)
    ctx.shape, ctx.dtype = grad.shape, grad.dtype
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*(t for t, needed in zip(output, (need_x, need_table), strict=True) if not needed))


def _backward_twice(twin, ctx, ddx, ddtable):
    """scale * mask * ddx + mask * ddtable[position]: the forward op."""
    positions, order, begin, seed = ctx.saved_tensors
    if ddtable is not None:
        x = ddtable.new_zeros(ctx.shape, dtype=ctx.dtype) if ddx is None else ddx
        grad = FORWARD[twin](x, ddtable, positions, ctx.start, seed, ctx.p, ctx.scale)
    elif ddx is not None:
        rest = (ctx.start, seed, ctx.p, ctx.scale, ctx.table_len, True, False)
        grad, _ = BACKWARD[twin](ddx, positions, order, begin, *rest)
    else:
        grad = None
    return grad, *[None] * 10


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(_setup_twice, _backward_twice)


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels compute in float32; use backend='torch' or another dtype"
    return None


backends.register_room("add_positions", {"cpu": _refuse, "cuda": _refuse, "triton": _refuse})


def sinusoidal_table(length: int, dim: int, *, base: float = 10000.0, start: int = 0) -> Tensor:
    """The sinusoidal encoding of positions start .. start + length - 1, built in float64 and rounded once:

        table[p, 2 i] = sin(p / base^(2 i / dim)),   table[p, 2 i + 1] = cos(p / base^(2 i / dim))

    length  >= 0;  dim >= 1, of an odd one the last column is a sine;  base > 1

    Returns float32 [length, dim], on the CPU. Raises ValueError for numbers out of range.

    >>> from fastdl import ops
    >>> ops.sinusoidal_table(2, 4)
    tensor([[0.0000, 1.0000, 0.0000, 1.0000],
            [0.8415, 0.5403, 0.0100, 0.9999]])

    Source: Vaswani et al., "Attention Is All You Need" (2017).
    """
    check_int("length", length, 0)
    check_int("start", start, 0)
    check_int("dim", dim, 1)
    check_number("base", base)
    if not 1 < base < float("inf"):
        raise ValueError(f"base: expected a finite number > 1, got {base}")
    return reference.sinusoidal_table(length, dim, base, start)


def alibi_slopes(heads: int) -> Tensor:
    """The slopes of attention with linear biases: 2^(-8 h / heads) for h = 1 .. heads where heads is a power of two;
    else the slopes of the power of two below, and then every other one of the power above.

    heads  >= 1

    Returns float32 [heads], on the CPU; the bias of a score is -slope times the distance from the query to the key.
    Raises ValueError for less than one head.

    >>> from fastdl import ops
    >>> ops.alibi_slopes(4)
    tensor([0.2500, 0.0625, 0.0156, 0.0039])

    Source: Press et al., "Train Short, Test Long" (2022).
    """
    check_int("heads", heads, 1)
    return torch.tensor(reference.alibi_slopes(int(heads)))


def add_positions(
    x: Tensor,
    table: Tensor,
    *,
    scale: float = 1.0,
    positions: Tensor | int = 0,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:
    """``dropout(scale * x + table[position])`` in one pass.

    x          [..., n, dim], float32, bfloat16, float16 (float64: torch back end); any strides
    table      [max_len, dim], floating: `sinusoidal_table`, or a learned parameter
    scale      of x, e.g. sqrt(dim) for embeddings that were drawn with variance 1 / dim
    positions  the first position (int), or int64 [n], one for each token, or int64 [batch, n], one for each token of
               each sequence of x [batch, ..., n, dim]; they may repeat. On a GPU positions outside the table count as
               its first or last, and raise with FASTDL_CHECK=1
    dropout_p  0 <= p <= 1: each element of the sum is zeroed with probability p and scaled by 1 / (1 - p) otherwise, by
               one seed drawn from torch's generator; pass 0 in evaluation
    backend    None or "auto", "cpu", "cuda", "triton", "torch"

    Returns y [..., n, dim] in the dtype of x, contiguous. Differentiable any number of times in x and table.
    Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch
    >>> from fastdl import ops
    >>> x = torch.ones(1, 2, 4)
    >>> ops.add_positions(x, ops.sinusoidal_table(8, 4), scale=2.0, positions=1)
    tensor([[[2.8415, 2.5403, 2.0100, 2.9999],
             [2.9093, 1.5839, 2.0200, 2.9998]]])

    Source: Vaswani et al., "Attention Is All You Need" (2017), section 3.5.
    """
    _check(x, table, scale, dropout_p)
    start, positions = check_positions(positions, table, x.shape[-2], [x.shape[0]] if x.dim() > 2 else [])
    chosen = backends.choose(
        "add_positions", backend, device=x.device, dtype=x.dtype, refusals=backends.in_a_transform()
    )
    if chosen != "torch" and table.dtype not in (x.dtype, torch.float32):
        table = table.to(torch.float32)
    seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None
    return FORWARD[twin_of(chosen, x.device)](x, table, positions, start, seed, float(dropout_p), float(scale))


def _check(x: Tensor, table: Tensor, scale: float, p: float) -> None:
    check_dense("x", x)
    check_dense("table", table)
    if x.dim() < 2 or table.dim() != 2 or table.shape[1] != x.shape[-1]:
        raise ValueError(
            f"table: expected [max_len, dim] for x [..., n, dim], got {tuple(table.shape)} for {tuple(x.shape)}"
        )
    if table.device != x.device:
        raise ValueError(f"table: expected the device of x, {x.device}, got {table.device}; move one to the other")
    check_finite("scale", scale)
    check_number("dropout_p", p)
    if not 0 <= p <= 1:
        raise ValueError(f"dropout_p: expected 0 <= p <= 1, got {p}")
