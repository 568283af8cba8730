"""Inference of the recurrent modules on the CPU with weights that are prepared once: both directions stacked, biases
added up, cast, and the recurrent weights packed as the CPU kernels read them.

What is prepared is kept beside the module, not in it, so copies, pickles and state_dicts know nothing of it, and is
valid while every parameter is the same object in the same memory with the same version (torch counts in-place changes).
Writes through ``parameter.data`` are not counted: a sample of each parameter is compared as well, and train() and
eval() forget what was prepared.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import backend as backends
from .._library import twin_of
from ..ops._recurrent import _input_products, pack, packed_products
from ..reference.norm import compute_dtype

_kept: weakref.WeakKeyDictionary[nn.Module, Prepared] = weakref.WeakKeyDictionary()
_SAMPLES = 5  # elements of each dimension that are compared


def forget(module: nn.Module) -> None:
    _kept.pop(module, None)


def prepared(module, x: Tensor) -> Prepared | None:
    """What is ready for this module and a call with x, made where it is not; None where inference takes the general
    way: other devices, other kinds of tensors, autocast, weights that are computed at each call."""
    if type(x) is not Tensor or x.device.type != "cpu" or torch._C._is_any_autocast_enabled():
        return None
    found = _kept.get(module)
    if found is not None and found.fits(module, x.dtype):
        return found
    forget(module)
    found = _prepare(module, x)
    if found is not None:
        _kept[module] = found
    return found


@dataclass
class _Layer:
    """One layer: w_ih [D * G * H, I] and its bias for `_input_products`' plain case, else by direction with ln_ih; w_hh
    [D, G * H, P], packed, and what the inference op takes between w_hh and h_mask."""

    w_ih: Tensor
    bias: Tensor | None
    ln_ih: Tensor | None
    w_hh: Tensor
    rest: tuple[Tensor | None, ...]
    packed: Tensor | None
    packed_ih: Tensor | None

    def products(self, x: Tensor, eps: float, backend: str) -> Tensor:
        """x [T, B, I] -> gates_x [T, B, D, G * H]"""
        directions, rows, _ = self.w_hh.shape
        if self.ln_ih is not None:
            return _input_products(x, self.w_ih, self.bias, self.ln_ih, eps, backend)
        if self.packed_ih is not None:
            gates_x = packed_products(x, self.packed_ih, self.bias, directions * rows)
        else:
            gates_x = functional.linear(x, self.w_ih, self.bias)
        return gates_x.view(x.shape[0], x.shape[1], directions, rows)


class Prepared:
    def __init__(self, module, x: Tensor, names: list[str]) -> None:
        self.options = _options(module)
        self.given, self.dtype = x.dtype, x.dtype if module.weight_dtype is None else module.weight_dtype
        self.backend = backends.choose(
            module._room, module.backend, device=x.device, dtype=self.dtype, hidden=module.hidden_size
        )
        self.environment = backends.setting()
        twin = twin_of(self.backend, x.device)
        self.call, self.native = module._inference_op[twin], self.backend == "cpu"
        self.wide = compute_dtype(self.dtype)
        self.first = [getattr(module, f"{name}_0").detach() for name in module._states] if module.learn_state else None
        self.zeros: list[Tensor] | None = None
        self.layers = [self._layer(module, layer) for layer in range(module.num_layers)]
        self.seen = [_Seen(name, module._parameters[name]) for name in names]

    def _layer(self, module, layer: int) -> _Layer:
        weights = {name: t.detach() for name, t in module._weights(layer).items()}
        bias, rest = module._inference_arguments(weights, self.dtype)
        w_ih, w_hh = weights["weight_ih"].to(self.dtype), weights["weight_hh"].to(self.dtype)
        ln_ih = weights.get("weight_ln_ih")
        if ln_ih is None:
            w_ih = w_ih.reshape(-1, w_ih.shape[-1])
            bias = None if bias is None else bias.to(self.dtype).reshape(-1)
        rest = tuple(t if t is None else t.to(self.dtype if name == "weight_hr" else self.wide) for name, t in rest)
        packed = pack(w_hh, module._gates) if self.native else None
        packed_ih = pack(w_ih[None], 1) if self.native and ln_ih is None and w_ih.shape[1] else None
        return _Layer(w_ih, bias, ln_ih, w_hh, rest, packed, packed_ih)

    def fits(self, module, dtype: torch.dtype) -> bool:
        if dtype is not self.given or self.environment != backends.setting() or self.options != _options(module):
            return False
        parameters = module._parameters
        return all(seen.unchanged(parameters) for seen in self.seen)

    def run(self, module, x: Tensor, states: list[Tensor] | None, lengths: Tensor | None):
        """As Options._run, of which this is the short way."""
        batch, wide, numbers = x.shape[1], self.wide, module._inference_numbers()
        dtypes = [self.given] * len(module._states) if states is None else [s.dtype for s in states]
        if states is None:
            states = self._initial(module, batch)
        directions, last = 2 if module.bidirectional else 1, [[] for _ in dtypes]
        y = x if self.dtype is self.given else x.to(self.dtype)
        one = module.num_layers == 1
        for index, layer in enumerate(self.layers):
            gates_x = layer.products(y, module.eps, self.backend)
            now = states if one else [s[index * directions : (index + 1) * directions] for s in states]
            now = [s if s.dtype is wide else s.to(wide) for s in now]
            y, *after = self.call(gates_x, *now, layer.w_hh, *layer.rest, None, lengths, None, *numbers, layer.packed)
            y = y.flatten(2)
            for found, state in zip(last, after, strict=True):
                found.append(state)
        joined = [found[0] if one else torch.cat(found) for found in last]
        joined = [s if s.dtype is dtype else s.to(dtype) for s, dtype in zip(joined, dtypes, strict=True)]
        return (y if y.dtype is self.given else y.to(self.given)), joined

    def _initial(self, module, batch: int) -> list[Tensor]:
        if self.first is not None:
            return [s.expand(-1, batch, -1) for s in self.first]
        if self.zeros is None or self.zeros[0].shape[1] != batch:
            self.zeros = [torch.zeros(module._state_shape(name, batch), dtype=self.wide) for name in module._states]
        return self.zeros


class _Seen:
    """A parameter as it was."""

    __slots__ = ("bytes", "name", "parameter", "pointer", "sample", "version")

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.pointer, self.version = parameter.data_ptr(), parameter._version
        few = parameter.detach()[tuple(slice(None, None, max(1, size // _SAMPLES)) for size in parameter.shape)]
        self.sample = (few.view(torch.int16) if few.element_size() == 2 else few).numpy()
        self.bytes = self.sample.tobytes()

    def unchanged(self, parameters: dict[str, nn.Parameter]) -> bool:
        p = parameters.get(self.name)
        return (
            p is self.parameter
            and p.data_ptr() == self.pointer
            and p._version == self.version
            and self.sample.tobytes() == self.bytes
        )


def _options(module) -> tuple:
    """What the prepared tensors depend on beside the parameters."""
    return module.backend, module.weight_dtype, module.layer_norm, module.learn_state, module.num_layers


def _prepare(module, x: Tensor) -> Prepared | None:
    parameters = module._parameters
    names = [name + suffix for suffix in module._suffixes() for name in module._weight_names()]
    if module.learn_state:
        names += [f"{name}_0" for name in module._states]
    for name in names:
        p = parameters.get(name)
        if type(p) is not nn.Parameter or p.device.type != "cpu" or p.layout != torch.strided or p.is_inference():
            return None
    return Prepared(module, x, names)
