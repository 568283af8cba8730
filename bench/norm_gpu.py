"""Room norm on a GPU: layer_norm and rms_norm forward, backward, and residual add + norm, in bfloat16, as shares of the
copy bandwidth; back ends cuda and triton, against torch eager, torch.compile and Liger. Part of bench/bench_norm.py.

Bytes are what the op must move: forward x and y; backward grad, x and its gradient; add + norm x, residual, sum and y.
Every side is checked against float64 before it is timed. A copy of the same tensor is played in turn with the sides;
the larger of its rate and that of a copy of 1 GB is the limit.

Test: tests/test_bench_gpu.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import gpu
from fastdl import ops

SHAPES = ((8192, 4096), (32768, 1024))
OPS = ("layer_norm", "rms_norm")
TENSORS_MOVED = {"norm": 2, "norm_backward": 3, "add_norm": 4}  # of rows x cols
EPS = 1e-6
Side = Callable[[], tuple[Tensor, ...]]
Forward = Callable[..., tuple[Tensor, ...]]  # (x, residual or None, weight, bias) -> (y,) or (y, s)


def fused(op: str, backend: str) -> Forward:
    """fastdl's op."""

    def forward(x, residual, weight, bias):
        arguments = (x, weight, bias) if op == "layer_norm" else (x, weight)
        found = getattr(ops, op)(
            *arguments, eps=EPS, residual=residual, return_sum=residual is not None, backend=backend
        )
        return found if residual is not None else (found,)

    return forward


def eager(op: str) -> Forward:
    """torch's ops."""

    def forward(x, residual, weight, bias):
        s = x if residual is None else residual + x
        bias = (bias,) if op == "layer_norm" else ()
        y = getattr(F, op)(s, s.shape[-1:], weight, *bias, eps=EPS)
        return (y,) if residual is None else (y, s)

    return forward


def liger(op: str) -> Forward:
    """Liger's ops; its layer norm has no residual, so that torch adds it."""
    from liger_kernel.transformers import functional

    def forward(x, residual, weight, bias):
        if residual is not None and op == "rms_norm":
            return functional.liger_fused_add_rms_norm(x, residual, weight, EPS, in_place=False)
        s = x if residual is None else residual + x
        if op == "layer_norm":
            y = functional.liger_layer_norm(s, weight, bias, EPS)
        else:
            y = functional.liger_rms_norm(s, weight, EPS, in_place=False)
        return (y,) if residual is None else (y, s)

    return forward


def forwards(op: str, backends: tuple[str, ...]) -> dict[str, Callable[[], Forward]]:
    """Side -> what makes it; a peer that is not there raises."""
    found = {f"fastdl {backend}": functools.partial(fused, op, backend) for backend in backends}
    return found | {
        "torch": lambda: eager(op),
        "torch.compile": lambda: gpu.compiled(eager(op)),
        "liger": lambda: liger(op),
    }


def make(kind: str, shape: tuple[int, int], device: str) -> tuple[Tensor | None, ...]:
    """x, residual (add_norm only), weight, bias, and the gradient of y, in bfloat16."""
    torch.manual_seed(0)
    x, residual, grad = (torch.randn(shape, device=device).bfloat16() for _ in range(3))
    weight, bias = (torch.randn(shape[1], device=device).bfloat16() for _ in range(2))
    return x, residual if kind == "add_norm" else None, weight, bias, grad


def side(kind: str, op: str, forward: Forward, tensors: tuple[Tensor | None, ...]) -> Side:
    """The call that is timed. Backward: of a graph that was made once and is kept."""
    x, residual, weight, bias, grad = tensors
    if kind != "norm_backward":
        return lambda: forward(x, residual, weight, bias)
    leaves = [t.detach().requires_grad_() for t in ((x, weight, bias) if op == "layer_norm" else (x, weight))]
    with torch.enable_grad():
        (y,) = forward(leaves[0], None, leaves[1], leaves[2] if op == "layer_norm" else bias)
    return lambda: torch.autograd.grad(y, leaves, grad.to(y.dtype), retain_graph=True)


def measure(
    kind: str,
    op: str,
    shape: tuple[int, int],
    rounds: int,
    copy_limit: float,
    benchmark=None,
    *,
    device: str = "cuda",
    backends: tuple[str, ...] = ("cuda", "triton"),
    seconds_per_call: Callable[[Side], float] = gpu.seconds_per_call,
) -> dict:
    """The record of one case (gpu.compare). copy_limit: GB/s of a large copy in this run."""
    tensors = make(kind, shape, device)
    wide = tuple(None if t is None else t.double() for t in tensors)
    makers = {
        name: lambda maker=maker: side(kind, op, maker(), tensors) for name, maker in forwards(op, backends).items()
    }
    moved = TENSORS_MOVED[kind] * shape[0] * shape[1] * 2
    found = gpu.compare(
        makers, lambda: side(kind, op, eager(op), wide)(), moved, tensors[0], rounds, copy_limit, benchmark,
        seconds_per_call,
    )  # fmt: skip
    return {"level": "gpu", "kind": kind, "op": op, "dtype": "bf16", "shape": list(shape), **found}
