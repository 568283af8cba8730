"""Room attention on a GPU, causal, in bfloat16: forward, and the backward pass alone, of back ends cuda and triton
against every back end of torch's scaled_dot_product_attention that takes the case. Part of bench/bench_attention.py.

Cases are (batch, heads, length, head_dim), 16384 queries in each, as in the papers of FlashAttention. Every side is
checked against the reference in float64, a head at a time, before it is timed. Bytes are those of q, k, v and O (with
gradients twice), far from the copy bandwidth; `tflops` counts the products of the visible half: 2 of them forward, 5
backward, 2 operations a multiply-add.

Test: tests/test_bench_gpu.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import gpu
from fastdl import ops

QUERIES = 16384
SHAPES = tuple(
    (QUERIES // length, heads, length, dim)
    for dim, heads in ((64, 32), (128, 16))
    for length in (2048, 4096, 8192, 16384)
)
KINDS = ("forward", "backward")
PRODUCTS = {"forward": 2, "backward": 5}
PEERS = {
    "SDPA flash": SDPBackend.FLASH_ATTENTION,
    "SDPA cuDNN": SDPBackend.CUDNN_ATTENTION,
    "SDPA efficient": SDPBackend.EFFICIENT_ATTENTION,
}
FEW_CALLS = functools.partial(gpu.seconds_per_call, calls=10)  # a call takes up to tens of milliseconds
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(backend: str) -> Attention:
    return lambda q, k, v: ops.attention(q, k, v, causal=True, backend=backend)


def torchs(name: str) -> Attention:
    """torch's op by one of its back ends alone; raises where that does not take the case."""

    def attention(q, k, v):
        with sdpa_kernel(PEERS[name]):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    return attention


def side(kind: str, attention: Attention, tensors: tuple[Tensor, ...], grad: Tensor) -> gpu.Side:
    """The call that is timed. Backward: of a graph that was made once and is kept."""
    if kind == "forward":
        return lambda: (attention(*tensors),)
    leaves = [t.detach().requires_grad_() for t in tensors]
    with torch.enable_grad():
        y = attention(*leaves)
    return lambda: torch.autograd.grad(y, leaves, grad.to(y.dtype), retain_graph=True)


def exact(kind: str, tensors: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor, ...]:
    """The answer in float64, head by head and chunk by chunk: the reference keeps no matrix of all scores."""
    wide = [t.double() for t in tensors]
    parts = []
    for head in range(tensors[0].shape[1]):
        one = tuple(t[:, head : head + 1] for t in wide)
        call = side(kind, lambda q, k, v: ops.attention(q, k, v, causal=True, backend="torch"), one,
                    grad[:, head : head + 1].double())  # fmt: skip
        parts.append([t.float() for t in call()])
    return tuple(torch.cat(heads, 1) for heads in zip(*parts, strict=True))


def measure(
    kind: str,
    shape: tuple[int, int, int, int],
    rounds: int,
    copy_limit: float,
    benchmark=None,
    *,
    device: str = "cuda",
    backends: tuple[str, ...] = ("cuda", "triton"),
    seconds_per_call: Callable[[gpu.Side], float] = FEW_CALLS,
) -> dict:
    """The record of one case (gpu.compare), with every side's TFLOP/s and the fastest of torch's back ends, or None."""
    torch.manual_seed(0)
    *tensors, grad = (torch.randn(shape, device=device).bfloat16() for _ in range(4))
    tensors = tuple(tensors)
    makers = {f"fastdl {b}": functools.partial(side, kind, ours(b), tensors, grad) for b in backends}
    makers |= {name: functools.partial(side, kind, torchs(name), tensors, grad) for name in PEERS}
    moved = 4 * tensors[0].numel() * 2 * (1 if kind == "forward" else 2)
    found = gpu.compare(
        makers, lambda: exact(kind, tensors, grad), moved, tensors[0], rounds, copy_limit, benchmark, seconds_per_call
    )
    batch, heads, length, dim = shape
    operations = PRODUCTS[kind] * 2 * batch * heads * (length * (length + 1) // 2) * dim
    for one in found["sides"].values():
        one["tflops"] = float(f"{operations / one['seconds']['median'] / 1e12:.4g}")
    peers = [name for name in found["sides"] if not name.startswith("fastdl")]
    best = min(peers, key=lambda name: found["sides"][name]["seconds"]["median"], default=None)
    facts = {"level": "gpu", "kind": kind, "op": "attention", "dtype": "bf16", "shape": list(shape)}
    return {**facts, "best_peer": best, **found}
