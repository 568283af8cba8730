"""Modules of room activation: Activation, with bias, dropout and residual in one pass, and GatedMLP (SwiGLU, GEGLU)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops.activation import activation, geglu, swiglu

__all__ = ["Activation", "GatedMLP"]


class Activation(nn.Module):
    """``residual + dropout(f(x + bias))`` as a layer; the arguments are those of `fastdl.ops.activation`.

    kind              "relu", "leaky_relu", "gelu", "gelu_tanh", "swish" or "silu", "tanh", "sigmoid", "identity"
    features          size of a learned bias (zeros at first) over ``channel_dim``; None: no bias
    slope             of leaky_relu
    beta              of swish; learn_beta makes it a parameter with one element
    dropout           probability in training; channel_dropout zeroes whole channels
    channel_dim       -1 after a linear layer, 1 after a convolution
    backend           None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(x, residual=None)`` -> a tensor like x.

    >>> import torch, fastdl
    >>> layer = fastdl.nn.Activation("gelu", features=8, dropout=0.1)
    >>> linear = torch.nn.Linear(4, 8, bias=False)
    >>> layer(linear(torch.randn(2, 4)), torch.randn(2, 8)).shape
    torch.Size([2, 8])
    """

    def __init__(
        self,
        kind: str,
        features: int | None = None,
        *,
        slope: float = 0.01,
        beta: float = 1.0,
        learn_beta: bool = False,
        dropout: float = 0.0,
        channel_dropout: bool = False,
        channel_dim: int = -1,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if learn_beta and kind != "swish":
            raise ValueError(f"learn_beta: belongs to kind 'swish', got {kind!r}")
        self.kind, self.slope, self.dropout, self.channel_dropout = kind, slope, dropout, channel_dropout
        self.channel_dim, self.backend = channel_dim, backend
        bias = None if features is None else nn.Parameter(torch.zeros(features, device=device, dtype=dtype))
        self.register_parameter("bias", bias)
        self.beta = nn.Parameter(torch.tensor([float(beta)], device=device, dtype=dtype)) if learn_beta else beta

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return activation(
            x,
            self.kind,
            self.bias,
            slope=self.slope,
            beta=self.beta,
            residual=residual,
            dropout_p=self.dropout if self.training else 0.0,
            channel_dropout=self.channel_dropout,
            channel_dim=self.channel_dim,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        more = [repr(self.kind)]
        more += [f"features={self.bias.numel()}"] if self.bias is not None else []
        more += [f"slope={self.slope}"] if self.kind == "leaky_relu" else []
        more += ["learn_beta=True"] if isinstance(self.beta, Tensor) else [f"beta={self.beta}"] * (self.beta != 1.0)
        more += [f"dropout={self.dropout}"] * bool(self.dropout) + ["channel_dropout=True"] * self.channel_dropout
        more += [f"channel_dim={self.channel_dim}"] * (self.channel_dim != -1)
        return ", ".join(more + [f"backend={self.backend!r}"] * bool(self.backend))


class GatedMLP(nn.Module):
    """The feed-forward layer of Llama and its kin: ``down_proj(f(gate_proj(x)) * up_proj(x))``.

    hidden_size, intermediate_size   widths of x and of the product
    kind     "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU)
    bias     of the three linear layers
    backend  of the gated product: None or "auto", "cpu", "cuda", "triton", "torch"

    x [..., hidden_size] -> [..., hidden_size]. Names in state_dict are those of Hugging Face's LlamaMLP.

    >>> import torch, fastdl
    >>> fastdl.nn.GatedMLP(16, 48)(torch.randn(2, 3, 16)).shape
    torch.Size([2, 3, 16])

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        kind: str = "silu",
        bias: bool = False,
        *,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        if kind not in ("silu", "gelu", "gelu_tanh"):
            raise ValueError(f"kind: expected 'silu', 'gelu' or 'gelu_tanh', got {kind!r}")
        self.kind, self.backend = kind, backend
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias, device, dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias, device, dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.kind, self.gate_proj(x), self.up_proj(x), self.backend))

    def extra_repr(self) -> str:
        return repr(self.kind) + (f", backend={self.backend!r}" if self.backend else "")


def gated(kind: str, gate: Tensor, up: Tensor, backend: str | None) -> Tensor:
    """f(gate) * up for the kinds of `GatedMLP`."""
    if kind == "silu":
        return swiglu(gate, up, backend=backend)
    return geglu(gate, up, approximate="none" if kind == "gelu" else "tanh", backend=backend)
