"""Room attention: one function for full, causal, windowed, masked, biased, padded and packed attention.

    t = scale * q k^T     s = softcap * tanh(t / softcap) + bias - alibi_slope * distance     O = dropout(softmax(s)) v

The scores never exist whole: kernels keep the greatest score and the sum of exponentials of a row while the keys stream
by, the backward pass computes the scores again from the row's lse. Query i of n_q stands at position i + n_k - n_q.
Results do not depend on what else is in the batch, nor on the number of threads.

dtypes: float32, bfloat16, float16, and float64 on the torch back end; scores, softmax and sums are float32.
Gradients to q, k, v and bias; twice (the double backward computes chunks of queries again in plain torch).

Back ends: cpu (csrc/cpu/attention*), cuda (csrc/cuda/attention*), triton (kernels/attention*.py), torch
(fastdl/reference/attention.py). What they refuse:

    | back end          | refuses                        | because                              |
    | cpu, cuda, triton | float64                        | its kernels accumulate in float32    |
    | cpu, cuda, triton | torch.func, forward AD         | kernels have no rules for transforms |
    | cuda, triton      | head_dim or d_v of over 256    | a row must fit in registers          |

Under autocast q, k and v are taken in autocast's dtype, as torch's own op takes them.
Test: ``pytest tests/test_attention.py``; benchmark: ``pytest bench/bench_attention.py``; guide: docs/attention.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend as backends
from .._library import Op, gradient_of, triton_twin, twin_of
from ..reference import attention as reference
from ..reference.norm import compute_dtype
from ._attention_checks import Call, check_call

__all__ = ["attention"]


def _fake_forward(q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed, p, scale, softcap, left, right):
    return reference.output_like(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=compute_dtype(q.dtype))


def _fake_backward(
    grad, grad_lse, q, k, v, out, lse, bias, mask, lens, cu_q, cu_k, slopes, seed, p, scale, softcap, left, right,
    need_bias,
):  # fmt: skip
    dbias = q.new_empty(bias.shape if need_bias else 0, dtype=compute_dtype(q.dtype))
    return (*(reference.output_like(t, t.shape[3]) for t in (q, k, v)), dbias)


FORWARD = Op(
    "attention_forward(Tensor q, Tensor k, Tensor v, Tensor? bias, Tensor? mask, Tensor? lens, Tensor? cu_q, "
    "Tensor? cu_k, Tensor? slopes, Tensor? seed, float p, float scale, float softcap, int left, int right) "
    "-> (Tensor out, Tensor lse)",
    fake=_fake_forward,
    reference=reference.attention_forward,
    triton=triton_twin("attention", "attention_forward"),
)
BACKWARD = Op(
    "attention_backward(Tensor grad, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    "Tensor? bias, Tensor? mask, Tensor? lens, Tensor? cu_q, Tensor? cu_k, Tensor? slopes, Tensor? seed, float p, "
    "float scale, float softcap, int left, int right, bool need_bias) "
    "-> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias)",
    fake=_fake_backward,
    reference=reference.attention_backward,
    triton=triton_twin("attention", "attention_backward"),
)


def _setup(ctx, inputs, output):
    q, k, v, bias, mask, lens, cu_q, cu_k, slopes, seed, *ctx.numbers = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, bias, mask, lens, cu_q, cu_k, slopes, seed)
    ctx.set_materialize_grads(False)


def _backward(twin, ctx, grad, grad_lse):
    q, k, v, out, lse, bias, *rest = ctx.saved_tensors
    need = ctx.needs_input_grad
    if grad is None:
        grad = torch.zeros_like(out)
    elif grad.stride(-1) != 1:
        grad = grad.contiguous()
    dq, dk, dv, dbias = BACKWARD[twin](
        grad, None if grad_lse is None else grad_lse.contiguous(), q, k, v, out, lse, bias, *rest, *ctx.numbers, need[3]
    )
    return dq, dk, dv, dbias.to(bias.dtype) if need[3] else None, *[None] * 11


FORWARD.autograd(_setup, _backward)
BACKWARD.autograd(*gradient_of(reference.attention_backward))


def _refuse_cpu(*, dtype: torch.dtype, **facts) -> str | None:
    if dtype == torch.float64:
        return "float64: its kernels accumulate in float32; use backend='torch' or another dtype"
    return None


def _refuse_gpu(*, dtype: torch.dtype, head_dim: int = 64, **facts) -> str | None:
    if head_dim > 256:
        return f"head_dim {head_dim}: a row of more than 256 does not fit in registers; use backend='torch'"
    return _refuse_cpu(dtype=dtype)


backends.register_room("attention", {"cpu": _refuse_cpu, "cuda": _refuse_gpu, "triton": _refuse_gpu})


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    scale: float | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    valid_lens: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention, ``softmax(scale * q k^T + bias) v``, without a matrix of queries by keys:

        s_ij = cap(scale * q_i . k_j) + bias_ij - slope * |p_i - j|,   p_i = i + n_k - n_q,   cap(t) = c tanh(t / c)
        O_i  = sum_j exp(s_ij - lse_i) v_j,   lse_i = log sum_j exp(s_ij)          over the keys j that query i sees

    q             [batch, heads, n_q, head_dim], float32, bfloat16, float16 (float64: torch back end). Strides are free:
                  a [batch, n_q, heads, head_dim] is passed as ``q.transpose(1, 2)``, nothing is copied, and the result
                  lies in memory as q does. Without batch, or with several batch dimensions, too
    k, v          [batch, kv_heads, n_k, head_dim] and [batch, kv_heads, n_k, d_v], the dtype of q. kv_heads divides
                  heads: query head h reads key head h // (heads / kv_heads)
    causal        hide the keys after a query's position p_i: the last query stands at the last key
    scale         of the scores; None: head_dim ** -0.5
    bias          floating, broadcastable to [batch, heads, n_q, n_k]; added to the scores, -inf hides a key
    mask          boolean, broadcastable likewise: True where a query attends
    valid_lens    int [batch] or [batch, n_q]: how many keys, from the first, a sequence or a query sees
    cu_seqlens_q  int [sequences + 1]: sequences packed one after the other without padding. q is [heads, total,
                  head_dim] (batch 1), sequence s is its rows cu_seqlens_q[s] to cu_seqlens_q[s + 1]. Not with bias,
                  mask or valid_lens
    cu_seqlens_k  the same for k and v; None: as cu_seqlens_q
    window        (left, right): only keys from p_i - left to p_i + right; -1: unlimited
    softcap       c > 0; None: no cap
    alibi_slopes  floating [heads] or [batch, heads], constants (`alibi_slopes` makes them; a slope that learns: bias)
    dropout_p     0 <= p <= 1: each weight is zeroed with probability p and scaled by 1 / (1 - p) otherwise, by one seed
                  drawn from torch's generator; pass 0 in evaluation
    return_lse    return (O, lse): lse float32 [batch, heads, n_q], differentiable, for merging parts of the keys
    backend       None or "auto", "cpu", "cuda", "triton", "torch"

    Returns O [batch, heads, n_q, d_v] in the dtype of q. A query that sees no key gives 0, lse -inf, and no gradient; a
    score of +inf or NaN makes its row NaN. A key that no query sees may hold anything, NaN too (on cuda and triton:
    behind its valid_lens; keys hidden otherwise must be finite there, because 0 times NaN is NaN). Differentiable
    twice in q, k, v and bias; memory grows with n_q + n_k.
    Raises TypeError or ValueError naming the argument; fastdl.BackendError if ``backend`` cannot.

    >>> import torch
    >>> from fastdl import ops
    >>> q, k = torch.zeros(1, 4, 1, 16), torch.zeros(1, 2, 3, 16)    # one new token, three cached, groups of two heads
    >>> v = torch.arange(3.0).view(1, 1, 3, 1).expand(1, 2, 3, 1)
    >>> ops.attention(q, k, v, causal=True).flatten()
    tensor([1., 1., 1., 1.])
    >>> ops.attention(q, k, v, valid_lens=torch.tensor([2])).flatten()
    tensor([0.5000, 0.5000, 0.5000, 0.5000])

    Source: Vaswani et al. (2017); Milakov and Gimelshein (2018); Rabe and Staats (2021); Dao et al. (2022); grouped
    heads: Ainslie et al. (2023); ALiBi: Press et al. (2022); softcap: Gemma 2 (2024).
    """
    call = check_call(
        q, k, v, causal=causal, scale=scale, bias=bias, mask=mask, valid_lens=valid_lens, cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k, window=window, softcap=softcap, alibi_slopes=alibi_slopes, dropout_p=dropout_p,
    )  # fmt: skip
    out, lse = _run(call, backend)
    out, lse = (t.reshape(q.shape[:-1] + t.shape[3:]) for t in (out, lse)) if q.dim() != 4 else (out, lse)
    return (out, lse) if return_lse else out


def _run(call: Call, backend: str | None) -> tuple[Tensor, Tensor]:
    q, k, v = call.q, call.k, call.v
    chosen = backends.choose(
        "attention",
        backend,
        device=q.device,
        dtype=q.dtype,
        refusals=backends.in_a_transform(),
        head_dim=max(q.shape[3], v.shape[3]),
    )
    bias = call.bias
    if bias is not None and chosen != "torch" and bias.dtype not in (q.dtype, torch.float32):
        bias = bias.float()
    seed = None
    if call.dropout_p > 0:
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), device=q.device)
    return FORWARD[twin_of(chosen, q.device)](
        q, k, v, bias, call.mask, call.lens, call.cu_q, call.cu_k, call.slopes, seed, call.dropout_p, call.scale,
        call.softcap, call.left, call.right,
    )  # fmt: skip
