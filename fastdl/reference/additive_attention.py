"""Additive attention in plain PyTorch: the meaning of the ops, forward and backward by explicit formula.

    t_ijh = tanh(q_ih + k_jh),   s_ij = sum_h w_h t_ijh  (-inf where masked)
    m_i = max_j s_ij,  l_i = sum_j exp(s_ij - m_i),  p_ij = exp(s_ij - m_i) / l_i          m and l: the statistics
    attention   out_i = sum_j p_ij v_j
    pointer     logp_ij = s_ij - (m_i + log l_i)
    gradients   dp_ij = grad_i . v_j,  ds_ij = p_ij (dp_ij - sum_j p_ij dp_ij),  dv_j = sum_i p_ij grad_i
    (pointer)   ds_ij = grad_ij - p_ij sum_j grad_ij
                dq_ih = w_h sum_j ds_ij (1 - t_ijh^2),  dk_jh = w_h sum_i ds_ij (1 - t_ijh^2)
                dw_h = sum_ij ds_ij t_ijh

A row without keys, or whose scores are all -inf, gives zeros (pointer: -inf) and zero gradients. Keys that no query of
their sequence attends to are not read. float32 inside (float64 for float64). Queries go in chunks, so that
[batch, queries, keys, hidden] is never there as a whole, in the double backward neither.

Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate" (2014); Vinyals,
Fortunato and Jaitly, "Pointer networks" (2015). Test: tests/test_additive_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._chunks import chunks, recomputed
from .norm import compute_dtype

_INF = float("inf")


def _allowed(mask: Tensor | None, valid_lens: Tensor | None, keys: int) -> Tensor | None:
    """bool [batch or 1, queries or 1, keys]: True where a query attends; None: everywhere."""
    allowed = mask
    if valid_lens is not None:
        lens = valid_lens if valid_lens.dim() == 2 else valid_lens[:, None]
        within = torch.arange(keys, device=valid_lens.device) < lens[:, :, None]
        allowed = within if allowed is None else allowed & within
    return allowed


def _without_dead(allowed: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """tensors [batch, keys, n], zero where no query attends."""
    if allowed is None:
        return list(tensors)
    dead = ~allowed.any(1)[:, :, None]
    return [t.masked_fill(dead, 0.0) for t in tensors]


def _rows(allowed: Tensor | None, chunk: slice) -> Tensor | None:
    """allowed of a chunk of queries."""
    return allowed if allowed is None or allowed.shape[1] == 1 else allowed[:, chunk]


def _scores(q: Tensor, k: Tensor, w: Tensor, allowed: Tensor | None) -> tuple[Tensor, Tensor]:
    """t [batch, queries, keys, hidden], s [batch, queries, keys]."""
    t = torch.tanh(q[:, :, None] + k[:, None])
    s = (t * w).sum(-1)
    return t, s if allowed is None else s.masked_fill(~allowed, -_INF)


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """p [batch, queries, keys], zero in a row of -inf; statistics [2, batch, queries]: the largest score, and the sum
    of exp(score - largest), 0 in such a row."""
    if not s.shape[-1]:
        return s, torch.stack([s.new_full(s.shape[:-1], -_INF), s.new_zeros(s.shape[:-1])])
    m = s.detach().amax(-1, keepdim=True)
    e = torch.exp(s - torch.where(m == -_INF, 0.0, m))
    total = e.sum(-1, keepdim=True)
    return e / torch.where(total == 0, 1.0, total), torch.stack([m, total])[..., 0]


def additive_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, w: Tensor, mask: Tensor | None, valid_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q [batch, queries, hidden], k [batch, keys, hidden], v [batch, keys, d_v], w [hidden], mask bool [batch or 1,
    queries or 1, keys or 1], valid_lens int32 [batch] or [batch, queries]
    -> out [batch, queries, d_v] in the dtype of q, statistics [2, batch, queries] in the compute dtype."""
    wide, keys = compute_dtype(q.dtype), k.shape[1]
    allowed = _allowed(mask, valid_lens, keys)
    wide_k, wide_v = _without_dead(allowed, k.to(wide), v.to(wide))
    outs, statistics = [], []
    for chunk in chunks(q.shape[1], k.numel()):
        p, found = _softmax(_scores(q[:, chunk].to(wide), wide_k, w.to(wide), _rows(allowed, chunk))[1])
        outs.append((p @ wide_v).to(q.dtype))
        statistics.append(found)
    return torch.cat(outs, 1).contiguous(), torch.cat(statistics, 2).contiguous()


def additive_pointer_forward(
    q: Tensor, k: Tensor, w: Tensor, mask: Tensor | None, valid_lens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As additive_attention_forward -> logp [batch, queries, keys], statistics, both in the compute dtype."""
    wide, keys = compute_dtype(q.dtype), k.shape[1]
    allowed = _allowed(mask, valid_lens, keys)
    (wide_k,) = _without_dead(allowed, k.to(wide))
    logps, statistics = [], []
    for chunk in chunks(q.shape[1], k.numel()):
        s = _scores(q[:, chunk].to(wide), wide_k, w.to(wide), _rows(allowed, chunk))[1]
        found = _softmax(s)[1]
        lse = torch.where(found[1] == 0, 0.0, found[0] + torch.log(torch.where(found[1] == 0, 1.0, found[1])))
        logps.append(s - lse[..., None])
        statistics.append(found)
    return torch.cat(logps, 1).contiguous(), torch.cat(statistics, 2).contiguous()


def _through_scores(ds: Tensor, t: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ds [batch, queries, keys], t [batch, queries, keys, hidden] -> dq, dk, dw of a chunk."""
    dx = ds[..., None] * (1 - t * t) * w
    return dx.sum(2), dx.sum(1), (ds[..., None] * t).sum((0, 1, 2))


def _attention_chunk(grad, q, k, v, w, allowed):
    t, s = _scores(q, k, w, allowed)
    p = _softmax(s)[0]
    dp = grad @ v.transpose(1, 2)
    ds = p * (dp - (p * dp).sum(-1, keepdim=True))
    return *_through_scores(ds, t, w), p.transpose(1, 2) @ grad


def _pointer_chunk(grad, q, k, w, allowed):
    t, s = _scores(q, k, w, allowed)
    p, statistics = _softmax(s)
    blind = (statistics[1] == 0)[..., None]
    grad = grad.masked_fill(blind if allowed is None else blind | ~allowed, 0.0)
    return _through_scores(grad - p * grad.sum(-1, keepdim=True), t, w)


def additive_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    mask: Tensor | None,
    valid_lens: Tensor | None,
    out: Tensor,
    statistics: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """grad, out [batch, queries, d_v], statistics [2, batch, queries], the others as in the forward
    -> dq, dk, dv in the dtypes of q, k, v, dw [hidden] in the compute dtype. out and statistics are recomputed, so that
    this function is itself differentiable."""
    wide = compute_dtype(q.dtype)
    allowed = _allowed(mask, valid_lens, k.shape[1])
    wide_k, wide_v = _without_dead(allowed, k.to(wide), v.to(wide))
    dq, dk, dv, dw = [], torch.zeros_like(wide_k), torch.zeros_like(wide_v), q.new_zeros(w.shape, dtype=wide)
    for chunk in chunks(q.shape[1], k.numel()):
        part = (grad[:, chunk].to(wide), q[:, chunk].to(wide), wide_k, wide_v, w.to(wide), _rows(allowed, chunk))
        found = recomputed(_attention_chunk, *part)
        dq.append(found[0])
        dk, dw, dv = dk + found[1], dw + found[2], dv + found[3]
    return torch.cat(dq, 1).to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous(), dw


def additive_pointer_backward(
    grad: Tensor, q: Tensor, k: Tensor, w: Tensor, mask: Tensor | None, valid_lens: Tensor | None, statistics: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [batch, queries, keys], the others as in the forward -> dq, dk, dw as in additive_attention_backward."""
    wide = compute_dtype(q.dtype)
    allowed = _allowed(mask, valid_lens, k.shape[1])
    (wide_k,) = _without_dead(allowed, k.to(wide))
    dq, dk, dw = [], torch.zeros_like(wide_k), q.new_zeros(w.shape, dtype=wide)
    for chunk in chunks(q.shape[1], k.numel()):
        part = (grad[:, chunk].to(wide), q[:, chunk].to(wide), wide_k, w.to(wide), _rows(allowed, chunk))
        found = recomputed(_pointer_chunk, *part)
        dq.append(found[0])
        dk, dw = dk + found[1], dw + found[2]
    return torch.cat(dq, 1).to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dw
