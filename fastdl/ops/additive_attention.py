"""Room additive_attention: the attention of Bahdanau et al., and the pointer of Vinyals et al., fused.

    s_ij  = sum_h w_h tanh(q_ih + k_jh)          -inf where query i may not attend to key j
    out_i = sum_j softmax_j(s_ij) v_j            or, with return_pointer, log_softmax_j(s_ij)

q and k are projected already, so that a decoder projects its keys once. The tensor [batch, queries, keys, hidden] is
never there, and in forward and backward of q, k, v, w neither is [batch, queries, keys]: memory is O(queries + keys)
beside inputs and outputs; the backward pass computes tanh again. A query without keys, or whose scores are all -inf,
gives zeros (pointer: -inf) and zero gradients. Keys that no query of their sequence attends to are not read, so NaN
there touches nothing. dtypes: float32, bfloat16, float16 (scores, softmax and sums are float32; log-probabilities are
returned in float32), float64 on the torch back end. Gradients to q, k, v, w, twice. Under autocast q, k and v are cast
to its dtype. A row does not depend on other rows: keys are cut into chunks by their number alone, whose results are
merged in order.

Back ends: cpu (csrc/cpu/additive_attention*.cpp), cuda (csrc/cuda/additive_attention*.cuh), triton
(kernels/additive_attention.py), torch (fastdl/reference/additive_attention.py). What they refuse:

    | back end          | refuses                | because                              |
    | cpu, cuda, triton | float64                | its kernels compute in float32       |
    | cpu, cuda, triton | torch.func, forward AD | kernels have no rules for transforms |

Test: ``pytest tests/test_additive_attention.py``; benchmark: ``pytest bench/bench_additive_attention.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, triton_twin, twin_of
from ..reference import additive_attention as reference
from ._masks import autocast_dtype, broadcastable, check_mask, check_valid_lens

__all__ = ["additive_attention"]


def _fake_forward(q, k, v, w, mask, valid_lens):
    wide = reference.compute_dtype(q.dtype)
    return q.new_empty((*q.shape[:2], v.shape[2])), q.new_empty((2, *q.shape[:2]), dtype=wide)


def _fake_pointer(q, k, w, mask, valid_lens):
    wide = reference.compute_dtype(q.dtype)
    return q.new_empty((*q.shape[:2], k.shape[1]), dtype=wide), q.new_empty((2, *q.shape[:2]), dtype=wide)


def _fake_backward(grad, q, k, v, w, mask, valid_lens, out, statistics):
    return *(t.new_empty(t.shape) for t in (q, k, v)), w.new_empty(w.shape, dtype=reference.compute_dtype(q.dtype))


def _fake_pointer_backward(grad, q, k, w, mask, valid_lens, statistics):
    return *(t.new_empty(t.shape) for t in (q, k)), w.new_empty(w.shape, dtype=reference.compute_dtype(q.dtype))


FORWARD = Op(
    "additive_attention_forward(Tensor q, Tensor k, Tensor v, Tensor w, Tensor? mask, Tensor? valid_lens) "
    "-> (Tensor out, Tensor statistics)",
    fake=_fake_forward,
    reference=reference.additive_attention_forward,
    triton=triton_twin("additive_attention", "additive_attention_forward"),
)
BACKWARD = Op(
    "additive_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor w, Tensor? mask, "
    "Tensor? valid_lens, Tensor out, Tensor statistics) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dw)",
    fake=_fake_backward,
    reference=reference.additive_attention_backward,
    triton=triton_twin("additive_attention", "additive_attention_backward"),
)
POINTER = Op(
    "additive_pointer_forward(Tensor q, Tensor k, Tensor w, Tensor? mask, Tensor? valid_lens) "
    "-> (Tensor logp, Tensor statistics)",
    fake=_fake_pointer,
    reference=reference.additive_pointer_forward,
    triton=triton_twin("additive_attention", "additive_pointer_forward"),
)
POINTER_BACKWARD = Op(
    "additive_pointer_backward(Tensor grad, Tensor q, Tensor k, Tensor w, Tensor? mask, Tensor? valid_lens, "
    "Tensor statistics) -> (Tensor dq, Tensor dk, Tensor dw)",
    fake=_fake_pointer_backward,
    reference=reference.additive_pointer_backward,
    triton=triton_twin("additive_attention", "additive_pointer_backward"),
)


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(twin, ctx, grad, _statistics):
    if grad is None:
        return (None,) * 6
    q, k, v, w, mask, valid_lens, out, statistics = ctx.saved_tensors
    found = BACKWARD[twin](grad, q, k, v, w, mask, valid_lens, out, statistics)
    found = (*found[:3], found[3].to(w.dtype))
    return *(t if need else None for t, need in zip(found, ctx.needs_input_grad, strict=False)), None, None


def _pointer_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _pointer_backward(twin, ctx, grad, _statistics):
    if grad is None:
        return (None,) * 5
    q, k, w, mask, valid_lens, statistics = ctx.saved_tensors
    found = POINTER_BACKWARD[twin](grad, q, k, w, mask, valid_lens, statistics)
    found = (*found[:2], found[2].to(w.dtype))
    return *(t if need else None for t, need in zip(found, ctx.needs_input_grad, strict=False)), None, None


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.additive_attention_backward))
POINTER.autograd(_pointer_setup, _pointer_backward)
POINTER_BACKWARD.autograd(*gradient_of(reference.additive_pointer_backward))

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _refuse(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels compute in float32; use backend='torch' or another dtype"
    return None


backends.register_room("additive_attention", {"cpu": _refuse, "cuda": _refuse, "triton": _refuse})


def additive_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    w: Tensor,
    *,
    mask: Tensor | None = None,
    valid_lens: Tensor | None = None,
    return_pointer: bool = False,
    chosen: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Additive attention, ``softmax(w . tanh(q_i + k_j)) v``, or the log-probabilities of its softmax.

        s_ij = sum_h w_h tanh(q_ih + k_jh),    out_i = sum_j softmax_j(s_ij) v_j

    q               [batch, queries, hidden], projected, any strides; float32, bfloat16, float16 (float64: torch)
    k               [batch, keys, hidden], projected, dtype of q
    v               [batch, keys, d_v], dtype of q; None with return_pointer
    w               [hidden], dtype of q or float32
    mask            bool, broadcastable to [batch, queries, keys], True where a query attends; or None
    valid_lens      int [batch] or [batch, queries], 0 .. keys: a query attends to the keys before its length; or None
    return_pointer  return the log-probabilities over the keys, -inf where masked, instead of out
    chosen          bool [batch, keys] or [batch, queries, keys], True at positions that are masked because they were
                    chosen before; or None
    backend         None or "auto", "cpu", "cuda", "triton", "torch"

    Returns out [batch, queries, d_v] in the dtype of q; with return_pointer log-probabilities [batch, queries, keys] in
    float32 (float64 for float64). A query that attends to nothing gives zeros (-inf), and zero gradients.
    Differentiable twice in q, k, v and w.
    Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch, fastdl
    >>> q, k, v, w = torch.zeros(1, 1, 4), torch.zeros(1, 3, 4), torch.eye(3)[None], torch.ones(4)
    >>> fastdl.ops.additive_attention(q, k, v, w, valid_lens=torch.tensor([2]))
    tensor([[[0.5000, 0.5000, 0.0000]]])
    >>> chosen = torch.tensor([[True, False, False]])
    >>> fastdl.ops.additive_attention(q, k, None, w, return_pointer=True, chosen=chosen).exp()
    tensor([[[0.0000, 0.5000, 0.5000]]])

    Source: Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate" (2014);
    Vinyals, Fortunato and Jaitly, "Pointer networks" (2015).
    """
    cast = autocast_dtype(q) if isinstance(q, Tensor) else None
    if cast is not None:
        q, k, v = (t.to(cast) if isinstance(t, Tensor) and t.dtype in _DTYPES[:3] else t for t in (q, k, v))
    _check(q, k, v, w, return_pointer)
    (batch, queries, _), keys, device = q.shape, k.shape[1], q.device
    if mask is not None:
        mask = check_mask(mask, (batch, queries, keys), device)
    if chosen is not None:
        free = ~_check_chosen(chosen, (batch, queries, keys), device)
        mask = free if mask is None else mask & free
    if valid_lens is not None:
        valid_lens = check_valid_lens(valid_lens, batch, queries, keys, device)
    refusals = backends.in_a_transform()
    chosen_backend = backends.choose("additive_attention", backend, device=device, dtype=q.dtype, refusals=refusals)
    twin = twin_of(chosen_backend, device)
    if return_pointer:
        return POINTER[twin](q, k, w, mask, valid_lens)[0]
    return FORWARD[twin](q, k, v, w, mask, valid_lens)[0]


def _check_chosen(chosen: Tensor, scores: tuple[int, int, int], device: torch.device) -> Tensor:
    """chosen as a view of three dimensions."""
    if not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.layout != torch.strided:
        got = chosen.dtype if isinstance(chosen, Tensor) else type(chosen).__name__
        raise TypeError(f"chosen: expected a boolean tensor, True where a key was chosen before, got {got}")
    batch, _, keys = scores
    if tuple(chosen.shape) not in ((batch, keys), scores):
        raise ValueError(f"chosen: expected shape {(batch, keys)} or {scores}, got {tuple(chosen.shape)}")
    return broadcastable("chosen", chosen[:, None] if chosen.dim() == 2 else chosen, scores, device)


def _check(q, k, v, w, return_pointer) -> None:
    for name, t in (("q", q), ("k", k), ("w", w), ("v", v)):
        if t is None and name == "v" and return_pointer:
            continue
        if not isinstance(t, Tensor):
            hint = "; None is for return_pointer=True" if name == "v" else ""
            raise TypeError(f"{name}: expected a tensor, got {type(t).__name__}{hint}")
        if t.dtype not in _DTYPES or t.layout != torch.strided or t.is_nested:
            kind = "nested" if t.is_nested else f"layout {t.layout}"
            raise TypeError(f"{name}: expected a dense floating point tensor, got {t.dtype}, {kind}")
        if t.dtype != q.dtype and not (name == "w" and t.dtype == torch.float32 and q.dtype != torch.float64):
            also = " or torch.float32" if name == "w" and q.dtype != torch.float64 else ""
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}{also}, got {t.dtype}; convert one of them")
        if t.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {t.device}; move one to the other")
    if q.dim() != 3 or q.shape[2] == 0:
        raise ValueError(f"q: expected shape [batch, queries, hidden] with hidden of at least 1, got {tuple(q.shape)}")
    batch, _, hidden = q.shape
    if k.dim() != 3 or k.shape[0] != batch or k.shape[2] != hidden:
        raise ValueError(f"k: expected shape ({batch}, keys, {hidden}) for q of shape {tuple(q.shape)}, got "
                         f"{tuple(k.shape)}")  # fmt: skip
    if w.shape != (hidden,):
        raise ValueError(f"w: expected shape ({hidden},) for q of shape {tuple(q.shape)}, got {tuple(w.shape)}")
    if not isinstance(return_pointer, bool):
        raise TypeError(f"return_pointer: expected True or False, got {type(return_pointer).__name__}")
    if return_pointer:
        return
    if v.dim() != 3 or v.shape[:2] != k.shape[:2] or v.shape[2] == 0:
        raise ValueError(f"v: expected shape ({batch}, {k.shape[1]}, d_v) with d_v of at least 1, got {tuple(v.shape)}")
