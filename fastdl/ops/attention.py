"""Attention with grouped heads and a KV cache's alignment: contract of the room `attention`.

    O = softmax(scale * Q K^T) V,    causal: the last query stands at the last key

| back end | status |
| --- | --- |
| torch | the reference, differentiable twice, any device; holds the scores, n_heads * n_q * n_k |
| cpu, cuda, triton | none of their own yet: on the CPU attention over the KV cache runs inside `decoder_blocks` |

Test: pytest tests/test_attention.py
"""

from __future__ import annotations

from torch import Tensor

from .. import backend as backends
from ..reference import attention as reference

backends.register_room("attention", {})


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = True,
    scale: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Scaled dot-product attention with grouped heads: ``softmax(scale * q k^T) v``.

    Query head h reads key/value head ``h // (n_heads // n_kv_heads)``. With ``causal``, query i of n_q sees the keys
    0 .. n_k - n_q + i: queries are the last n_q of n_k positions, which is what a KV cache needs. A query that sees no
    key (n_q > n_k) gives zeros.

    Parameters
    ----------
    q: floating point, [..., n_heads, n_q, head_dim].
    k: floating point, [..., n_kv_heads, n_k, head_dim]; n_heads is a multiple of n_kv_heads. May have another dtype
        than q (a float16 cache with float32 queries).
    v: like k, its last dimension may differ.
    causal: whether later keys are hidden.
    scale: factor of the scores; None for ``head_dim ** -0.5``.
    backend: "torch", or None for the automatic choice.

    Returns
    -------
    Tensor [..., n_heads, n_q, d_v] in the dtype of q; scores, softmax and sums in float32 (float64 for float64).

    Raises
    ------
    TypeError, ValueError: dtypes, shapes or devices that do not fit; the message says which.
    fastdl.BackendError: a back end without this room is asked for.

    Source: Vaswani et al. (2017); Ainslie et al., "GQA" (2023).

    Example
    -------
    >>> import torch
    >>> from fastdl import ops
    >>> q, k = torch.zeros(4, 1, 8), torch.zeros(2, 3, 8)    # one new token, three cached, groups of 2
    >>> v = torch.arange(3.0).view(1, 3, 1).expand(2, 3, 1)
    >>> ops.attention(q, k, v).flatten()
    tensor([1., 1., 1., 1.])
    """
    _check(q, k, v)
    backends.choose("attention", backend, device=q.device, dtype=q.dtype)
    return reference.attention(q, k, v, causal, q.shape[-1] ** -0.5 if scale is None else scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not t.is_floating_point():
            raise TypeError(f"{name}: expected a floating point tensor, got {t.dtype}")
        if t.dim() < 3 or t.dim() != q.dim():
            raise ValueError(
                f"{name}: expected [..., heads, n, head_dim] with as many dimensions as q, got {tuple(t.shape)}"
            )
        if t.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {t.device}")
    if k.dtype != v.dtype:
        raise TypeError(f"v: expected the dtype of k, {k.dtype}, got {v.dtype}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(
            f"v: expected {tuple(k.shape[:-1])} before the last dimension, as in k, got {tuple(v.shape[:-1])}"
        )
    if q.shape[:-3] != k.shape[:-3] or q.shape[-1] != k.shape[-1] or q.shape[-1] == 0:
        raise ValueError(f"k: expected the batch and head_dim of q {tuple(q.shape)}, got {tuple(k.shape)}")
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        raise ValueError(f"k: expected a number of heads that divides q's {q.shape[-3]}, got {k.shape[-3]}")
