"""Room lstm on a GPU, in bfloat16: forward, and forward with backward, of back ends cuda and triton against cuDNN, as
torch's LSTM runs it. Part of bench/bench_lstm.py.

Cases are (time, batch, hidden); the input is as wide as the hidden state. Every side has the same weights and is
checked against torch's layer in float64. A step loop launches its kernels one by one, and the time that this takes
counts. The bytes are those of x, y and the weights, once (with gradients three times): far from the copy bandwidth,
because each step waits for the one before.

Test: tests/test_bench_gpu.py
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import nn

import fastdl
from bench import gpu

SHAPES = ((100, 1, 256), (512, 1, 1024), (256, 16, 512), (100, 64, 1024), (512, 64, 256))
KINDS = ("forward", "forward_backward")
FEW_CALLS = functools.partial(gpu.seconds_per_call, calls=10)  # a call takes up to tens of milliseconds


def side(kind: str, layer: nn.Module, x: torch.Tensor, grad: torch.Tensor) -> gpu.Side:
    """The call that is timed: (y, h_n, c_n), or y and the gradients of x and of all weights."""
    layer.train(kind != "forward")
    if kind == "forward":

        def forward():
            with torch.no_grad():
                y, states = layer(x)
            return y, *states

        return forward
    leaves = [x.detach().requires_grad_(), *layer.parameters()]

    def both():
        with torch.enable_grad():
            y, _ = layer(leaves[0])
        return y, *torch.autograd.grad(y, leaves, grad)

    return both


def measure(
    kind: str,
    shape: tuple[int, int, int],
    rounds: int,
    copy_limit: float,
    benchmark=None,
    *,
    device: str = "cuda",
    backends: tuple[str, ...] = ("cuda", "triton"),
    seconds_per_call: Callable[[gpu.Side], float] = FEW_CALLS,
) -> dict:
    """The record of one case (gpu.compare)."""
    torch.manual_seed(0)
    hidden = shape[2]
    peer = nn.LSTM(hidden, hidden, device=device, dtype=torch.bfloat16)
    x, grad = (torch.randn(shape, device=device).bfloat16() for _ in range(2))
    wide = nn.LSTM(hidden, hidden, device=device, dtype=torch.float64)
    wide.load_state_dict(peer.state_dict())

    def ours(backend: str) -> gpu.Side:
        layer = fastdl.nn.LSTM(hidden, hidden, device=device, dtype=torch.bfloat16, backend=backend)
        layer.load_state_dict(peer.state_dict())
        return side(kind, layer, x, grad)

    makers = {f"fastdl {b}": functools.partial(ours, b) for b in backends}
    makers["cuDNN"] = lambda: side(kind, peer, x, grad)
    weights = sum(p.numel() for p in peer.parameters())
    moved = (2 * x.numel() + weights) * 2 * (3 if kind == "forward_backward" else 1)
    found = gpu.compare(
        makers, lambda: side(kind, wide, x.double(), grad.double())(), moved, x, rounds, copy_limit, benchmark,
        seconds_per_call,
    )  # fmt: skip
    return {"level": "gpu", "kind": kind, "op": "lstm", "dtype": "bf16", "shape": list(shape), **found}
