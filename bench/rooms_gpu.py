"""Rooms activation, group_norm, batch_norm, rope and position on a GPU, in bfloat16: shares of the copy bandwidth; back
ends cuda and triton, against torch eager and torch.compile. Part of bench/bench_<room>.py; norms of rows: norm_gpu.py.

Bytes are what the op must move. Kinds that end in _backward time the gradients of a graph that is kept.

Test: tests/test_bench_gpu.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu
from bench.plain import plain_rope
from fastdl import ops

GROUPS = 32


def bias_gelu(backend: str | None) -> Callable[..., Tensor]:
    if backend is None:
        return lambda x, bias: F.gelu(x + bias)
    return lambda x, bias: ops.activation(x, "gelu", bias, backend=backend)


def swiglu(backend: str | None) -> Callable[..., Tensor]:
    if backend is None:
        return lambda gate, up: F.silu(gate) * up
    return lambda gate, up: ops.swiglu(gate, up, backend=backend)


def group_norm(backend: str | None) -> Callable[..., Tensor]:
    if backend is None:
        return lambda x, weight, bias: F.group_norm(x, GROUPS, weight, bias)
    return lambda x, weight, bias: ops.group_norm(x, GROUPS, weight, bias, backend=backend)


def batch_norm(backend: str | None) -> Callable[..., Tensor]:
    """In training, with the residual add and the ReLU of a ResNet block."""
    if backend is None:
        return lambda x, weight, bias, residual: (F.batch_norm(x, None, None, weight, bias, True) + residual).relu()
    return lambda x, weight, bias, residual: ops.batch_norm(
        x, None, None, weight, bias, training=True, residual=residual, relu=True, backend=backend
    )


@functools.cache
def angles(n: int, head_dim: int, device: torch.device) -> Tensor:
    return ops.rope_table(head_dim // 2 * 2, 10000.0, n).to(device)


def rope(backend: str | None, pairs: str) -> Callable[..., Tensor]:
    """x [batch, n, heads, head_dim], as a projection gives it."""

    def call(x: Tensor) -> Tensor:
        table, x = angles(x.shape[1], x.shape[3], x.device), x.transpose(1, 2)
        return plain_rope(x, table, pairs) if backend is None else ops.rope(x, table, pairs=pairs, backend=backend)

    return call


def add_positions(backend: str | None) -> Callable[..., Tensor]:
    """With a learned table and the embedding's scale."""
    if backend is None:
        return lambda x, table: x * 32.0 + table
    return lambda x, table: ops.add_positions(x, table, scale=32.0, backend=backend)


# kind -> function, its tensors beside x ("x": like x, "c": a number a channel, "t": a table [n, dim]), tensors moved
# forward and backward
KINDS: dict[str, dict[str, tuple[Callable, str, int, int]]] = {
    "activation": {"bias_gelu": (bias_gelu, "c", 2, 3), "swiglu": (swiglu, "x", 3, 5)},
    "group_norm": {"group_norm": (group_norm, "cc", 3, 5)},  # x twice: a group is larger than a block's registers
    "batch_norm": {"add_norm_relu": (batch_norm, "ccx", 4, 7)},
    "rope": {f"rope_{pairs}": (functools.partial(rope, pairs=pairs), "", 2, 2) for pairs in ("interleaved", "half")},
    "position": {"add_positions": (add_positions, "t", 2, 2)},
}
SHAPES = {
    "activation": ((8192, 14336),),
    "group_norm": ((8, 320, 64, 64),),
    "batch_norm": ((32, 256, 56, 56),),
    "rope": ((4, 4096, 32, 128),),
    "position": ((16, 2048, 2048),),
}
CASES = [
    (room, kind + suffix, shape)
    for room, kinds in KINDS.items()
    for kind in kinds
    for suffix in ("", "_backward")
    for shape in SHAPES[room]
]


def cases(room: str) -> list[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of a room, for pytest.mark.parametrize."""
    return [(kind, shape) for name, kind, shape in CASES if name == room]


def measure(
    room: str,
    kind: str,
    shape: tuple[int, ...],
    rounds: int,
    copy_limit: float,
    benchmark=None,
    *,
    device: str = "cuda",
    backends: tuple[str, ...] = ("cuda", "triton"),
    seconds_per_call: Callable[[gpu.Side], float] = gpu.seconds_per_call,
) -> dict:
    """The record of one case (gpu.compare)."""
    function, sizes, forward, backward = KINDS[room][kind.removesuffix("_backward")]
    torch.manual_seed(0)
    channel = 1 if len(shape) > 2 else -1
    x, grad = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    of = {"x": shape, "c": shape[channel], "t": shape[-2:]}
    tensors = [x, *(torch.randn(of[s], device=device).bfloat16() for s in sizes)]

    def side(call: Callable[..., Tensor], tensors: list[Tensor]) -> gpu.Side:
        if not kind.endswith("_backward"):
            return lambda: (call(*tensors),)
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            y = call(*leaves)
        return lambda: torch.autograd.grad(y, leaves, grad.view(y.shape).to(y.dtype), retain_graph=True)

    makers = {f"fastdl {b}": lambda b=b: side(function(b), tensors) for b in backends}
    makers |= {
        "torch": lambda: side(function(None), tensors),
        "torch.compile": lambda: side(gpu.compiled(function(None)), tensors),
    }
    wide = [t.double() for t in tensors]
    moved = (backward if kind.endswith("_backward") else forward) * x.numel() * 2
    found = gpu.compare(
        makers, lambda: side(function(None), wide)(), moved, x, rounds, copy_limit, benchmark, seconds_per_call
    )
    return {"level": "gpu", "kind": kind, "op": room, "dtype": "bf16", "shape": list(shape), **found}
