"""Room additive_attention in Triton (contract: fastdl/ops/additive_attention.py; meaning:
fastdl/reference/additive_attention.py).

    forward    a program: a block of queries and a chunk of keys; its softmax in parts, which `merge` puts together
    backward   a program: a chunk of keys and all queries of a sequence, with dq and dw of the chunk alone, which
               `finish` adds up; tanh is computed for the scores and again for the derivative

Tiles are [queries, keys, hidden units], as large as registers allow; sums run along their last dimensions. How keys are
cut is a function of their number. Floor: the rate of exp and of the other operations of tanh, some 20 an element.

Test: pytest tests/test_additive_attention.py, make triton-compile        Table: configs.py
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, capability, case, on, tanh
from .configs import blocks, config

__all__ = [
    "additive_attention_backward",
    "additive_attention_forward",
    "additive_pointer_backward",
    "additive_pointer_forward",
    "compile_cases",
]

QUERIES = 4  # of a tile


@triton.jit
def _seen(mask, lens, n, i, j, queries, keys, mask_batch, mask_query, mask_key, lens_batch, lens_query):
    """[queries, keys] of the tile: whether query i attends to key j."""
    seen = (i < queries)[:, None] & (j < keys)[None, :]
    if lens is not None:
        length = tl.load(lens + n * lens_batch + i * lens_query, mask=i < queries, other=0)
        seen = seen & (j[None, :] < length[:, None])
    if mask is not None:
        at = n * mask_batch + i[:, None] * mask_query + j[None, :] * mask_key
        seen = seen & (tl.load(mask + at, mask=seen, other=0) != 0)
    return seen


@triton.jit
def _rows(x, n, batch_stride, row_stride, i, rows, c, cols):
    """x [batch, rows, cols] -> the tile [i, c] in float32, zeros outside."""
    at = n * batch_stride + i[:, None] * row_stride + c[None, :]
    return tl.load(x + at, mask=(i < rows)[:, None] & (c < cols)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _scores(
    q, k, w, n, i, j, seen_key, queries, keys, hidden, q_batch, q_row, k_batch, k_row, UNITS: tl.constexpr
):  # fmt: skip
    """s [queries, keys] of a tile, masked ones too; keys that nobody sees count as zeros."""
    s = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for start in range(0, hidden, UNITS):
        h = start + tl.arange(0, UNITS)
        k_tile = tl.where(seen_key[:, None], _rows(k, n, k_batch, k_row, j, keys, h, hidden), 0.0)
        x = _rows(q, n, q_batch, q_row, i, queries, h, hidden)[:, None, :] + k_tile[None, :, :]
        weight = tl.load(w + h, mask=h < hidden, other=0.0).to(tl.float32)
        s += tl.sum(tanh(x) * weight[None, None, :], 2)
    return s


@triton.jit
def forward(
    q, k, v, w, mask, lens, part_state, part_out, scores, batch, queries, keys, hidden, d_v, chunk, q_batch, q_row,
    k_batch, k_row, v_batch, v_row, mask_batch, mask_query, mask_key, lens_batch, lens_query, QUERIES: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (block of queries, chunk, sequence). BLOCK: keys of a tile, ROWS: hidden units or elements of d_v.
    part_state [chunks, 2, batch, queries]; part_out [chunks, batch, queries, d_v], or None: scores [batch, queries,
    keys] are written."""
    part, n = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * QUERIES + tl.arange(0, QUERIES)
    begin = part * chunk
    end = tl.minimum(begin + chunk, keys)
    most = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    row = n * queries + i
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        seen = _seen(mask, lens, n, i, j, queries, keys, mask_batch, mask_query, mask_key, lens_batch, lens_query)
        seen_key = tl.max(seen.to(tl.int32), 0) > 0
        s = _scores(q, k, w, n, i, j, seen_key, queries, keys, hidden, q_batch, q_row, k_batch, k_row, ROWS)
        s = tl.where(seen, s, float("-inf"))
        if scores is not None:
            tl.store(scores + row[:, None] * keys + j[None, :], s, mask=(i < queries)[:, None] & (j < keys)[None, :])
        larger = tl.maximum(most, tl.max(s, 1))
        shift = tl.where(larger == float("-inf"), 0.0, larger)
        p = tl.where(s == float("-inf"), 0.0, tl.exp(s - shift[:, None]))
        scale = tl.where(most == float("-inf"), 0.0, tl.exp(most - shift))
        total = total * scale + tl.sum(p, 1)
        most = larger
        if part_out is not None:
            for first in range(0, d_v, ROWS):
                d = first + tl.arange(0, ROWS)
                v_tile = tl.where(seen_key[:, None], _rows(v, n, v_batch, v_row, j, keys, d, d_v), 0.0)
                to = part_out + ((part * batch * queries + row) * d_v)[:, None] + d[None, :]
                inside = (i < queries)[:, None] & (d < d_v)[None, :]
                before = tl.where(start == begin, 0.0, tl.load(to, mask=inside, other=0.0) * scale[:, None])
                found = before + tl.sum(p[:, :, None] * v_tile[None, :, :], 1)
                tl.store(to, found, mask=inside)
            tl.debug_barrier()  # threads may read what others of the program have written
    state = part_state + part * 2 * batch * queries + row
    tl.store(state, most, mask=i < queries)
    tl.store(state + batch * queries, total, mask=i < queries)


@triton.jit
def merge(part_state, part_out, scores, out, statistics, rows, keys, d_v, chunks, BLOCK: tl.constexpr):
    """A program a row (a query of a sequence). out [rows, d_v], or None: scores [rows, keys] become log-probabilities;
    statistics [2, rows]."""
    row = tl.program_id(0).to(tl.int64)
    most, total = float("-inf"), 0.0
    for c in range(0, chunks):
        most = tl.maximum(most, tl.load(part_state + c * 2 * rows + row))
    shift = tl.where(most == float("-inf"), 0.0, most)
    for c in range(0, chunks):
        total += tl.load(part_state + (c * 2 + 1) * rows + row) * tl.exp(
            tl.load(part_state + c * 2 * rows + row) - shift
        )
    tl.store(statistics + row, most)
    tl.store(statistics + rows + row, total)
    if out is not None:
        for first in range(0, d_v, BLOCK):
            d = first + tl.arange(0, BLOCK)
            found = tl.zeros([BLOCK], tl.float32)
            for c in range(0, chunks):
                factor = tl.exp(tl.load(part_state + c * 2 * rows + row) - shift)
                part = tl.load(part_out + (c * rows + row) * d_v + d, mask=d < d_v, other=0.0)
                found += tl.where(factor == 0.0, 0.0, part * factor)
            found = tl.where(total == 0.0, 0.0, found / tl.where(total == 0.0, 1.0, total))
            tl.store(out + row * d_v + d, found.to(out.dtype.element_ty), mask=d < d_v)
    else:
        lse = tl.where(total == 0.0, 0.0, shift + tl.log(tl.where(total == 0.0, 1.0, total)))
        for first in range(0, keys, BLOCK):
            j = first + tl.arange(0, BLOCK)
            s = tl.load(scores + row * keys + j, mask=j < keys, other=0.0)
            tl.store(scores + row * keys + j, s - lse, mask=j < keys)


@triton.jit
def backward(
    grad, q, k, v, w, mask, lens, out, statistics, dq_parts, dk_sum, dv_sum, dw_parts, batch, queries, keys, hidden,
    d_v, chunk, grad_batch, grad_row, q_batch, q_row, k_batch, k_row, v_batch, v_row, mask_batch, mask_query, mask_key,
    lens_batch, lens_query, QUERIES: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (chunk, sequence). grad [batch, queries, d_v]; where v is None [batch, queries, keys]. dq_parts [chunks,
    batch, queries, hidden], dk_sum [batch, keys, hidden], dv_sum [batch, keys, d_v], dw_parts [chunks, batch, hidden]:
    zeros, without the factor w."""
    part, n = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    begin = part * chunk
    end = tl.minimum(begin + chunk, keys)
    for start in range(begin, end, BLOCK):
        j = start + tl.arange(0, BLOCK)
        for first in range(0, queries, QUERIES):
            i = first + tl.arange(0, QUERIES).to(tl.int64)
            row, valid = n * queries + i, i < queries
            total = tl.load(statistics + batch * queries + row, mask=valid, other=0.0)
            most = tl.load(statistics + row, mask=valid, other=0.0)
            seen = _seen(mask, lens, n, i, j, queries, keys, mask_batch, mask_query, mask_key, lens_batch, lens_query)
            seen = seen & (total != 0.0)[:, None]
            seen_key = tl.max(seen.to(tl.int32), 0) > 0
            s = _scores(q, k, w, n, i, j, seen_key, queries, keys, hidden, q_batch, q_row, k_batch, k_row, ROWS)
            shift = tl.where(total == 0.0, 0.0, most)
            p = tl.where(seen, tl.exp(s - shift[:, None]) / tl.where(total == 0.0, 1.0, total)[:, None], 0.0)
            if v is not None:
                dp = tl.zeros([QUERIES, BLOCK], tl.float32)
                for at in range(0, d_v, ROWS):
                    d = at + tl.arange(0, ROWS)
                    inside = valid[:, None] & (d < d_v)[None, :]
                    g = _rows(grad, n, grad_batch, grad_row, i, queries, d, d_v)
                    g = tl.where((total == 0.0)[:, None], 0.0, g)
                    o = tl.load(out + row[:, None] * d_v + d[None, :], mask=inside, other=0.0).to(tl.float32)
                    v_tile = tl.where(seen_key[:, None], _rows(v, n, v_batch, v_row, j, keys, d, d_v), 0.0)
                    dp += tl.sum(g[:, None, :] * (v_tile[None, :, :] - o[:, None, :]), 2)
                    to = dv_sum + (n * keys + j)[:, None] * d_v + d[None, :]
                    inside = (j < keys)[:, None] & (d < d_v)[None, :]
                    before = tl.load(to, mask=inside, other=0.0)
                    tl.store(to, before + tl.sum(p[:, :, None] * g[:, None, :], 0), mask=inside)
                ds = tl.where(seen, p * dp, 0.0)
            else:
                sums = tl.zeros([QUERIES], tl.float32)
                for at in range(0, keys, BLOCK):
                    jj = at + tl.arange(0, BLOCK)
                    also = _seen(
                        mask, lens, n, i, jj, queries, keys, mask_batch, mask_query, mask_key, lens_batch, lens_query
                    )
                    sums += tl.sum(tl.where(also, _rows(grad, n, grad_batch, grad_row, i, queries, jj, keys), 0.0), 1)
                g = _rows(grad, n, grad_batch, grad_row, i, queries, j, keys)
                ds = tl.where(seen, g - p * sums[:, None], 0.0)
            for at in range(0, hidden, ROWS):
                h = at + tl.arange(0, ROWS)
                k_tile = tl.where(seen_key[:, None], _rows(k, n, k_batch, k_row, j, keys, h, hidden), 0.0)
                t = tanh(_rows(q, n, q_batch, q_row, i, queries, h, hidden)[:, None, :] + k_tile[None, :, :])
                t = tl.where((ds == 0.0)[:, :, None], 0.0, t)
                slope = ds[:, :, None] * (1.0 - t * t)
                to = dq_parts + ((part * batch * queries + row) * hidden)[:, None] + h[None, :]
                inside = valid[:, None] & (h < hidden)[None, :]
                tl.store(to, tl.load(to, mask=inside, other=0.0) + tl.sum(slope, 1), mask=inside)
                to = dk_sum + (n * keys + j)[:, None] * hidden + h[None, :]
                inside = (j < keys)[:, None] & (h < hidden)[None, :]
                tl.store(to, tl.load(to, mask=inside, other=0.0) + tl.sum(slope, 0), mask=inside)
                to = dw_parts + (part * batch + n) * hidden + h
                found = tl.sum(tl.sum(ds[:, :, None] * t, 0), 0)
                tl.store(to, tl.load(to, mask=h < hidden, other=0.0) + found, mask=h < hidden)
            tl.debug_barrier()  # threads may read what others of the program have written


@triton.jit
def finish(parts, w, to, count, size, cols, BLOCK: tl.constexpr):
    """to [size] = w[column] * the sum over parts [count, size], in order; w None: 1. Rows have `cols` elements."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    found = tl.zeros([BLOCK], tl.float32)
    for c in range(0, count):
        found += tl.load(parts + c * size + at, mask=inside, other=0.0)
    if w is not None:
        found *= tl.load(w + at % cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(to + at, found.to(to.dtype.element_ty), mask=inside)


def _plan(keys: int, least: int, tile: int) -> tuple[int, int]:
    """Keys of a chunk and how many chunks: at most 16 of at least ``least`` keys; a function of the number of keys."""
    length = triton.cdiv(max(least, triton.cdiv(keys, 16)), tile) * tile
    return length, max(1, triton.cdiv(keys, length))


def _side_by_side(x: Tensor) -> Tensor:
    return x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()


def _mask_strides(mask: Tensor | None, lens: Tensor | None) -> tuple[int, ...]:
    strides = (0, 0, 0) if mask is None else tuple(
        0 if size == 1 else stride for size, stride in zip(mask.shape, mask.stride(), strict=True)
    )  # fmt: skip
    if lens is None:
        return *strides, 0, 0
    return *strides, lens.stride(0), lens.stride(1) if lens.dim() == 2 else 0


def _tile(kernel: str, cc: int | None) -> tuple[int, int, dict]:
    """Keys and hidden units of a tile and Triton's options."""
    (block,) = blocks(kernel)
    c = config(kernel, cc, block)
    return block, c.rows, c.options


def _forward(q, k, v, w, mask, valid_lens):
    batch, queries, hidden = q.shape
    keys, d_v = k.shape[1], 0 if v is None else v.shape[2]
    found = q.new_empty((batch, queries, d_v)) if v is not None else q.new_empty((batch, queries, keys)).float()
    statistics = q.new_empty((2, batch, queries)).float()
    if not batch * queries:
        return found, statistics
    q, k, v = (None if t is None else _side_by_side(t) for t in (q, k, v))
    w = w.contiguous()
    cc = capability(q.device)
    block, units, options = _tile("additive_attention_forward", cc)
    chunk, chunks = _plan(keys, 256, block)
    part_state = statistics.new_empty((chunks, 2, batch, queries))
    part_out = None if v is None else statistics.new_empty((chunks, batch, queries, d_v))
    if keys == 0:
        part_state[:, 0], part_state[:, 1] = float("-inf"), 0.0
        if part_out is not None:
            part_out.zero_()
    scores = found if v is None else None
    sizes = (batch, queries, keys, hidden, d_v, chunk, *q.stride()[:2], *k.stride()[:2])
    sizes += ((0, 0) if v is None else v.stride()[:2]) + _mask_strides(mask, valid_lens)
    with on(q.device):
        if keys:
            forward[(triton.cdiv(queries, QUERIES), chunks, batch)](
                q, k, v, w, mask, valid_lens, part_state, part_out, scores, *sizes, QUERIES=QUERIES, BLOCK=block,
                ROWS=units, **options,
            )  # fmt: skip
        (wide,) = blocks("additive_attention_merge")
        merge[(batch * queries,)](
            part_state, part_out, scores, None if v is None else found, statistics, batch * queries, keys, d_v, chunks,
            BLOCK=wide, **config("additive_attention_merge", cc, wide).options,
        )  # fmt: skip
    return found, statistics


def _backward(grad, q, k, v, w, mask, valid_lens, out, statistics):
    batch, queries, hidden = q.shape
    keys, d_v = k.shape[1], 0 if v is None else v.shape[2]
    shapes = [t.shape for t in (q, k, v) if t is not None]
    if not batch * queries * keys:
        return *(q.new_zeros(shape) for shape in shapes), statistics.new_zeros(hidden)
    grads = [q.new_empty(shape) for shape in shapes]
    dw = statistics.new_empty(hidden)
    grad, q, k, v = (None if t is None else _side_by_side(t) for t in (grad, q, k, v))
    w, out = w.contiguous(), None if out is None else out.contiguous()
    cc = capability(q.device)
    block, units, options = _tile("additive_attention_backward", cc)
    chunk, chunks = _plan(keys, block, block)
    dq_parts = statistics.new_zeros((chunks, batch, queries, hidden))
    dk_sum, dw_parts = statistics.new_zeros((batch, keys, hidden)), statistics.new_zeros((chunks, batch, hidden))
    dv_sum = None if v is None else statistics.new_zeros((batch, keys, d_v))
    sizes = (batch, queries, keys, hidden, d_v, chunk, *grad.stride()[:2], *q.stride()[:2], *k.stride()[:2])
    sizes += ((0, 0) if v is None else v.stride()[:2]) + _mask_strides(mask, valid_lens)
    (wide,) = blocks("additive_attention_finish")
    with on(q.device):
        backward[(chunks, batch)](
            grad, q, k, v, w, mask, valid_lens, out, statistics.contiguous(), dq_parts, dk_sum, dv_sum, dw_parts,
            *sizes, QUERIES=QUERIES, BLOCK=block, ROWS=units, **options,
        )  # fmt: skip
        work = [(dq_parts, w, grads[0], chunks), (dk_sum, w, grads[1], 1), (dw_parts, None, dw, chunks * batch)]
        work += [] if v is None else [(dv_sum, None, grads[2], 1)]
        for parts, factor, to, count in work:
            finish[(triton.cdiv(to.numel(), wide),)](
                parts, factor, to, count, to.numel(), to.shape[-1], BLOCK=wide,
                **config("additive_attention_finish", cc, wide).options,
            )  # fmt: skip
    return *grads, dw


def additive_attention_forward(q, k, v, w, mask, valid_lens) -> tuple[Tensor, Tensor]:
    """Arguments and results: fastdl/reference/additive_attention.py."""
    return _forward(q, k, v, w, mask, valid_lens)


def additive_pointer_forward(q, k, w, mask, valid_lens) -> tuple[Tensor, Tensor]:
    """Arguments and results: fastdl/reference/additive_attention.py."""
    return _forward(q, k, None, w, mask, valid_lens)


def additive_attention_backward(grad, q, k, v, w, mask, valid_lens, out, statistics) -> tuple[Tensor, ...]:
    """Arguments and results: fastdl/reference/additive_attention.py."""
    return _backward(grad, q, k, v, w, mask, valid_lens, out, statistics)


def additive_pointer_backward(grad, q, k, w, mask, valid_lens, statistics) -> tuple[Tensor, ...]:
    """Arguments and results: fastdl/reference/additive_attention.py."""
    return _backward(grad, q, k, None, w, mask, valid_lens, None, statistics)


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: attention and pointer, with mask and lengths and without."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    types = dict.fromkeys(("q", "k", "v", "out", "to"), dtype) | {"mask": "*i1", "lens": "*i32"}
    floats = (
        "w",
        "part_state",
        "part_out",
        "scores",
        "statistics",
        "dq_parts",
        "dk_sum",
        "dv_sum",
        "dw_parts",
        "parts",
    )
    types |= dict.fromkeys(floats, "*fp32")
    sizes = ("batch", "queries", "keys", "hidden", "d_v", "chunk", "chunks", "rows", "count", "size", "cols")
    strides = [f"{x}_{kind}" for x in ("q", "k", "v", "grad") for kind in ("batch", "row")]
    strides += ["mask_batch", "mask_query", "mask_key", "lens_batch", "lens_query"]
    types |= dict.fromkeys((*sizes, *strides), "i32")
    for pointer, masked in itertools.product((False, True), (False, True)):
        note = f"{'pointer' if pointer else 'attention'}{' masked' if masked else ''}"
        constants = {"QUERIES": QUERIES} | dict.fromkeys(() if masked else ("mask", "lens"))
        types["grad"] = "*fp32" if pointer else dtype
        for kernel, function, absent in (
            ("forward", forward, ("v", "part_out") if pointer else ("scores",)),
            ("backward", backward, ("v", "out", "dv_sum") if pointer else ()),
        ):
            name = f"additive_attention_{kernel}"
            (block,) = blocks(name)
            yield case(name, function, types, block, config(name, cc, block), constants | dict.fromkeys(absent), note)
    for pointer in (False, True):
        name, absent = "additive_attention_merge", ("part_out", "out") if pointer else ("scores",)
        (block,) = blocks(name)
        note = "pointer" if pointer else "attention"
        yield case(name, merge, types, block, config(name, cc, block), dict.fromkeys(absent), note)
    name = "additive_attention_finish"
    (block,) = blocks(name)
    for constants, note in (({}, "times w"), ({"w": None}, "plain")):
        yield case(name, finish, types, block, config(name, cc, block), constants, note)
