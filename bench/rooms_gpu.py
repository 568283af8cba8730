"""Rooms activation, group_norm and batch_norm on a GPU, in bfloat16: shares of the copy bandwidth; back ends cuda and
triton, against torch eager and torch.compile. Part of bench/bench_<room>.py; norms over rows: norm_gpu.py.

Bytes are what the op must move. Kinds that end in _backward time the gradients of a graph that is kept.

Test: tests/test_bench_gpu.py
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu
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


# kind -> function, its tensors beside x ("x": like x, "c": a number a channel), tensors moved forward and backward
KINDS: dict[str, dict[str, tuple[Callable, str, int, int]]] = {
    "activation": {"bias_gelu": (bias_gelu, "c", 2, 3), "swiglu": (swiglu, "x", 3, 5)},
    "group_norm": {"group_norm": (group_norm, "cc", 3, 5)},  # x twice: a group is larger than a block's registers
    "batch_norm": {"add_norm_relu": (batch_norm, "ccx", 4, 7)},
}
SHAPES = {"activation": ((8192, 14336),), "group_norm": ((8, 320, 64, 64),), "batch_norm": ((32, 256, 56, 56),)}
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
    tensors = [x, *(torch.randn(shape if s == "x" else shape[channel], device=device).bfloat16() for s in sizes)]

    def side(call: Callable[..., Tensor], tensors: list[Tensor]) -> gpu.Side:
        if not kind.endswith("_backward"):
            return lambda: (call(*tensors),)
        leaves = [t.detach().requires_grad_() for t in tensors]
        with torch.enable_grad():
            y = call(*leaves)
        return lambda: torch.autograd.grad(y, leaves, grad.to(y.dtype), retain_graph=True)

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
