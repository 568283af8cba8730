"""The rule of `fastdl.accelerate` for gated MLPs (SwiGLU, GEGLU) of Hugging Face models: known by the names of their
linear layers, swapped where a probe shows that nothing else is computed.

The probe runs the layer's own forward on a copy whose linear layers are small ones in float64: no hook of the model is
called, and weights may be quantized, sharded or on any device. It asks for inputs of two and of three dimensions, small
and large, in training and in evaluation, so that a dropout, a limit or a scale between the products is found.
"""

from __future__ import annotations

import copy
import inspect

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
    """Has the linear layers of a gated MLP by name, an activation or none beside them, and no tensor of its own."""
    children = {name for name, _ in layer.named_children()}
    linear = next((names for names in (_APART, _ONE) if children >= set(names)), None)
    own = any(True for tensors in (layer.parameters, layer.buffers) for _ in tensors(recurse=False))
    return linear is not None and not own and children - set(linear) <= _ACTIVATIONS


def plan_gated(layer: nn.Module) -> str | dict:
    """The instance attributes to set, or the reason to leave it."""
    arguments = list(inspect.signature(type(layer).forward).parameters)[1:]
    if len(arguments) != 1:
        return f"its forward takes more than the tensor: {', '.join(arguments)}"
    activations = {name: child for name, child in layer.named_children() if name in _ACTIVATIONS}
    for name, child in activations.items():  # it is not called any more
        if any(True for tensors in (child.parameters, child.buffers) for _ in tensors()):
            return f"its {name} has parameters or buffers"
        if any(_has_hooks(module) for module in child.modules()):
            return f"its {name} has hooks, which would not be called"
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):  # a model's random numbers stay what they were
            kind = _kind_by_probe(layer, activations)
    except Exception as error:  # whatever another package's forward raises on a small layer
        return f"the probe failed: {type(error).__name__}: {error}"
    return (
        {"_fastdl_gated": kind}
        if kind
        else "does not compute down(f(gate) * up) with silu or gelu (checked on a probe)"
    )


def _has_hooks(module: nn.Module) -> bool:
    return any(vars(module).get(f"_{name}_hooks") for name in ("forward", "forward_pre", "backward", "backward_pre"))


def _kind_by_probe(layer: nn.Module, activations: dict[str, nn.Module]) -> str | None:
    """The kind whose product the layer computes on every probe input."""
    probe, width = copy.copy(layer), 12
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")

    def linear(rows: int, cols: int) -> nn.Linear:
        made = nn.Linear(cols, rows, dtype=torch.float64, device="cpu")
        for parameter in made.parameters():
            parameter.copy_(random(*parameter.shape))
        return made

    one = "gate_up_proj" in layer._modules
    small = {"gate_up_proj": linear(2 * width, width)} if one else {n: linear(width, width) for n in _APART[:2]}
    copies = {name: copy.deepcopy(child) for name, child in activations.items()}
    probe.__dict__["_modules"] = {**layer._modules, **copies, **small, "down_proj": linear(width, width)}
    x = random(3, 5, width) * torch.tensor([0.1, 1.0, 1e6], dtype=torch.float64, device="cpu")[:, None, None]

    def fused(kind: str, x: Tensor) -> Tensor:
        gate, up = probe.gate_up_proj(x).chunk(2, -1) if one else (probe.gate_proj(x), probe.up_proj(x))
        return probe.down_proj(gated(kind, gate, up, "torch"))

    kinds = list(_KINDS)
    for given in (x, x[1]):
        for mode in (False, True):
            probe.train(mode)
            y = type(layer).forward(probe, given)
            kinds = [kind for kind in kinds if _equal(y, fused(kind, given))]
    return kinds[0] if kinds else None


def _equal(y: object, expected: Tensor) -> bool:
    return isinstance(y, Tensor) and y.shape == expected.shape and torch.allclose(y, expected, rtol=1e-9)
