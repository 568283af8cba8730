"""Room selective_scan in Triton (contract: fastdl/ops/selective_scan.py; meaning: fastdl/reference/selective_scan.py).

    dt = softplus(delta + bias);  h = exp(dt A) h + dt x B;  y = (sum over state of C h + D x) silu(z)

A program has BLOCK channels of a sequence with all their states [BLOCK, STATE] in registers and walks through time.
Backward: 16 steps are run again from the kept state, their h written to memory that stays in the cache, and then
walked back; sums over channels (dB, dC) are partial sums of programs, added in order. Time is not cut into segments
here, as the kernels of back end cuda do for small batches. Floor: one exp a channel, state and step.

Test: pytest tests/test_selective_scan.py, make triton-compile        Table: configs.py
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference.selective_scan import CHUNK
from ._common import Case, capability, case, on
from .configs import blocks, config
from .norm_backward import partials

__all__ = ["compile_cases", "selective_scan_backward", "selective_scan_forward"]


@triton.jit
def _row(m, at, inside):
    return tl.load(m + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _step_size(delta, bias, at, d, inside, SOFTPLUS: tl.constexpr):
    """dt and its derivative for delta, [BLOCK]; dt is 0 past the last channel."""
    raw = _row(delta, at, inside)
    if bias is not None:
        raw += tl.load(bias + d, mask=inside, other=0.0)
    slope = tl.full(raw.shape, 1.0, tl.float32)
    dt = raw
    if SOFTPLUS:
        u = tl.exp(-tl.abs(raw))
        s = u / (2.0 + u)  # log(1 + u) = 2 artanh(s), s <= 1/3, by its series
        q = s * s
        p = 2.0 / 13 + q * (2.0 / 15)
        p = 2.0 / 7 + q * (2.0 / 9 + q * (2.0 / 11 + q * p))
        p = 2.0 + q * (2.0 / 3 + q * (2.0 / 5 + q * p))
        dt = tl.maximum(raw, 0.0, propagate_nan=tl.PropagateNan.ALL) + s * p
        slope = tl.where(raw < 0, u, 1.0) / (1.0 + u)
    return tl.where(inside, dt, 0.0), slope


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def forward(
    x, delta, A, B, C, D, z, bias, h0, y, last, states, length, dim, state, chunks, x_batch, x_step, delta_batch,
    delta_step, b_batch, b_step, c_batch, c_step, z_batch, z_step, BLOCK: tl.constexpr, STATE: tl.constexpr,
    STEPS: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """Program: BLOCK channels of a sequence. last [batch, dim, state]; states [batch, chunks, state, dim], or None."""
    groups = tl.cdiv(dim, BLOCK)
    n = (tl.program_id(0) // groups).to(tl.int64)
    d = tl.program_id(0) % groups * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, STATE)
    inside, of_state = d < dim, k < state
    both = inside[:, None] & of_state[None, :]
    place = (n * dim + d[:, None]) * state + k[None, :]
    a = tl.load(A + d[:, None] * state + k[None, :], mask=both, other=0.0)
    h = tl.zeros([BLOCK, STATE], tl.float32)
    if h0 is not None:
        h = tl.load(h0 + place, mask=both, other=0.0)
    skip = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=inside, other=0.0)
    for t in range(0, length):
        if states is not None:  # noqa: SIM102
            if t % STEPS == 0:
                to = ((n * chunks + t // STEPS) * state + k[None, :]) * dim + d[:, None]
                tl.store(states + to, h, mask=both)
        dt, _ = _step_size(delta, bias, n * delta_batch + t * delta_step + d, d, inside, SOFTPLUS)
        now = _row(x, n * x_batch + t * x_step + d, inside)
        b = _row(B, n * b_batch + t * b_step + k, of_state)
        c = _row(C, n * c_batch + t * c_step + k, of_state)
        h = tl.exp(dt[:, None] * a) * h + (dt * now)[:, None] * b[None, :]
        out = tl.sum(h * c[None, :], 1) + skip * now
        if z is not None:
            gate = _row(z, n * z_batch + t * z_step + d, inside)
            out = out * gate * _sigmoid(gate)
        tl.store(y + (n * length + t) * dim + d, out.to(y.dtype.element_ty), mask=inside)
    tl.store(last + place, h, mask=both)


@triton.jit
def backward(
    grad, grad_last, x, delta, A, B, C, D, z, bias, states, history, dx, ddelta, dz, dB, dC, dA, dD, dbias, dh0, batch,
    length, dim, state, chunks, x_batch, x_step, delta_batch, delta_step, b_batch, b_step, c_batch, c_step, z_batch,
    z_step, grad_batch, grad_step, BLOCK: tl.constexpr, STATE: tl.constexpr, STEPS: tl.constexpr,
    SOFTPLUS: tl.constexpr,
):  # fmt: skip
    """history [programs, STEPS + 1, BLOCK, STATE]: working memory. dB, dC [channel groups, batch, length, state], dA
    [batch, dim, state], dD, dbias [batch, dim]: partial sums."""
    groups = tl.cdiv(dim, BLOCK)
    n = (tl.program_id(0) // groups).to(tl.int64)
    group = tl.program_id(0) % groups
    d = group * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, STATE)
    inside, of_state = d < dim, k < state
    both = inside[:, None] & of_state[None, :]
    place = (n * dim + d[:, None]) * state + k[None, :]
    cell = tl.arange(0, BLOCK)[:, None] * STATE + k[None, :]
    mine = history + tl.program_id(0).to(tl.int64) * (STEPS + 1) * BLOCK * STATE
    a = tl.load(A + d[:, None] * state + k[None, :], mask=both, other=0.0)
    dh = tl.zeros([BLOCK, STATE], tl.float32)
    if grad_last is not None:
        dh = tl.load(grad_last + place, mask=both, other=0.0)
    skip = tl.zeros([BLOCK], tl.float32)
    if D is not None:
        skip = tl.load(D + d, mask=inside, other=0.0)
    sum_a = tl.zeros([BLOCK, STATE], tl.float32)
    sum_d = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        steps = tl.minimum(length - chunk * STEPS, STEPS)
        h = tl.load(states + ((n * chunks + chunk) * state + k[None, :]) * dim + d[:, None], mask=both, other=0.0)
        tl.store(mine + cell, h)
        for i in range(0, steps):
            t = chunk * STEPS + i
            dt, _ = _step_size(delta, bias, n * delta_batch + t * delta_step + d, d, inside, SOFTPLUS)
            now = _row(x, n * x_batch + t * x_step + d, inside)
            b = _row(B, n * b_batch + t * b_step + k, of_state)
            h = tl.exp(dt[:, None] * a) * h + (dt * now)[:, None] * b[None, :]
            tl.store(mine + (i + 1) * BLOCK * STATE + cell, h)
        tl.debug_barrier()  # threads may read what others of the program have written
        for j in range(0, steps):
            i = steps - 1 - j
            t = chunk * STEPS + i
            at = (n * length + t) * dim + d
            before = tl.load(mine + i * BLOCK * STATE + cell)
            h = tl.load(mine + (i + 1) * BLOCK * STATE + cell)
            dt, slope = _step_size(delta, bias, n * delta_batch + t * delta_step + d, d, inside, SOFTPLUS)
            now = _row(x, n * x_batch + t * x_step + d, inside)
            b = _row(B, n * b_batch + t * b_step + k, of_state)
            c = _row(C, n * c_batch + t * c_step + k, of_state)
            g = _row(grad, n * grad_batch + t * grad_step + d, inside)
            if z is not None:
                gate = _row(z, n * z_batch + t * z_step + d, inside)
                sigmoid = _sigmoid(gate)
                out = tl.sum(h * c[None, :], 1) + skip * now
                slant = g * out * sigmoid * (1.0 + gate * (1.0 - sigmoid))
                tl.store(dz + at, slant.to(dz.dtype.element_ty), mask=inside)
                g = g * gate * sigmoid
            dh += g[:, None] * c[None, :]
            row = ((group * batch + n) * length + t) * state + k
            tl.store(dC + row, tl.sum(g[:, None] * h, 0), mask=of_state)
            tl.store(dB + row, tl.sum(dh * (dt * now)[:, None], 0), mask=of_state)
            along = tl.sum(dh * b[None, :], 1)
            dh = tl.exp(dt[:, None] * a) * dh
            of_decay = dh * before
            sum_a += of_decay * dt[:, None]
            step_grad = (tl.sum(of_decay * a, 1) + along * now) * slope
            tl.store(ddelta + at, step_grad.to(ddelta.dtype.element_ty), mask=inside)
            tl.store(dx + at, (along * dt + skip * g).to(dx.dtype.element_ty), mask=inside)
            sum_d += g * now
            sum_bias += step_grad
        tl.debug_barrier()  # before the next chunk is written over this one
    tl.store(dh0 + place, dh, mask=both)
    tl.store(dA + place, sum_a, mask=both)
    tl.store(dD + n * dim + d, sum_d, mask=inside)
    tl.store(dbias + n * dim + d, sum_bias, mask=inside)


def _track(x: Tensor | None) -> tuple[Tensor | None, int, int]:
    """x with channels side by side, and its strides over batch and time."""
    if x is None:
        return None, 0, 0
    x = x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()
    return x, x.stride(0), x.stride(1)


def _options(kernel: str, state: int, device: torch.device) -> dict[str, int | bool]:
    """BLOCK, STATE and launch options: so many warps that a thread has 16 numbers of [BLOCK, STATE], at most 16."""
    block = blocks(kernel)[0]
    c, wide = config(kernel, capability(device), block), max(16, triton.next_power_of_2(state))
    warps = min(16, c.num_warps * wide // 16)
    return {"BLOCK": block, "STATE": wide, "STEPS": CHUNK, **c.options, "num_warps": warps}


def selective_scan_forward(x, delta, A, B, C, D, z, delta_bias, h0, softplus, keep) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results: fastdl/reference/selective_scan.py."""
    batch, length, dim = x.shape
    state, chunks = A.shape[1], triton.cdiv(length, CHUNK)
    y = x.new_empty(x.shape)
    last = A.new_empty((batch, dim, state))
    states = A.new_empty((batch, chunks, state, dim) if keep else 0)
    if not x.numel():
        return y, last.zero_() if h0 is None else h0.clone(), states
    tracks = [_track(t) for t in (x, delta, B, C, z)]
    A, D, delta_bias, h0 = (None if t is None else t.contiguous() for t in (A, D, delta_bias, h0))
    pointers = (tracks[0][0], tracks[1][0], A, tracks[2][0], tracks[3][0], D, tracks[4][0], delta_bias, h0)
    strides = [s for _, *pair in tracks for s in pair]
    options = _options("selective_scan_forward", state, x.device)
    grid = (batch * triton.cdiv(dim, options["BLOCK"]),)
    with on(x.device):
        forward[grid](
            *pointers,
            y,
            last,
            states if keep else None,
            length,
            dim,
            state,
            chunks,
            *strides,
            SOFTPLUS=softplus,
            **options,
        )
    return y, last, states


def _sum(first: Tensor, second: Tensor | None, parts: int) -> tuple[Tensor, Tensor | None]:
    """[parts, ...] -> [...], both at once, in the order of the parts."""
    sums = [None if t is None else t.new_empty(t.shape[1:]) for t in (first, second)]
    cols, block = sums[0].numel(), blocks("norm_partials")[0]
    c = config("norm_partials", capability(first.device), block)
    partials[(triton.cdiv(cols, block),)](first, second, *sums, parts, cols, BLOCK=block, ROWS=c.rows, **c.options)
    return sums[0], sums[1]


def selective_scan_backward(
    grad, grad_last, x, delta, A, B, C, D, z, delta_bias, h0, states, softplus
) -> tuple[Tensor, ...]:
    """Arguments and results: fastdl/reference/selective_scan.py."""
    batch, length, dim = x.shape
    state, chunks = A.shape[1], states.shape[1]
    dx, ddelta, dz = (x.new_empty(shape) for shape in (x.shape, x.shape, 0 if z is None else x.shape))
    if not x.numel():
        zeros = [A.new_zeros(shape) for shape in (B.shape, B.shape, A.shape, dim, dim, (batch, dim, state))]
        return dx, ddelta, dz, *zeros[:-1], zeros[-1] if grad_last is None else grad_last.clone()
    tracks = [_track(t) for t in (x, delta, B, C, z, grad)]
    A, D, delta_bias, grad_last = (None if t is None else t.contiguous() for t in (A, D, delta_bias, grad_last))
    pointers = (tracks[0][0], tracks[1][0], A, tracks[2][0], tracks[3][0], D, tracks[4][0], delta_bias)
    strides = [s for _, *pair in tracks for s in pair]
    options = _options("selective_scan_backward", state, x.device)
    groups = triton.cdiv(dim, options["BLOCK"])
    history = A.new_empty((batch * groups, CHUNK + 1, options["BLOCK"], options["STATE"]))
    parts_b, parts_c = (A.new_empty((groups, *B.shape)) for _ in range(2))
    parts_a, parts_d, parts_bias = (A.new_empty((batch, *shape)) for shape in ((dim, state), (dim,), (dim,)))
    dh0 = A.new_empty((batch, dim, state))
    with on(x.device):
        backward[(batch * groups,)](
            tracks[5][0], grad_last, *pointers, states, history, dx, ddelta, dz, parts_b, parts_c, parts_a, parts_d,
            parts_bias, dh0, batch, length, dim, state, chunks, *strides, SOFTPLUS=softplus, **options
        )  # fmt: skip
        dB, dC = _sum(parts_b, parts_c, groups)
        dA, _ = _sum(parts_a, None, batch)
        dD, dbias = _sum(parts_d, parts_bias, batch)
    return dx, ddelta, dz, dB, dC, dA, dD, dbias, dh0


def compile_cases(cc: int) -> Iterator[Case]:
    """What tools/triton_compile.py compiles for the room: every option on, and none, for 16 and 128 states."""
    dtype = "*fp16" if cc < 80 else "*bf16"
    types = dict.fromkeys(("x", "delta", "B", "C", "z", "y", "grad", "dx", "ddelta", "dz"), dtype)
    types |= dict.fromkeys(("A", "D", "bias", "h0", "last", "states", "grad_last", "history"), "*fp32")
    types |= dict.fromkeys(("dB", "dC", "dA", "dD", "dbias", "dh0"), "*fp32")
    types |= dict.fromkeys(("batch", "length", "dim", "state", "chunks"), "i32")
    types |= {f"{x}_{kind}": "i32" for x in ("x", "delta", "b", "c", "z", "grad") for kind in ("batch", "step")}
    for kernel in (forward, backward):
        name = f"selective_scan_{kernel.__name__}"
        block = blocks(name)[0]
        c = config(name, cc, block)
        bare = dict.fromkeys(("D", "z", "bias", "h0", "grad_last", "dz") + (() if kernel is backward else ("states",)))
        for state, softplus, constants in ((16, True, {}), (128, True, {}), (16, False, bare)):
            warps = c._replace(num_warps=min(16, c.num_warps * state // 16))
            constants = {**constants, "STATE": state, "STEPS": CHUNK, "SOFTPLUS": softplus}
            yield case(name, kernel, types, block, warps, constants, f"{state} states{'' if softplus else ', bare'}")
