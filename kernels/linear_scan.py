"""Room linear_scan in Triton (contract: fastdl/ops/linear_scan.py; meaning: fastdl/reference/linear_scan.py).

    forward    h_p = a_p h_{p-1} + b_p                          p counts in the order of the recurrence
    backward   g_p = conj(a_{p+1}) g_{p+1} + grad_p,            db = g,  da_p = g_p conj(h_{p-1}),  dh0 = conj(a_0) g_0

`run` walks either: tiles of steps x channels, whose affine maps tl.associative_scan composes and the state of the tile
before then enters. Where channels and sequences fill less than the GPU, time is cut into chunks: `run` with SUMMARY
finds the map of each, `carry` the states before them. Complex numbers are pairs of float32. Floor: (reads of a, b +
write of h) / bandwidth, without chunks.

Test: pytest tests/test_linear_scan.py, make triton-compile        Table: configs.py
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._common import Case, capability, case, on, processors
from .configs import blocks, config

__all__ = ["compile_cases", "linear_scan_backward", "linear_scan_forward"]

# Numbers are (re, im); of real ones im is a stand-in that nothing reads.


@triton.jit
def _compose(a, b, a2, b2):
    """(a, b), then (a2, b2). A state of 0 stays clear of a product that has overflowed."""
    return a2 * a, tl.where(b == 0, b2, a2 * b + b2)


@triton.jit
def _compose_complex(a_re, a_im, b_re, b_im, c_re, c_im, d_re, d_im):
    zero = (b_re == 0) & (b_im == 0)
    return (
        c_re * a_re - c_im * a_im,
        c_re * a_im + c_im * a_re,
        tl.where(zero, d_re, c_re * b_re - c_im * b_im + d_re),
        tl.where(zero, d_im, c_re * b_im + c_im * b_re + d_im),
    )


@triton.jit
def _moved(a_re, a_im, b_re, b_im, re, im, COMPLEX: tl.constexpr):
    """a * state + b, and b where the state is 0."""
    if COMPLEX:
        zero = (re == 0) & (im == 0)
        new_re = tl.where(zero, b_re, a_re * re - a_im * im + b_re)
        new_im = tl.where(zero, b_im, a_re * im + a_im * re + b_im)
    else:
        new_re = tl.where(re == 0, b_re, a_re * re + b_re)
        new_im = new_re
    return new_re, new_im


@triton.jit
def _load(x, at, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        re = tl.load(x + 2 * at, mask=mask, other=0.0)
        im = tl.load(x + 2 * at + 1, mask=mask, other=0.0)
    else:
        re = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        im = re
    return re, im


@triton.jit
def _store(x, at, re, im, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(x + 2 * at, re, mask=mask)
        tl.store(x + 2 * at + 1, im, mask=mask)
    else:
        tl.store(x + at, re.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _last(tile, ROWS: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, ROWS)[:, None] == ROWS - 1, tile, 0.0), 0)


@triton.jit
def run(
    a, b, h, out, da, h0, dh0, products, ends, states, batch, length, channels, chunk, a_batch, a_step, b_batch, b_step,
    h_batch, h_step, out_batch, out_step, BLOCK: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
    COMPLEX: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """Program (sequence and BLOCK channels, chunk of steps). SUMMARY: products and ends [chunks, batch, channels]; else
    out, and in the backward walk da and dh0, from states [chunks, batch, channels] where time is cut."""
    groups = tl.cdiv(channels, BLOCK)
    n = (tl.program_id(0) // groups).to(tl.int64)
    c = tl.program_id(0) % groups * BLOCK + tl.arange(0, BLOCK)
    inside, channel = c < channels, n * channels + c
    part = tl.program_id(1).to(tl.int64)
    begin = part * chunk
    end = tl.minimum(begin + chunk, length)
    re = tl.zeros([BLOCK], tl.float32)
    im = tl.zeros([BLOCK], tl.float32)
    whole_re = tl.full([BLOCK], 1.0, tl.float32)
    whole_im = tl.zeros([BLOCK], tl.float32)
    if not SUMMARY:
        if states is not None:
            re, im = _load(states, part * batch * channels + channel, inside, COMPLEX)
        else:
            if not BACKWARD:  # noqa: SIM102 - Triton wants each of the two by itself
                if h0 is not None:
                    re, im = _load(h0, channel, inside, COMPLEX)
    for start in range(begin, end, ROWS):
        u = (start + tl.arange(0, ROWS))[:, None]
        mask = (u < end) & inside[None, :]
        if BACKWARD:
            p = length - 1 - u
            a_re, a_im = _load(
                a, n * a_batch + (p + 1) * a_step + c[None, :], mask & (p + 1 < length), COMPLEX
            )  # fmt: skip
            a_im = -a_im
        else:
            p = u
            a_re, a_im = _load(a, n * a_batch + p * a_step + c[None, :], mask, COMPLEX)
        a_re = tl.where(u < end, a_re, 1.0)
        a_im = tl.where(u < end, a_im, 0.0)
        b_re, b_im = _load(b, n * b_batch + p * b_step + c[None, :], mask, COMPLEX)
        if COMPLEX:
            a_re, a_im, b_re, b_im = tl.associative_scan((a_re, a_im, b_re, b_im), 0, _compose_complex)
        else:
            a_re, b_re = tl.associative_scan((a_re, b_re), 0, _compose)
            a_im, b_im = a_re, b_re
        if SUMMARY:
            last_re, last_im = _last(a_re, ROWS), _last(a_im, ROWS)
            if COMPLEX:
                kept = whole_re
                whole_re = last_re * whole_re - last_im * whole_im
                whole_im = last_re * whole_im + last_im * kept
            else:
                whole_re = last_re * whole_re
        s_re, s_im = _moved(a_re, a_im, b_re, b_im, re[None, :], im[None, :], COMPLEX)
        if not SUMMARY:
            _store(out, n * out_batch + p * out_step + c[None, :], s_re, s_im, mask, COMPLEX)
            if BACKWARD:  # noqa: SIM102
                if da is not None:
                    h_re, h_im = _load(h, n * h_batch + (p - 1) * h_step + c[None, :], mask & (p > 0), COMPLEX)
                    if h0 is not None:
                        first = (p == 0) & mask
                        at = channel[None, :] + p * 0
                        h0_re, h0_im = _load(h0, at, first, COMPLEX)
                        h_re, h_im = tl.where(p == 0, h0_re, h_re), tl.where(p == 0, h0_im, h_im)
                    at = n * out_batch + p * out_step + c[None, :]
                    if COMPLEX:
                        _store(da, at, s_re * h_re + s_im * h_im, s_im * h_re - s_re * h_im, mask, COMPLEX)
                    else:
                        _store(da, at, s_re * h_re, s_re, mask, COMPLEX)
        re, im = _last(s_re, ROWS), _last(s_im, ROWS)
    if SUMMARY:
        _store(products, part * batch * channels + channel, whole_re, whole_im, inside, COMPLEX)
        _store(ends, part * batch * channels + channel, re, im, inside, COMPLEX)
    elif BACKWARD:  # noqa: SIM102
        if end == length:
            a_re, a_im = _load(a, n * a_batch + c, inside, COMPLEX)
            if COMPLEX:
                _store(dh0, channel, a_re * re + a_im * im, a_re * im - a_im * re, inside, COMPLEX)
            else:
                _store(dh0, channel, a_re * re, re, inside, COMPLEX)


@triton.jit
def carry(products, ends, h0, states, all_channels, chunks, BLOCK: tl.constexpr, COMPLEX: tl.constexpr):
    """states [chunks, batch * channels]: before each chunk. h0 [batch * channels], or None."""
    c = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = c < all_channels
    re = tl.zeros([BLOCK], tl.float32)
    im = tl.zeros([BLOCK], tl.float32)
    if h0 is not None:
        re, im = _load(h0, c, inside, COMPLEX)
    for k in range(0, chunks):
        _store(states, k * all_channels + c, re, im, inside, COMPLEX)
        if k + 1 < chunks:
            p_re, p_im = _load(products, k * all_channels + c, inside, COMPLEX)
            e_re, e_im = _load(ends, k * all_channels + c, inside, COMPLEX)
            re, im = _moved(p_re, p_im, e_re, e_im, re, im, COMPLEX)


def _plan(batch: int, length: int, channels: int, device: torch.device, block: int, rows: int) -> tuple[int, int]:
    """Steps of a chunk, and chunks: a function of the shape and of the GPU's size."""
    programs, wanted = batch * triton.cdiv(channels, block), 2 * processors(device)
    chunks = 1 if programs >= wanted else min(2 * wanted // programs, max(1, length // (4 * rows)))
    chunk = triton.cdiv(triton.cdiv(length, chunks), rows) * rows
    return chunk, triton.cdiv(length, chunk)


def _steps(x: Tensor, reverse: bool, is_complex: bool) -> tuple[Tensor, int, int, int]:
    """x as floats, its strides over batch and steps in elements, and the elements before step 0: in the order of the
    recurrence, channels side by side."""
    if x.shape[2] > 1 and x.stride(2) != 1:
        x = x.contiguous()
    batch, step = x.stride(0), x.stride(1)
    first = (x.shape[1] - 1) * step if reverse else 0
    floats = torch.view_as_real(x.resolve_conj()) if is_complex else x
    return floats, batch, -step if reverse else step, first


def _from(x: Tensor, first: int) -> Tensor:
    """A pointer to element ``first`` of x's memory: step 0 lies at its end where the recurrence is reversed."""
    return x.as_strided((1,), (1,), x.storage_offset() + first)


def _walk(a, b, h, h0, out, da, dh0, reverse, backward):
    batch, length, channels = out.shape
    is_complex = out.is_complex()
    cc = capability(out.device)
    kernel = "linear_scan_complex" if is_complex else "linear_scan_run"
    narrow, wide = blocks(kernel)
    block = narrow if channels <= narrow or cc is None else wide
    c = config(kernel, cc, block)
    rows = 8 if cc is None else c.rows  # the interpreter composes element by element
    chunk, chunks = _plan(batch, length, channels, out.device, block, rows)
    tracks = [None if x is None else _steps(x, reverse, is_complex) for x in (a, b, h, out, da)]
    pointers = [None if t is None else _from(t[0], t[3] * (1 + is_complex)) for t in tracks]
    strides = [s for t in tracks[:4] for s in ((0, 0) if t is None else t[1:3])]
    h0, dh0 = (t if t is None or not is_complex else torch.view_as_real(t.resolve_conj()) for t in (h0, dh0))
    h0 = None if h0 is None else h0.contiguous()
    shape = (chunks, batch, channels, 1 + is_complex)
    maps = [out.new_empty(shape, dtype=torch.float32) for _ in range(3)] if chunks > 1 else [None] * 3
    sizes = (batch, length, channels, chunk, *strides)
    kinds = {"BLOCK": block, "ROWS": rows, "BACKWARD": backward, "COMPLEX": is_complex, **c.options}
    groups = batch * triton.cdiv(channels, block)
    with on(out.device):
        if chunks > 1:
            run[(groups, chunks - 1)](*pointers, h0, dh0, *maps, *sizes, SUMMARY=True, **kinds)
            tile, number = blocks("linear_scan_carry")[0], batch * channels
            options = config("linear_scan_carry", cc, tile).options
            before = None if backward else h0
            carry[(triton.cdiv(number, tile),)](
                *maps[:2], before, maps[2], number, chunks, BLOCK=tile, COMPLEX=is_complex, **options
            )
        run[(groups, chunks)](*pointers, h0, dh0, *maps, *sizes, SUMMARY=False, **kinds)


def linear_scan_forward(a, b, h0, reverse) -> Tensor:
    """Arguments and results: fastdl/reference/linear_scan.py."""
    h = b.new_empty(b.shape)
    if h.numel():
        _walk(a, b, None, h0, h, None, None, reverse, False)
    return h


def linear_scan_backward(grad, a, h, h0, reverse, need_a) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/linear_scan.py."""
    db = h.new_empty(h.shape)
    da = h.new_empty(h.shape if need_a else 0)
    wide = h.dtype if h.is_complex() else torch.float32
    batch, _, channels = h.shape
    dh0 = h.new_empty((batch, channels), dtype=wide) if h.numel() else h.new_zeros((batch, channels), dtype=wide)
    if h.numel():
        _walk(a, grad, h, h0, db, da if need_a else None, dh0, reverse, True)
    return da, db, dh0


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: both walks, real and complex, whole and in chunks."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    types = dict.fromkeys(("h0", "dh0", "products", "ends", "states"), "*fp32")
    types |= dict.fromkeys(("batch", "length", "channels", "chunk", "all_channels", "chunks"), "i32")
    types |= {f"{x}_{kind}": "i32" for x in ("a", "b", "h", "out") for kind in ("batch", "step")}
    for is_complex, name in ((False, "linear_scan_run"), (True, "linear_scan_complex")):
        types |= dict.fromkeys(("a", "b", "h", "out", "da"), "*fp32" if is_complex else dtype)
        for block, backward, summary in itertools.product(blocks(name), (False, True), (False, True)):
            constants = {"BACKWARD": backward, "COMPLEX": is_complex, "SUMMARY": summary}
            constants |= dict.fromkeys(() if backward else ("h", "da", "dh0"))
            note = f"{'backward' if backward else 'forward'}{' summary' if summary else ''}"
            yield case(name, run, types, block, config(name, cc, block), constants, note)
    wide = blocks("linear_scan_carry")[0]
    for is_complex, number in ((False, "real"), (True, "complex")):
        constants = {"COMPLEX": is_complex}
        yield case("linear_scan_carry", carry, types, wide, config("linear_scan_carry", cc, wide), constants, number)
