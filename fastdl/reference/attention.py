"""Scaled dot-product attention with grouped heads in plain PyTorch: the meaning of the op.

    S = scale * Q K^T,    P = softmax(S over the keys that are seen),    O = P V

Query head h reads key/value head h // (n_heads / n_kv_heads).  Causal: the last query stands at the last key, so query
i of n_q sees keys 0 .. n_k - n_q + i; new tokens then attend to a cache plus themselves without further arguments.  A
query that sees no key gives zeros.  Everything is float32 inside (float64 for float64); O has the dtype of q.

Vaswani et al. (2017); grouped heads: Ainslie et al., "GQA" (2023).  Test: tests/test_attention.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .norm import compute_dtype


def seen_keys(n_q: int, n_k: int, device: torch.device) -> Tensor:
    """bool [n_q, n_k]: True where a causal query sees the key."""
    return torch.ones(n_q, n_k, dtype=torch.bool, device=device).tril(n_k - n_q)


def _grouped(t: Tensor, groups: int) -> Tensor:
    """[..., heads, n, d] -> [..., groups, heads / groups, n, d]."""
    return t.unflatten(-3, (groups, t.shape[-3] // groups))


def _probabilities(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    """q [..., groups, heads, n_q, d], k [..., groups, 1, n_k, d] -> P [..., groups, heads, n_q, n_k]."""
    scores = (q @ k.transpose(-1, -2)) * scale
    if causal:
        seen = seen_keys(q.shape[-2], k.shape[-2], q.device)
        scores = scores.masked_fill(~seen, float("-inf"))
        # a row without any key has softmax 0/0: zero it, for its gradient too
        blind = ~seen.any(-1, keepdim=True)
        return torch.softmax(scores.masked_fill(blind, 0.0), dim=-1).masked_fill(~seen, 0.0)
    return torch.softmax(scores, dim=-1)


def attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> Tensor:
    """q [..., n_heads, n_q, d], k [..., n_kv_heads, n_k, d], v [..., n_kv_heads, n_k, d_v] -> [..., n_heads, n_q,
    d_v]."""
    wide = compute_dtype(q.dtype)
    groups = k.shape[-3]
    p = _probabilities(_grouped(q.to(wide), groups), k.to(wide).unsqueeze(-3), causal, scale)
    return (p @ v.to(wide).unsqueeze(-3)).flatten(-4, -3).to(q.dtype)


def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, by formula; heads of one group add up.

    dV = P^T dO,   dP = dO V^T,   dS = P * (dP - rowsum(P * dP)),   dQ = scale * dS K,   dK = scale * dS^T Q.
    """
    wide = compute_dtype(q.dtype)
    groups = k.shape[-3]
    d_out, qg = _grouped(grad.to(wide), groups), _grouped(q.to(wide), groups)
    kg, vg = k.to(wide).unsqueeze(-3), v.to(wide).unsqueeze(-3)
    p = _probabilities(qg, kg, causal, scale)
    d_p = d_out @ vg.transpose(-1, -2)
    d_s = p * (d_p - (p * d_p).sum(-1, keepdim=True)) * scale
    d_q = (d_s @ kg).flatten(-4, -3)
    d_k = (d_s.transpose(-1, -2) @ qg).sum(-3)
    d_v = (p.transpose(-1, -2) @ d_out).sum(-3)
    return d_q.to(q.dtype), d_k.to(k.dtype), d_v.to(v.dtype)
