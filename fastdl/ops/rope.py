"""Room rope: rotary position embedding, of q alone or of q and k in one call.

    y_a = x_a cos(p f) - x_b sin(p f),    y_b = x_b cos(p f) + x_a sin(p f)   pair (a, b), position p

The gradient is the turn by the opposite angle, by the same op: it can be differentiated any number of times. The
elements of a head must lie side by side; any other strides are read as they are, and the result has the memory order of
its input, so that [batch, length, heads, head_dim] transposed costs no copy. float32 inside; the table is read as
float32.

Back ends: cpu (csrc/cpu/rope*.cpp), cuda (csrc/cuda/rope*), triton (kernels/rope.py), torch (fastdl/reference/rope.py).
What they refuse:

    | back end          | refuses                         | because                              |
    | cpu, cuda, triton | float64                         | its kernels compute in float32       |
    | cpu, cuda, triton | a table that wants its gradient | kernels have the gradient of x alone |
    | cpu, cuda, triton | torch.func, forward AD          | kernels have no rules for transforms |

Test: pytest tests/test_rope.py; benchmark: pytest bench/bench_rope.py
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, is_grad_enabled, triton_twin, twin_of
from ..reference import rope as reference
from ._checks import check_dense
from ._positions import check_positions
from ._rope_table import SCALINGS, rope_table

__all__ = ["SCALINGS", "rope", "rope_qk", "rope_table"]

PAIRS = ("interleaved", "half")


def _fake(q, k, cos_sin, positions, start, interleaved, backward):
    return reference.like(q), q.new_empty(0) if k is None else reference.like(k)


TURN = Op(
    "rope_turn(Tensor q, Tensor? k, Tensor cos_sin, Tensor? positions, int start, bool interleaved, bool backward) "
    "-> (Tensor q, Tensor k)",
    fake=_fake,
    reference=reference.rope_turn,
    triton=triton_twin("rope", "rope_turn"),
)


def _setup(ctx, inputs, output):
    _, k, cos_sin, positions, ctx.start, ctx.interleaved, ctx.backward = inputs
    ctx.save_for_backward(cos_sin, positions)
    ctx.set_materialize_grads(False)
    if k is None:
        ctx.mark_non_differentiable(output[1])


def _backward(twin, ctx, dq, dk):
    cos_sin, positions = ctx.saved_tensors
    dq, dk = (grad if needed else None for grad, needed in zip((dq, dk), ctx.needs_input_grad[:2], strict=True))
    first, second = (dk, None) if dq is None else (dq, dk)
    if first is not None:
        rest = (cos_sin, positions, ctx.start, ctx.interleaved, not ctx.backward)
        first, second = TURN[twin](first, second, *rest)
        dq, dk = (None, first) if dq is None else (first, None if dk is None else second)
    return dq, dk, None, None, None, None, None


TURN.autograd(_setup, _backward)


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels compute in float32; use backend='torch' or another dtype"
    return None


_TABLE_GRADIENT = dict.fromkeys(
    ("cpu", "cuda", "triton"), "kernels have the gradient of x alone, not of cos_sin; use backend='torch'"
)
for _room in ("rope", "rope_qk"):
    backends.register_room(_room, {"cpu": _refuse, "cuda": _refuse, "triton": _refuse})


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
    x: floating point, [..., n, head_dim]: n consecutive tokens (heads before them), any strides. Queries made as
        [batch, n, heads, head_dim] are passed as ``x.transpose(1, 2)``: nothing is copied, and the result lies as x
        does.
    cos_sin: float, [max_len, rope_dim] from `rope_table`; rope_dim <= head_dim, the elements behind it pass through.
    pairs: "interleaved" (2i, 2i+1: GGUF's llama) or "half" (i, i + rope_dim/2: GPT-NeoX, Hugging Face, qwen2).
    positions: the first position (int), or int64 [n], one for each token, or int64 [batch, n], one for each token of
        each sequence of x [batch, ..., n, head_dim] (padded or packed batches). On a GPU positions outside the table
        count as its first or last, and raise with FASTDL_CHECK=1.
    backend: None or "auto", "cpu", "cuda", "triton", "torch".

    Returns
    -------
    Tensor like x; float32 inside, float64 for float64. Differentiable any number of times in x (and by torch in
    cos_sin).

    Raises
    ------
    TypeError, ValueError: dtypes, shapes or devices that do not fit, positions outside the table.
    fastdl.BackendError: a back end that cannot run this call is asked for.

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).

    Example
    -------
    >>> import torch
    >>> from fastdl import ops
    >>> ops.rope(torch.tensor([[1.0, 0.0, 1.0, 0.0]]), ops.rope_table(4, 10000.0, 8), positions=1)
    tensor([[0.5403, 0.8415, 0.9999, 0.0100]])
    """
    return _rope("rope", x, None, cos_sin, pairs, positions, backend)[0]


def rope_qk(
    q: Tensor,
    k: Tensor,
    cos_sin: Tensor,
    *,
    pairs: str = "interleaved",
    positions: Tensor | int = 0,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`rope` of q and k in one call, on CUDA in one kernel.

    q [..., n, head_dim], k [..., n, head_dim]: the same n, head_dim, dtype and device; the numbers of heads may differ.
    The other arguments, and what is raised, are those of `rope`. Returns q and k turned.

    >>> import torch
    >>> from fastdl import ops
    >>> q, k = torch.randn(2, 9, 5, 64), torch.randn(2, 3, 5, 64)
    >>> q_turned, k_turned = ops.rope_qk(q, k, ops.rope_table(64, 10000.0, 5))
    >>> torch.equal(k_turned, ops.rope(k, ops.rope_table(64, 10000.0, 5)))
    True
    """
    check_dense("q", q)
    check_dense("k", k)
    if q.dim() < 2 or k.dim() < 2 or q.shape[-2:] != k.shape[-2:]:
        raise ValueError(
            f"k: expected [..., n, head_dim] with the last two dimensions of q, {tuple(q.shape)}, got {tuple(k.shape)}"
        )
    if k.dtype != q.dtype or k.device != q.device:
        raise ValueError(f"k: expected the dtype and device of q, {q.dtype} on {q.device}, got {k.dtype} on {k.device}")
    return _rope("rope_qk", q, k, cos_sin, pairs, positions, backend)


def _rope(room, q, k, cos_sin, pairs, positions, backend) -> tuple[Tensor, Tensor]:
    _check(q, cos_sin, pairs, "x" if k is None else "q")
    start, positions = _positions(positions, cos_sin, q, k)
    refusals = backends.in_a_transform()
    if cos_sin.requires_grad and is_grad_enabled():
        refusals = _TABLE_GRADIENT
    chosen = backends.choose(room, backend, device=q.device, dtype=q.dtype, refusals=refusals)
    arguments = (positions, start, pairs == "interleaved", False)
    if refusals is _TABLE_GRADIENT:
        return reference.rope_turn(q, k, cos_sin, *arguments)
    if chosen != "torch" and (cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous()):
        cos_sin = cos_sin.to(torch.float32).contiguous()
    return TURN[twin_of(chosen, q.device)](q, k, cos_sin, *arguments)


def _check(x: Tensor, cos_sin: Tensor, pairs: str, name: str) -> None:
    check_dense(name, x)
    if not isinstance(cos_sin, Tensor) or not cos_sin.is_floating_point():
        got = cos_sin.dtype if isinstance(cos_sin, Tensor) else type(cos_sin).__name__
        raise TypeError(f"cos_sin: expected a floating point tensor, got {got}")
    if pairs not in PAIRS:
        raise ValueError(f"pairs: expected one of {', '.join(PAIRS)}, got {pairs!r}")
    if x.dim() < 2 or cos_sin.dim() != 2 or cos_sin.shape[1] % 2 or cos_sin.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos_sin: expected [max_len, rope_dim], rope_dim even and at most head_dim, for {name} [..., n, "
            f"head_dim]; got {tuple(cos_sin.shape)} for {tuple(x.shape)}"
        )
    if cos_sin.device != x.device:
        raise ValueError(f"cos_sin: expected the device of {name}, {x.device}, got {cos_sin.device}")


def _positions(positions, cos_sin: Tensor, q: Tensor, k: Tensor | None) -> tuple[int, Tensor | None]:
    """The first position and None, or 0 and the positions as the op takes them."""
    batches = [x.shape[0] for x in (q, k) if x is not None and x.dim() > 2]
    batches = batches if len(batches) == (1 if k is None else 2) else []
    return check_positions(positions, cos_sin, q.shape[-2], batches)
