"""Attention of few queries over a cache in plain PyTorch: the meaning of the room `attention_decode`.

    positions of sequence b: n_new new tokens at lens_b .. total_b - 1, total_b = lens_b + n_new
    k_new and the queries are turned by the angles of their positions (RoPE), k_new and v_new are written to the cache
    O = attention(q, cache[:total_b]), the last query at position total_b - 1           (fastdl/reference/attention.py)

A cache holds float32, float16, bfloat16, or Q8_0 (GGUF): blocks of 32 values as float16 d and 32 int8 codes, value =
d * code. Queries, scores and sums are float32; keys are rounded to the cache's type when they are written.

Test: tests/test_attention_decode.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..quant.formats import FORMATS
from .attention import attention_forward, laid_out, output_like
from .rope import rope

Q8_0 = FORMATS["q8_0"]


def to_q8_0(x: Tensor) -> Tensor:
    """floating [..., n], n a multiple of 32 -> uint8 [..., n / 32 * 34], ggml's rule to the bit"""
    return Q8_0.encode(x.float().reshape(-1, 32)).reshape(*x.shape[:-1], x.shape[-1] // 32 * 34)


def from_q8_0(x: Tensor) -> Tensor:
    """uint8 [..., n / 32 * 34] -> float32 [..., n]"""
    return Q8_0.decode(x.reshape(-1, 34), torch.float32).reshape(*x.shape[:-1], x.shape[-1] // 34 * 32)


def rows_of(cache: Tensor, block_table: Tensor | None, b: int, start: int, end: int) -> tuple[Tensor, ...]:
    """Indices of the rows start .. end - 1 of sequence b, for cache[i, :, j]: int64 [n] each."""
    places = torch.arange(start, end, device=cache.device)
    if block_table is None:
        return torch.full_like(places, b), places
    size = cache.shape[2]
    return block_table[b].long()[places // size], places % size


def attention_decode(
    q: Tensor,
    k_new: Tensor | None,
    v_new: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    lens: Tensor,
    block_table: Tensor | None,
    cos_sin: Tensor | None,
    slopes: Tensor | None,
    interleaved: bool,
    scale: float,
    softcap: float,
    left: int,
    right: int,
) -> tuple[Tensor, Tensor]:
    """
    q [B, H, n_q, D], k_new [B, G, n_new, D], v_new [B, G, n_new, D_v] or None, lens int32 [B]: how many positions the
    cache held before
    k_cache [B, G, capacity, D], v_cache [B, G, capacity, D_v]; with block_table int32 [B, blocks]: [all blocks, G,
    block, D]; written
    cos_sin float32 [positions, rope_dim] or None; slopes float32 [1 or B, H] or None; the rest as attention_forward's

    Returns O [B, H, n_q, D_v] in the dtype of q, lse float32 [B, H, n_q].
    """
    packed = k_cache.dtype == torch.uint8
    n_q, n_new = q.shape[2], 0 if k_new is None else k_new.shape[2]
    outs, sums = [], []
    for b, held in enumerate(lens.tolist()):
        total = held + n_new
        query = q[b].float()
        if cos_sin is not None:
            query = rope(query, cos_sin[total - n_q : total], interleaved)
        if n_new:
            key = k_new[b].float()
            key = key if cos_sin is None else rope(key, cos_sin[held:total], interleaved)
            for cache, new in ((k_cache, key), (v_cache, v_new[b].float())):
                first, second = rows_of(cache, block_table, b, held, total)
                cache[first, :, second] = (to_q8_0(new) if packed else new.to(cache.dtype)).transpose(0, 1)
        cached = []
        for cache in (k_cache, v_cache):
            first, second = rows_of(cache, block_table, b, 0, total)
            rows = cache[first, :, second].transpose(0, 1)
            cached.append((from_q8_0(rows) if packed else rows.float())[None])
        slope = None if slopes is None else slopes[b : b + 1] if slopes.shape[0] > 1 else slopes
        out, lse = attention_forward(query[None], *cached, *[None] * 5, slope, None, 0.0, scale, softcap, left, right)
        outs.append(out.to(q.dtype))
        sums.append(lse)
    if not outs:
        width = v_cache.shape[3] // 34 * 32 if packed else v_cache.shape[3]
        return output_like(q, width), q.new_empty(q.shape[:3], dtype=torch.float32)
    return laid_out(torch.cat(outs), q), torch.cat(sums)
