"""Attention in plain PyTorch: the meaning of the room `attention`, forward and backward by explicit formula.

    t_ij = scale * q_i . k_j                        s_ij = softcap * tanh(t_ij / softcap)    (softcap 0: t_ij)
    s_ij += bias_ij - slope_h * |i + n_k - n_q - j|       minus infinity where query i does not see key j
    P_ij = exp(s_ij - lse_i),   lse_i = log sum_j exp(s_ij),   O_i = sum_j D_ij P_ij v_j

D is dropout's mask over 1 - p. Query head h reads key head h // (heads / kv_heads). Query i of n_q stands at position
i + n_k - n_q, the last at the last key, and sees the keys from position - left to position + right (-1: unlimited)
that mask, lens and a bias of -inf leave. A query that sees no key has O = 0, lse = -inf and no gradient; a key that
no query sees adds nothing, whatever its k and v hold.

    dP_ij = D_ij dO_i . v_j     ds_ij = P_ij (dP_ij - dO_i . O_i + dlse_i)     dt_ij = ds_ij (1 - tanh^2)
    dq_i = scale * sum_j dt_ij k_j,  dk_j = scale * sum_i dt_ij q_i,  dv_j = sum_i D_ij P_ij dO_i,  dbias_ij = ds_ij

Everything is float32 inside (float64 for float64). Queries come in chunks, so that no matrix of all queries and
all keys is ever held, also while the backward pass is differentiated.

Vaswani et al. (2017); grouped heads: Ainslie et al. (2023); ALiBi: Press et al. (2022).  Test: tests/test_attention.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .norm import compute_dtype
from .philox import uniform

CHUNK = 1 << 22  # scores held at once


@dataclass(frozen=True)
class Chunk:
    """Some consecutive queries and all keys of their sequence. shift: position of the first of them among the keys."""

    rows: slice
    keys: slice
    shift: int
    last: bool  # of its sequence


def chunks(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> Iterator[Chunk]:
    """q [B, H, n_q, D], k [B, G, n_k, D]; cu_q, cu_k int32 [sequences + 1]: where packed sequences begin and end."""
    starts = [0, q.shape[2]] if cu_q is None else cu_q.tolist()
    keys = [0, k.shape[2]] if cu_k is None else cu_k.tolist()
    for (row0, row1), (key0, key1) in zip(pairwise(starts), pairwise(keys), strict=True):
        step = max(1, CHUNK // max(1, q.shape[0] * q.shape[1] * (key1 - key0)))
        for row in range(row0, row1, step) or [row0]:  # a sequence without queries has one empty chunk
            end = min(row + step, row1)
            yield Chunk(slice(row, end), slice(key0, key1), key1 - key0 - (row1 - row), end == row1)


def output_like(q: Tensor, width: int, dtype: torch.dtype | None = None) -> Tensor:
    """Uninitialised [B, H, n, width], heads inside the length where q has them so: what all back ends return."""
    batch, heads, length, _ = q.shape
    if heads_inside(q):
        return q.new_empty(batch, length, heads, width, dtype=dtype).transpose(1, 2)
    return q.new_empty(batch, heads, length, width, dtype=dtype)


def heads_inside(q: Tensor) -> bool:
    """Whether q [B, H, n, D] is a [B, n, H, D] seen transposed."""
    return q.shape[1] > 1 and q.shape[2] > 1 and q.stride(1) < q.stride(2)


def laid_out(y: Tensor, q: Tensor) -> Tensor:
    """y with the memory order of output_like(q)."""
    return y.transpose(1, 2).contiguous().transpose(1, 2) if heads_inside(q) else y.contiguous()


def _grouped(t: Tensor, groups: int) -> Tensor:
    """[B, H, n, m] -> [B, groups, H / groups, n, m]; one head for all stays one."""
    return t.unsqueeze(1) if t.shape[1] == 1 else t.unflatten(1, (groups, t.shape[1] // groups))


def _part(t: Tensor, dim: int, part: slice) -> Tensor:
    """The part of a dimension that is not broadcast."""
    return t if t.shape[dim] == 1 else t.narrow(dim, part.start, part.stop - part.start)


@dataclass(frozen=True)
class Rest:
    """The arguments of the ops beside q, k, v and bias."""

    mask: Tensor | None
    lens: Tensor | None
    slopes: Tensor | None
    seed: Tensor | None
    p: float
    scale: float
    softcap: float
    left: int
    right: int
    shape: tuple[int, int, int, int]  # of all scores

    def seen(self, chunk: Chunk, groups: int, bias: Tensor | None, device: torch.device) -> Tensor:
        """bool, broadcastable to [B, groups, heads, rows, keys], of five dimensions. bias: of the chunk, or None"""
        rows, keys = chunk.rows.stop - chunk.rows.start, chunk.keys.stop - chunk.keys.start
        distance = self.distance(chunk, device)
        seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
        if self.left >= 0:
            seen = seen & (distance <= self.left)
        if self.right >= 0:
            seen = seen & (-distance <= self.right)
        if self.lens is not None:
            lens = self.lens if self.lens.dim() == 1 else self.lens[:, chunk.rows]
            lens = lens.view(lens.shape[0], 1, 1, -1, 1)
            seen = seen & (torch.arange(keys, device=device) < lens)
        if self.mask is not None:
            seen = seen & _grouped(_part(_part(self.mask, 2, chunk.rows), 3, chunk.keys), groups)
        if bias is not None:
            seen = seen & (bias != -torch.inf)
        return seen.view((1,) * (5 - seen.dim()) + seen.shape)

    @staticmethod
    def distance(chunk: Chunk, device: torch.device) -> Tensor:
        """int64 [rows, keys]: how far a key lies before its query."""
        rows = torch.arange(chunk.rows.stop - chunk.rows.start, device=device) + chunk.shift
        return rows[:, None] - torch.arange(chunk.keys.stop - chunk.keys.start, device=device)

    def kept(self, chunk: Chunk, groups: int, device: torch.device) -> Tensor:
        """bool [B, groups, heads, rows, keys]: what dropout keeps."""
        batch, heads, n_q, n_k = self.shape
        plane = torch.arange(batch * heads, device=device).view(batch, groups, heads // groups, 1, 1)
        row = torch.arange(chunk.rows.start, chunk.rows.stop, device=device)[:, None]
        key = torch.arange(chunk.keys.start, chunk.keys.stop, device=device)
        return uniform(self.seed, (plane * n_q + row) * n_k + key) >= self.p


def _without_hidden(t: Tensor, seen: Tensor) -> Tensor:
    """k or v [B, G, 1, keys, *] with zeros where no query sees the key: it adds nothing, whatever lies there."""
    return t.masked_fill(~seen.any(2, keepdim=True).any(3).unsqueeze(-1), 0.0)


def _probabilities(
    q: Tensor, k: Tensor, bias: Tensor | None, seen: Tensor, chunk: Chunk, rest: Rest
) -> tuple[Tensor, Tensor, Tensor | None]:
    """q [B, G, R, rows, D], k [B, G, 1, keys, D], bias broadcastable -> P [B, G, R, rows, keys], lse [B, G, R, rows],
    and tanh(t / softcap), all float32."""
    groups, tanh = k.shape[1], None
    s = rest.scale * (q @ k.transpose(-1, -2))
    if rest.softcap > 0:
        tanh = torch.tanh(s / rest.softcap)
        s = rest.softcap * tanh
    if bias is not None:
        s = s + bias
    if rest.slopes is not None:
        slopes = rest.slopes.to(s.dtype).view(rest.slopes.shape[0], groups, -1, 1, 1)
        s = s - slopes * rest.distance(chunk, q.device).abs()
    s = s.masked_fill(~seen, -torch.inf)
    # A row without keys has the greatest score -inf; 0 in its place makes its P 0 and not NaN.
    top = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_full((*s.shape[:-1], 1), -torch.inf)
    top = torch.where(top == -torch.inf, torch.zeros_like(top), top)
    weights = torch.exp(s - top)
    total = weights.sum(-1, keepdim=True)
    blind = total == 0
    p = weights / torch.where(blind, torch.ones_like(total), total)
    lse = torch.where(blind, -torch.inf, top + torch.log(torch.where(blind, torch.ones_like(total), total)))
    return p, lse.squeeze(-1), tanh


def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    """
    q [B, H, n_q, D], k [B, G, n_k, D], v [B, G, n_k, D_v]; cu_q, cu_k int32 [sequences + 1]: B is 1 and n_q, n_k are
    the lengths of all sequences together, else None
    bias, mask (bool) [B or 1, H or 1, n_q or 1, n_k or 1], lens int32 [B] or [B, n_q], slopes float32 [B or 1, H],
    seed int64 [1], or None; p: of dropout; softcap 0: none; left, right -1: unlimited

    Returns O [B, H, n_q, D_v] in the dtype of q, lse float32 [B, H, n_q].
    """
    wide, groups = compute_dtype(q.dtype), k.shape[1]
    rest = Rest(mask, lens, slopes, seed, p, scale, softcap, left, right, (*q.shape[:3], k.shape[2]))
    outs, sums = [], []
    for chunk in chunks(q, k, cu_q, cu_k):
        qs = _grouped(q[:, :, chunk.rows].to(wide), groups)
        ks, vs = (t[:, :, chunk.keys].to(wide).unsqueeze(2) for t in (k, v))
        shaped = _bias_of(bias, chunk, groups, wide)
        seen = rest.seen(chunk, groups, shaped, q.device)
        ks, vs = (_without_hidden(t, seen) for t in (ks, vs))
        weights, lse, _ = _probabilities(qs, ks, shaped, seen, chunk, rest)
        if seed is not None:
            weights = torch.where(rest.kept(chunk, groups, q.device), weights / _kept(p), 0.0)
        outs.append((weights @ vs).flatten(1, 2))
        sums.append(lse.flatten(1, 2))
    out = torch.cat(outs, 2) if outs else q.new_zeros(*q.shape[:3], v.shape[3], dtype=wide)
    lse = torch.cat(sums, 2) if sums else q.new_full(q.shape[:3], -torch.inf, dtype=wide)
    return laid_out(out.to(q.dtype), q), lse


def _kept(p: float) -> float:
    return 1.0 - p if p < 1 else 1.0


def _bias_of(bias: Tensor | None, chunk: Chunk, groups: int, wide: torch.dtype) -> Tensor | None:
    if bias is None:
        return None
    return _grouped(_part(_part(bias, 2, chunk.rows), 3, chunk.keys).to(wide), groups)


def attention_backward(
    grad: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    lens: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    slopes: Tensor | None,
    seed: Tensor | None,
    p: float,
    scale: float,
    softcap: float,
    left: int,
    right: int,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias. grad like O, grad_lse float32 like lse or None; out and lse, which kernels use,
    are computed again, so that this can be differentiated. dbias float32 has the shape of bias, [0] if not needed.
    """
    wide, groups = compute_dtype(q.dtype), k.shape[1]
    rest = Rest(mask, lens, slopes, seed, p, scale, softcap, left, right, (*q.shape[:3], k.shape[2]))
    parts, dbias = [], None
    dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
    if need_bias:
        dbias = torch.zeros_like(bias, dtype=wide)
    for chunk in chunks(q, k, cu_q, cu_k):

        def gradients(grad, grad_lse, q, k, v, bias, chunk=chunk):
            """[B, H, rows, *], [B, G, keys, *] and a broadcastable bias, of the chunk -> their gradients"""
            heads = q.shape[1] // groups
            qs, do = (t.to(wide).unflatten(1, (groups, heads)) for t in (q, grad))
            ks, vs = (t.to(wide).unsqueeze(2) for t in (k, v))
            shaped = None if bias is None else _grouped(bias.to(wide), groups)
            seen = rest.seen(chunk, groups, shaped, q.device)
            ks, vs = (_without_hidden(t, seen) for t in (ks, vs))
            weights, _, tanh = _probabilities(qs, ks, shaped, seen, chunk, rest)
            dropped, dp = weights, do @ vs.transpose(-1, -2)
            if seed is not None:
                kept = rest.kept(chunk, groups, q.device)
                dropped, dp = (torch.where(kept, t / _kept(p), 0.0) for t in (weights, dp))
            ds = weights * (dp - (weights * dp).sum(-1, keepdim=True))
            if grad_lse is not None:
                ds = ds + weights * grad_lse.to(wide).unflatten(1, (groups, heads)).unsqueeze(-1)
            dt = ds if tanh is None else ds * (1 - tanh * tanh)
            dq = rest.scale * (dt @ ks).flatten(1, 2)
            dk = rest.scale * (dt.transpose(-1, -2) @ qs).sum(2)
            dv = (dropped.transpose(-1, -2) @ do).sum(2)
            return dq, dk, dv, None if dbias is None else ds.flatten(1, 2).sum_to_size(bias.shape)

        arguments = [t[:, :, chunk.rows] if t is not None else None for t in (grad, grad_lse, q)]
        arguments += [t[:, :, chunk.keys] for t in (k, v)]
        arguments.append(None if bias is None else _part(_part(bias, 2, chunk.rows), 3, chunk.keys))
        # Differentiated, a chunk is computed again instead of being kept.
        results = (
            checkpoint(gradients, *arguments, use_reentrant=False) if torch.is_grad_enabled() else gradients(*arguments)
        )
        parts.append(results[0])
        dk[:, :, chunk.keys] += results[1]
        dv[:, :, chunk.keys] += results[2]
        if dbias is not None:
            _part(_part(dbias, 2, chunk.rows), 3, chunk.keys).add_(results[3])
    dq = torch.cat(parts, 2) if parts else torch.zeros_like(q, dtype=wide)
    dq, dk, dv = (laid_out(d.to(t.dtype), t) for d, t in ((dq, q), (dk, k), (dv, v)))
    return dq, dk, dv, q.new_empty(0, dtype=wide) if dbias is None else dbias
