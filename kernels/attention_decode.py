"""Room attention_decode in Triton (contract: fastdl/ops/attention_decode.py; meaning:
fastdl/reference/attention_decode.py).

    append   a program a new position of a key head: k_new turned, v_new as it is, in the cache's type
    split    a program a part of the keys of one key head of one sequence, and 16 queries of the heads that share it
    merge    a program a query: the parts of its keys, in order

The grid follows from the capacity, never from the lengths, which only the GPU knows: no call waits for it, and a CUDA
graph can hold the call. Programs behind a sequence's length do nothing. Parts are cut by position alone.

Queries and weights are float32. Against a 16-bit cache each is PARTS numbers of the cache's type that add up to it, as
in csrc/cuda/attention_decode_tile.cuh; against float32 and Q8_0 (and bfloat16 where tensor cores lack it: compute
capability 7.5, and the interpreter) products are float32. Floor: the bytes of the cache over the bandwidth.

Dao et al., "Flash-Decoding" (2023).  Test: pytest tests/test_attention_decode.py        Table: configs.py
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.attention import output_like
from ._attention import LN2, LOG2E
from ._attention_launch import block, strides
from ._common import Case, capability, case, on, tanh
from .configs import blocks, config

__all__ = ["attention_decode", "compile_cases"]

PART, ROWS = 256, 64  # keys of a part; for more queries a key head than this, as many times more keys
# Arguments that Triton shall not make a constant of when they are 1, nor a kernel each for when 16 divides them.
FREE = (
    "heads", "kv_heads", "n_q", "n_new", "tiles", "part", "parts", "capacity", "size", "rows_of_cache", "table_b",
    "positions", "left", "right", "slopes_b",
)  # fmt: skip


@triton.jit
def _lengths(lens, b, n_new, capacity):
    """Positions of sequence b, n_new of them new, never more than there is room for."""
    held = tl.minimum(tl.maximum(tl.load(lens + b), 0), capacity)
    return tl.minimum(held + n_new, capacity)


@triton.jit
def _first(total, n_q, left, part, LEFT: tl.constexpr):
    """The first part that a query of the sequence sees."""
    if LEFT:
        return tl.maximum(total - n_q - left, 0) // part
    else:
        return 0


@triton.jit
def _places(table, b, at, valid, size, rows_of_cache, table_b):
    """(row of the cache, position in it, whether there is one) of positions `at` of sequence b."""
    if table is None:
        return at * 0 + b, at, valid
    else:
        row = tl.load(table + b.to(tl.int64) * table_b + at // size, mask=valid, other=-1)
        return row, at % size, valid & (row >= 0) & (row < rows_of_cache)


@triton.jit
def _turned(x, col, d, position, cos_sin, positions, rope_dim, INTERLEAVED: tl.constexpr):
    """float32 [rows, cols]: the first d [rows, 1] elements of rows at x, turned by the angles of `position` [rows, 1]
    (clamped to the table). x: a pointer or [rows, 1] of them; col [1, cols]."""
    inside = col < d
    y = tl.load(x + col, mask=inside, other=0.0).to(tl.float32)
    if cos_sin is None:
        return y
    else:
        half = rope_dim // 2
        if INTERLEAVED:
            first, other, pair = col % 2 == 0, col ^ 1, col // 2
        else:
            first = col < half
            other, pair = tl.where(first, col + half, col - half), tl.where(first, col, col - half)
        inside = inside & (col < rope_dim)
        z = tl.load(x + other, mask=inside, other=0.0).to(tl.float32)
        angle = cos_sin + tl.minimum(tl.maximum(position, 0), positions - 1).to(tl.int64) * rope_dim + 2 * pair
        cos, sin = tl.load(angle, mask=inside, other=1.0), tl.load(angle + 1, mask=inside, other=0.0)
        return y * cos + tl.where(first, -z, z) * sin


# ---- Append ---------------------------------------------------------------------------------------------------------
@triton.jit
def _store_row(to, x, d, Q8: tl.constexpr, BLOCK: tl.constexpr):
    """The first d [1, 1] of x [1, BLOCK] to a row of the cache. Q8_0 by ggml's rule, to the bit: codes come from the
    unrounded scale."""
    if Q8:
        blocks: tl.constexpr = BLOCK // 32
        lane = tl.arange(0, 32)[None, :]
        number = tl.arange(0, blocks)[:, None]
        inside = number * 32 < d
        x = tl.reshape(x, [blocks, 32])
        scale = tl.div_rn(tl.max(tl.abs(x), 1), 127.0)[:, None]
        inverse = tl.where(scale != 0.0, tl.div_rn(1.0, tl.where(scale != 0.0, scale, 1.0)), 0.0)
        y = x * inverse
        size = tl.abs(y)
        whole = size.to(tl.int32)
        whole += (size - whole.to(tl.float32) >= 0.5).to(tl.int32)  # halves go away from zero
        code = tl.where(y < 0.0, -whole, whole)
        bits = scale.to(tl.float16).to(tl.uint16, bitcast=True)
        first = to + number * 34
        tl.store(first, (bits & 255).to(tl.uint8), mask=inside)
        tl.store(first + 1, (bits >> 8).to(tl.uint8), mask=inside)
        tl.store(first + 2 + lane, (code & 255).to(tl.uint8), mask=inside & (lane >= 0))
    else:
        col = tl.arange(0, BLOCK)[None, :]
        kind = to.dtype.element_ty
        if kind == tl.bfloat16:  # to nearest, ties to even; the interpreter would cut
            bits = x.to(tl.uint32, bitcast=True)
            bits = tl.where(x != x, bits | 0x400000, bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
            x = bits.to(tl.float32, bitcast=True)
        tl.store(to + col, x.to(kind), mask=col < d)


@triton.jit(do_not_specialize=FREE)
def append(
    k_new, v_new, k, v, lens, table, cos_sin, k_new_b, k_new_h, k_new_n, v_new_b, v_new_h, v_new_n, k_b, k_h, k_n, v_b,
    v_h, v_n, n_new, capacity, size, rows_of_cache, table_b, positions, rope_dim, d, d_v,
    INTERLEAVED: tl.constexpr, Q8: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (new position, key head, sequence). k_new, v_new [B, G, n_new, *]; k, v: the caches."""
    t, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    position = _lengths(lens, b, 0, capacity) + t + tl.zeros([1, 1], tl.int32)
    row, at, valid = _places(table, b, position, position < capacity, size, rows_of_cache, table_b)
    row, at, n = tl.where(valid, row, 0).to(tl.int64), at.to(tl.int64), t.to(tl.int64)
    col = tl.arange(0, BLOCK)[None, :]
    d, d_v = tl.where(valid, d, 0), tl.where(valid, d_v, 0)  # nothing where there is no place
    x = k_new + b * k_new_b + h * k_new_h + n * k_new_n
    x = _turned(x, col, d, position, cos_sin, positions, rope_dim, INTERLEAVED)
    _store_row(k + row * k_b + h * k_h + at * k_n, x, d, Q8, BLOCK)
    x = tl.load(v_new + b * v_new_b + h * v_new_h + n * v_new_n + col, mask=col < d_v, other=0.0)
    _store_row(v + row * v_b + h * v_h + at * v_n, x.to(tl.float32), d_v, Q8, BLOCK)


# ---- Parts of the keys ----------------------------------------------------------------------------------------------
@triton.jit
def _load_cache(at, valid, d, Q8: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr):
    """[KEYS, BLOCK] of a cache whose rows begin at `at` [KEYS], zeros where not valid; float32 if WIDE."""
    if Q8:
        blocks: tl.constexpr = BLOCK // 32
        number = tl.arange(0, blocks)[None, :]
        inside = valid[:, None] & (number * 32 < d)
        first = at[:, None] + number * 34
        low, high = tl.load(first, mask=inside, other=0), tl.load(first + 1, mask=inside, other=0)
        scale = (low.to(tl.uint16) | (high.to(tl.uint16) << 8)).to(tl.float16, bitcast=True).to(tl.float32)
        lane = tl.arange(0, 32)[None, None, :]
        code = tl.load(first[:, :, None] + 2 + lane, mask=inside[:, :, None], other=0).to(tl.int8, bitcast=True)
        return tl.reshape(code.to(tl.float32) * scale[:, :, None], [KEYS, BLOCK])
    else:
        col = tl.arange(0, BLOCK)[None, :]
        x = tl.load(at[:, None] + col, mask=valid[:, None] & (col < d), other=0.0)
        if WIDE:
            x = x.to(tl.float32)
        return x


@triton.jit
def _product(x, y, o, PARTS: tl.constexpr):
    """o + x y, with x float32 as PARTS numbers of the type of y, the smallest first."""
    if y.dtype == tl.float32:
        return tl.dot(x, y, o, input_precision="ieee")
    else:
        first = x.to(y.dtype)
        if PARTS == 1:
            return tl.dot(first, y, o)
        else:
            x -= first.to(tl.float32)
            second = x.to(y.dtype)
            if PARTS == 3:
                o = tl.dot((x - second.to(tl.float32)).to(y.dtype), y, o)
            return tl.dot(first, y, tl.dot(second, y, o))


@triton.jit(do_not_specialize=FREE)
def split(
    q, k, v, lens, table, cos_sin, slopes, outs, states, q_b, q_h, q_n, k_b, k_h, k_n, v_b, v_h, v_n, heads, kv_heads,
    n_q, n_new, tiles, part, parts, capacity, size, rows_of_cache, table_b, positions, rope_dim, d, d_v, factor, cap,
    left, right, slopes_b,
    INTERLEAVED: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, SOFTCAP: tl.constexpr, Q8: tl.constexpr,
    WIDE: tl.constexpr, PARTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (part x tile of queries, key head, sequence). q [B, H, n_q, d]; k, v: the caches; outs [B, G, parts,
    rows, d_v] and states [B, G, parts, rows, 2]: the greatest score and the sum. rows: n_q times the shared heads."""
    number, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    group, b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    total = _lengths(lens, b, n_new, capacity)
    if (number * part < total) & (number >= _first(total, n_q, left, part, LEFT)):
        shared = heads // kv_heads
        rows = shared * n_q
        index = tile * ROWS + tl.arange(0, ROWS)
        there = index < rows
        t, head = index % n_q, group * shared + index // n_q
        position = total - n_q + t
        col = tl.arange(0, BLOCK)[None, :]
        query = (q + b * q_b + head * q_h + t.to(tl.int64) * q_n)[:, None]
        width = tl.where(there, d, 0)[:, None]
        query = _turned(query, col, width, position[:, None], cos_sin, positions, rope_dim, INTERLEAVED)
        unit = tl.full([ROWS], 1.0, tl.float32)
        if not WIDE and k.dtype.element_ty == tl.float16:  # rows to the middle of what float16 can hold
            exponent = tl.max(tl.abs(query), 1).to(tl.int32, bitcast=True) >> 23
            exponent = tl.where((exponent > 16) & (exponent < 255), exponent, 135)
            unit = ((exponent - 8) << 23).to(tl.float32, bitcast=True)
            query *= (tl.minimum(262 - exponent, 254) << 23).to(tl.float32, bitcast=True)[:, None]
        unit = (unit * factor)[:, None]
        low, high = position * 0, position * 0 + total
        if LEFT:
            low = tl.maximum(position - left, 0)
        if RIGHT:
            high = tl.minimum(high, position + right + 1)
        begin = number * part
        end = tl.minimum(begin + part, total)
        begin = tl.maximum(begin, tl.min(tl.where(there, low, total), 0) // KEYS * KEYS)
        end = tl.minimum(end, tl.max(tl.where(there, high, 0), 0))
        lane = tl.arange(0, KEYS)
        o = tl.zeros([ROWS, BLOCK], tl.float32)
        top, sums = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
        for first in range(begin, end, KEYS):
            key = first + lane
            row, at, valid = _places(table, b, key, key < end, size, rows_of_cache, table_b)
            row, at = tl.where(valid, row, 0).to(tl.int64), at.to(tl.int64)
            keys = _load_cache(k + row * k_b + group * k_h + at * k_n, valid, d, Q8, WIDE, BLOCK, KEYS)
            s = _product(query, tl.trans(keys), tl.zeros([ROWS, KEYS], tl.float32), PARTS) * unit
            if SOFTCAP:
                s = tanh(s) * cap
            if slopes is not None:
                slope = tl.load(slopes + b * slopes_b + head, mask=there, other=0.0) * LOG2E
                s -= slope[:, None] * tl.abs(position[:, None] - key[None, :]).to(tl.float32)
            seen = valid[None, :] & (key[None, :] >= low[:, None]) & (key[None, :] < high[:, None])
            s = tl.where(seen, s, float("-inf"))
            greater = tl.maximum(top, tl.max(s, 1))
            base = tl.where(greater == float("-inf"), 0.0, greater)  # no key seen as yet: exp2(-inf - 0) = 0
            e = tl.exp2(s - base[:, None])
            shrink = tl.exp2(top - base)
            top, sums = greater, sums * shrink + tl.sum(e, 1)
            values = _load_cache(v + row * v_b + group * v_h + at * v_n, valid, d_v, Q8, WIDE, BLOCK, KEYS)
            o = _product(e, values, o * shrink[:, None], PARTS)
        place = ((b * kv_heads + group) * parts + number) * rows + index
        tl.store(states + place * 2, top, mask=there)
        tl.store(states + place * 2 + 1, sums, mask=there)
        tl.store(outs + (place * d_v)[:, None] + col, o, mask=there[:, None] & (col < d_v))


@triton.jit(do_not_specialize=FREE)
def merge(
    outs, states, lens, out, lse, out_b, out_h, out_n, heads, kv_heads, n_q, n_new, part, parts, capacity, d_v, left,
    LEFT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program: a query. ROWS parts at once. out [B, H, n_q, d_v], lse [B, H, n_q]."""
    t, plane = (tl.program_id(0) % n_q).to(tl.int64), (tl.program_id(0) // n_q).to(tl.int64)
    b, head = plane // heads, plane % heads
    shared = heads // kv_heads
    total = _lengths(lens, b, n_new, capacity)
    rows = tl.cast(shared, tl.int64) * n_q
    place = (b * kv_heads + head // shared) * parts * rows + head % shared * n_q + t
    begin, end = _first(total, n_q, left, part, LEFT), tl.cdiv(total, part)
    lane, col = tl.arange(0, ROWS), tl.arange(0, BLOCK)[None, :]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    for first in range(begin, end, ROWS):
        at = (place + (first + lane) * rows) * 2
        top = tl.maximum(top, tl.load(states + at, mask=first + lane < end, other=float("-inf")))
    greatest = tl.max(top, 0)
    base = tl.where(greatest == float("-inf"), 0.0, greatest)
    total_sum, o = tl.zeros([ROWS], tl.float32), tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(begin, end, ROWS):
        at, there = place + (first + lane) * rows, first + lane < end
        fade = tl.exp2(tl.load(states + at * 2, mask=there, other=float("-inf")) - base)
        total_sum += fade * tl.load(states + at * 2 + 1, mask=there, other=0.0)
        o += fade[:, None] * tl.load(outs + (at * d_v)[:, None] + col, mask=there[:, None] & (col < d_v), other=0.0)
    sums = tl.sum(total_sum, 0)
    blind = sums == 0.0
    sums = tl.where(blind, 1.0, sums)
    y = tl.sum(o, 0)[None, :] / sums
    to = out + b * out_b + head * out_h + t * out_n + col
    tl.store(to, y.to(out.dtype.element_ty), mask=col < d_v)
    tl.store(lse + plane * n_q + t, tl.where(blind, float("-inf"), greatest * LN2 + tl.log(sums)))


# ---- Launches -------------------------------------------------------------------------------------------------------
def _table(wide: bool) -> str:
    return f"attention_decode_split{'_float32' if wide else ''}"


def _wide(dtype: torch.dtype, cc: int | None) -> bool:
    """Whether products with a cache of this type are float32."""
    return dtype in (torch.float32, torch.uint8) or (dtype == torch.bfloat16 and (cc is None or cc < 80))


def _parts(query: torch.dtype, cache: torch.dtype, turned: bool) -> int:
    """How many numbers of the cache's type a query is."""
    if cache == torch.float16:
        return 2 if turned or query == torch.float32 else 1
    return 1 if query == cache and not turned else 3


def attention_decode(
    q, k_new, v_new, k_cache, v_cache, lens, block_table, cos_sin, slopes, interleaved, scale, softcap, left, right
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Arguments and results: fastdl/reference/attention_decode.py."""
    (batch, heads, n_q, d), (_, kv_heads, size, _) = q.shape, k_cache.shape
    q8 = k_cache.dtype == torch.uint8
    d_v = v_cache.shape[3] // 34 * 32 if q8 else v_cache.shape[3]
    n_new = 0 if k_new is None else k_new.shape[2]
    capacity = size * (1 if block_table is None else block_table.shape[1])
    out, lse = output_like(q, d_v), q.new_empty(q.shape[:3], dtype=torch.float32)
    cc, width = capability(q.device), block(max(d, d_v))
    shape: dict[str, Any] = {"n_new": n_new, "capacity": capacity, "size": size, "rows_of_cache": k_cache.shape[0]}
    shape |= {"lens": lens, "table": block_table, "table_b": 0 if block_table is None else block_table.shape[1]}
    shape |= {"cos_sin": cos_sin, "positions": 1, "rope_dim": 2, "d": d, "d_v": d_v, "k": k_cache, "v": v_cache}
    if cos_sin is not None and cos_sin.shape[0] == 0:
        cos_sin = None
    if cos_sin is not None:
        shape |= {"positions": cos_sin.shape[0], "rope_dim": cos_sin.shape[1]}
    shape |= {"INTERLEAVED": interleaved, "Q8": q8} | strides("k", k_cache, "bhn") | strides("v", v_cache, "bhn")
    with on(q.device):
        if n_new and capacity and batch:
            name = "attention_decode_append"
            options = config(name, cc, width).options | {"enable_fp_fusion": False}  # rounding must be ggml's
            append[(n_new, kv_heads, batch)](
                k_new=k_new, v_new=v_new, **strides("k_new", k_new, "bhn"), **strides("v_new", v_new, "bhn"), **shape,
                BLOCK=width, **options,
            )  # fmt: skip
        if not out.numel():
            return out, lse
        rows = heads // kv_heads * n_q
        part = PART * triton.cdiv(rows, ROWS)
        parts = triton.cdiv(capacity, part)
        places = batch * kv_heads * parts * rows
        outs, states = lse.new_empty(places * d_v), lse.new_empty(places * 2)
        far = n_q + capacity  # as good as unlimited, and sums of it stay in 32 bits
        sums: dict[str, Any] = {"outs": outs, "states": states, "heads": heads, "kv_heads": kv_heads, "n_q": n_q}
        sums |= {"part": part, "parts": parts, "left": min(left, far), "LEFT": left >= 0}
        if parts:
            wide = _wide(k_cache.dtype, cc)
            c = config(_table(wide), cc, width)
            tiles = triton.cdiv(rows, c.rows)
            log2e = math.log2(math.e)
            split[(parts * tiles, kv_heads, batch)](
                q=q, **strides("q", q, "bhn"), **shape, **sums, tiles=tiles, slopes=slopes,
                slopes_b=0 if slopes is None or slopes.shape[0] == 1 else heads,
                factor=scale / softcap if softcap > 0 else scale * log2e, cap=softcap * log2e, right=min(right, far),
                RIGHT=right >= 0, SOFTCAP=softcap > 0, WIDE=wide,
                PARTS=_parts(q.dtype, k_cache.dtype, cos_sin is not None), ROWS=c.rows, BLOCK=width, KEYS=c.keys,
                **c.options,
            )  # fmt: skip
        c = config("attention_decode_merge", cc, width)
        merge[(batch * heads * n_q,)](
            **sums, lens=lens, out=out, lse=lse, **strides("out", out, "bhn"), n_new=n_new, capacity=capacity, d_v=d_v,
            ROWS=c.rows, BLOCK=width, **c.options,
        )  # fmt: skip
    return out, lse


_TYPES = {"lens": "*i32", "table": "*i32", "cos_sin": "*fp32", "slopes": "*fp32", "outs": "*fp32", "states": "*fp32"}
_TYPES |= {"lse": "*fp32", "factor": "fp32", "cap": "fp32"}


def compile_cases(cc: int) -> Iterator[Case]:
    """Caches of each type: turned queries and pages with every option, and neither."""
    half = torch.float16 if cc < 80 else torch.bfloat16
    kinds = {torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.uint8: "*u8"}
    for cache in (half, torch.float32, torch.uint8):
        query = torch.float32 if cache == torch.float32 else half
        types = _TYPES | dict.fromkeys(("q", "k_new", "v_new", "out"), kinds[query])
        types |= dict.fromkeys(("k", "v"), kinds[cache])
        wide = _wide(cache, cc)
        for note, turned in (("plain", False), ("turned, with options", True)):
            flags = dict.fromkeys(("INTERLEAVED", "LEFT", "SOFTCAP"), turned) | {"RIGHT": True, "WIDE": wide}
            flags |= {"Q8": cache == torch.uint8, "PARTS": _parts(query, cache, turned)}
            flags |= {} if turned else dict.fromkeys(("table", "cos_sin", "slopes"))
            for name, kernel in ((_table(wide), split), ("attention_decode_append", append),
                                 ("attention_decode_merge", merge)):  # fmt: skip
                if kernel is merge and cache != half:
                    continue
                signature = {key: types.get(key, "i32") for key in kernel.arg_names}
                for width in blocks(name):
                    c = config(name, cc, width)
                    constants = {**flags, "KEYS": c.keys}
                    yield case(name, kernel, signature, width, c, constants, f"{kinds[cache][1:]} {note}")
