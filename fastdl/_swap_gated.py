"""The rule of `fastdl.accelerate` for gated MLPs (SwiGLU, GEGLU) of Hugging Face models: known by the names of their
linear layers, swapped where a probe shows that nothing else is computed.

The probe runs the layer's own forward on a copy whose linear layers are small ones in float64: no hook of the model is
called, and weights may be quantized, sharded or on any device.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from .nn.activation import gated

# Names of the linear layers: (gate, up, down), or (both in one product, down); and of the activation beside them.
_APART, _ONE = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj")
_ACTIVATIONS = {"act_fn", "act", "activation_fn", "activation", "hidden_act"}
_KINDS = ("silu", "gelu", "gelu_tanh")


class GatedByProbe:
    """forward of a gated MLP: its linear layers are called as they are, the product between them is fused."""

    backend: str | None = None

    def forward(self, *given: Tensor, **named: Tensor) -> Tensor:
        (x,) = (*given, *named.values())  # its one argument has another name in every model
        if "gate_up_proj" in self._modules:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gated(self._fastdl_gated, gate, up, self.backend))


def is_gated(layer: nn.Module) -> bool:
    """Has the linear layers of a gated MLP by name, an activation or none beside them, and no parameter of its own."""
    children = {name for name, _ in layer.named_children()}
    linear = next((names for names in (_APART, _ONE) if children >= set(names)), None)
    own = any(True for _ in layer.parameters(recurse=False))
    return linear is not None and not own and children - set(linear) <= _ACTIVATIONS


def plan_gated(layer: nn.Module) -> str | dict:
    """The instance attributes to set, or the reason to leave it."""
    probe, width = copy.copy(layer), 12
    generator = torch.Generator().manual_seed(0)

    def linear(rows: int, cols: int) -> nn.Linear:
        made = nn.Linear(cols, rows, dtype=torch.float64)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        return made

    one = "gate_up_proj" in layer._modules
    small = {"gate_up_proj": linear(2 * width, width)} if one else {n: linear(width, width) for n in _APART[:2]}
    probe.__dict__["_modules"] = {**layer._modules, **small, "down_proj": linear(width, width)}
    x = torch.randn(5, width, generator=generator, dtype=torch.float64)
    try:
        with torch.no_grad():
            y = type(layer).forward(probe, x)
            gate, up = probe.gate_up_proj(x).chunk(2, -1) if one else (probe.gate_proj(x), probe.up_proj(x))
            for kind in _KINDS:
                expected = probe.down_proj(gated(kind, gate, up, "torch"))
                if isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-9):
                    return {"_fastdl_gated": kind}
    except Exception as error:  # whatever another package's forward raises on a small layer
        return f"the probe failed: {type(error).__name__}: {error}"
    return "does not compute down(f(gate) * up) with silu or gelu (checked on a probe)"
