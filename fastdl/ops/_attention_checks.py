"""The arguments of `ops.attention`: checked, and brought to the form that the ops take."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ._checks import check_dense, check_finite, check_flag, check_number, check_optional
from ._masks import autocast_dtype, broadcastable, check_ints, check_mask, check_valid_lens, values_are_known

_UNLIMITED = 1 << 29  # lengths are below; kernels add a window to a position in an int
_CAPS = (1e-30, 1e30)  # float32 holds them, their inverse and their product with log2(e)


@dataclass(frozen=True)
class Call:
    """q, k, v [batch, heads, n, d] with the last dimension contiguous; the others as fastdl/reference/attention.py."""

    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    mask: Tensor | None
    lens: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    slopes: Tensor | None
    dropout_p: float
    scale: float
    softcap: float
    left: int
    right: int


def check_call(
    q, k, v, *, causal, scale, bias, mask, valid_lens, cu_seqlens_q, cu_seqlens_k, window, softcap, alibi_slopes,
    dropout_p,
) -> Call:  # fmt: skip
    check_qkv(q, k, v)
    lead, heads, n_q, n_k = q.shape[:-3], q.shape[-3], q.shape[-2], k.shape[-2]
    batch = math.prod(lead)
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    cu_q = cu_k = None
    if packed:
        given = (("bias", bias), ("mask", mask), ("valid_lens", valid_lens))
        for name in (name for name, value in given if value is not None):
            raise ValueError(
                f"{name}: excluded by cu_seqlens_q, which packs sequences of different lengths; pad them instead"
            )
        if batch != 1:
            raise ValueError(f"q: expected shape [heads, total, head_dim] with cu_seqlens_q, got {tuple(q.shape)}")
        if cu_seqlens_q is None:
            raise ValueError("cu_seqlens_q: expected the ends of the queries' sequences beside cu_seqlens_k, got None")
        cu_q = check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, n_q, q.device)
        cu_k = check_cu_seqlens("cu_seqlens_k" if cu_seqlens_k is not None else "cu_seqlens_q",
                                cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k, n_k, q.device)  # fmt: skip
        if cu_k.shape != cu_q.shape:
            raise ValueError(
                f"cu_seqlens_k: expected as many as cu_seqlens_q, {tuple(cu_q.shape)}, got {tuple(cu_k.shape)}"
            )
    scores = (*lead, heads, n_q, n_k)
    check_optional("bias", bias)
    bias = None if bias is None else _flat(broadcastable("bias", bias, scores, q.device), lead)
    mask = check_mask(mask, scores, q.device)
    mask = None if mask is None else _flat(mask, lead)
    if valid_lens is not None and len(lead) != 1 and isinstance(valid_lens, Tensor):
        shape = tuple(valid_lens.shape)
        if shape in (tuple(lead), (*lead, n_q)):
            valid_lens = valid_lens.reshape(batch, *shape[len(lead) :])
    lens = check_valid_lens(valid_lens, batch, n_q, n_k, q.device)
    left, right = check_window(window, causal)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    check_finite("scale", scale)
    softcap = check_softcap(softcap)
    check_number("dropout_p", dropout_p)
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p: expected 0 <= p <= 1, got {dropout_p}")
    slopes = check_slopes(alibi_slopes, batch, heads, q.device)
    narrow = autocast_dtype(q)
    if narrow is not None:
        q, k, v = (t.to(narrow) for t in (q, k, v))
    q, k, v = (_plain(t.reshape(batch, *t.shape[-3:]) if len(lead) != 1 else t) for t in (q, k, v))
    return Call(
        q,
        k,
        v,
        bias,
        mask,
        lens,
        cu_q,
        cu_k,
        slopes,
        float(dropout_p),
        float(scale),
        softcap,
        left,
        right,
    )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise unless q [..., heads, n_q, d], k [..., kv_heads, n_k, d] and v [..., kv_heads, n_k, d_v] fit."""
    for name, t in (("q", q), ("k", k), ("v", v)):
        check_dense(name, t)
        if t.dim() < 3 or t.dim() != q.dim():
            raise ValueError(
                f"{name}: expected [..., heads, length, head_dim] with as many dimensions as q, got {tuple(t.shape)}"
            )
        if t.device != q.device:
            raise ValueError(f"{name}: expected the device of q, {q.device}, got {t.device}; move one to the other")
        if t.dtype != q.dtype and autocast_dtype(q) is None:
            raise TypeError(f"{name}: expected the dtype of q, {q.dtype}, got {t.dtype}; convert one to the other")
        if t.shape[-1] == 0:
            raise ValueError(f"{name}: expected a last dimension of at least 1, got {tuple(t.shape)}")
    if q.shape[:-3] != k.shape[:-3]:
        raise ValueError(f"k: expected the batch of q, {tuple(q.shape[:-3])}, got {tuple(k.shape[:-3])}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"k: expected the head_dim of q, {q.shape[-1]}, as last dimension, got {k.shape[-1]}")
    if k.shape[-3] == 0 or q.shape[-3] % k.shape[-3]:
        raise ValueError(f"k: expected a number of heads that divides q's {q.shape[-3]}, got {k.shape[-3]}")
    for dim, what in ((-3, "heads"), (-2, "length")):
        if k.shape[dim] != v.shape[dim]:
            raise ValueError(f"v: expected the {what} of k, {k.shape[dim]}, as dimension {dim}, got {v.shape[dim]}")
    if k.shape[:-3] != v.shape[:-3]:
        raise ValueError(f"v: expected the batch of k, {tuple(k.shape[:-3])}, got {tuple(v.shape[:-3])}")


def check_cu_seqlens(name: str, value: Tensor, total: int, device: torch.device) -> Tensor:
    """int32 [sequences + 1] on the device; raises unless it starts at 0, never falls and ends at total."""
    check_ints(name, value)
    if value.dim() != 1 or value.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [sequences + 1], got {tuple(value.shape)}")
    if values_are_known(value):
        ends = value.tolist()
        if ends[0] != 0 or ends[-1] != total:
            raise ValueError(f"{name}: expected values from 0 to {total}, the length, got {ends[0]} to {ends[-1]}")
        falls = next((i for i, (a, b) in enumerate(pairwise(ends)) if b < a), None)
        if falls is not None:
            raise ValueError(
                f"{name}: expected values that never fall, got {ends[falls]} before {ends[falls + 1]} at place {falls}"
            )
    return value.to(device, torch.int32, non_blocking=True).contiguous()


def check_softcap(softcap: float | None) -> float:
    """0.0 for no cap"""
    if softcap is None:
        return 0.0
    check_number("softcap", softcap)
    if not _CAPS[0] <= softcap <= _CAPS[1]:
        raise ValueError(
            f"softcap: expected a number > 0 ({_CAPS[0]:g} to {_CAPS[1]:g}), or None for no cap, got {softcap}"
        )
    return float(softcap)


def check_window(window: tuple[int, int] | None, causal: bool) -> tuple[int, int]:
    """left and right as the ops take them; causal: nothing to the right"""
    check_flag("causal", causal)
    if window is None:
        return -1, 0 if causal else -1
    if not isinstance(window, (tuple, list)) or len(window) != 2 or not all(isinstance(n, int) for n in window):
        raise TypeError(f"window: expected (left, right), two ints, got {window!r}")
    if min(window) < -1:
        raise ValueError(f"window: expected numbers of keys, or -1 for no limit, got {tuple(window)}")
    left, right = (n if n < _UNLIMITED else -1 for n in window)
    return left, 0 if causal else right


def check_slopes(slopes: Tensor | None, batch: int, heads: int, device: torch.device) -> Tensor | None:
    """float32 [1 or batch, heads]"""
    if slopes is None:
        return None
    check_optional("alibi_slopes", slopes)
    if tuple(slopes.shape) not in ((heads,), (batch, heads)):
        raise ValueError(
            f"alibi_slopes: expected shape ({heads},) or ({batch}, {heads}), a slope a head, got {tuple(slopes.shape)}"
        )
    if slopes.device != device:
        raise ValueError(
            f"alibi_slopes: expected the device of q, {device}, got {slopes.device}; move one to the other"
        )
    if slopes.requires_grad and torch.is_grad_enabled():
        raise ValueError("alibi_slopes: expected constants, got a tensor that requires a gradient; pass a bias instead")
    return slopes.detach().float().view(-1, heads).contiguous()


def _flat(t: Tensor, lead: torch.Size) -> Tensor:
    """t [*lead or ones, h, i, j] -> [batch or 1, h, i, j] with the last dimension contiguous or of size 1."""
    if len(lead) != 1:
        alone = math.prod(t.shape[:-3]) == 1
        t = t.reshape(1, *t.shape[-3:]) if alone else t.expand(*lead, *t.shape[-3:]).reshape(-1, *t.shape[-3:])
    return t if t.shape[-1] == 1 or t.stride(-1) == 1 else t.contiguous()


def _plain(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()
