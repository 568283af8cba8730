"""Inference of the recurrent modules on the CPU with weights that are prepared once: both directions stacked, biases
added up, cast, and the recurrent weights packed as the CPU kernels read them.

What is prepared is kept beside the module, not in it, so copies, pickles and state_dicts know nothing of it, and is
valid while every parameter is the same object in the same memory with the same version (torch counts in-place changes).
Writes through ``parameter.data`` are not counted: a sample of each parameter is compared as well, and a change
between training and evaluation forgets what was prepared.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import backend as backends
from .._library import twin_of
from ..ops._recurrent import check_lengths, normalized, pack, packed_products
from ..reference.norm import compute_dtype

_kept: dict[int, Prepared] = {}  # id of a module -> what is prepared for it, as long as the module lives
_SAMPLES = 5  # elements of each dimension that are compared
_autocast = torch._C._is_any_autocast_enabled


def forget(module: nn.Module) -> None:
    _kept.pop(id(module), None)


def prepared(module, x: Tensor) -> Prepared | None:
    """What is ready for this module and a call with x, made where it is not; None where inference takes the general
    way: other devices, other kinds of tensors, autocast, weights that are computed at each call."""
    if type(x) is not Tensor or x.device.type != "cpu" or _autocast():
        return None
    found = _kept.get(id(module))
    if found is not None and found.fits(module, x.dtype):
        return found
    forget(module)
    found = _prepare(module, x)
    if found is not None:
        _kept[id(module)] = found
    return found


def short_way(module, x: Tensor, hx, lengths: Tensor | None):
    """The whole forward of a layer whose weights are prepared, for x [T, B, I] (batch first: [B, T, I]) and states of
    the right shape; None for everything else, which takes the general way and gets its messages."""
    found = _kept.get(id(module))
    if found is None or x.dim() != 3 or x.shape[2] != module.input_size or x.device.type != "cpu" or _autocast():
        return None
    if not found.fits(module, x.dtype):
        return None
    turned = module.batch_first
    if turned:
        x = x.transpose(0, 1)
    states = None
    if hx is not None:
        states = hx if type(hx) is tuple else (hx,)
        _, shapes, _ = found.for_batch(module, x.shape[1])
        if len(states) != len(shapes):
            return None
        for state, shape in zip(states, shapes, strict=True):
            if type(state) is not Tensor or state.shape != shape or state.device.type != "cpu":
                return None
    if lengths is not None:
        lengths = check_lengths(lengths, x.shape[1], x.shape[0], x.device)
    y, last = found.run(module, x, states, lengths)
    return y.transpose(0, 1) if turned else y, (tuple(last) if len(last) == 2 else last[0])


@dataclass
class _Layer:
    """One layer: w_ih [D * G * H, I] and its bias, by direction where there is ln_ih; w_hh [D, G * H, P],
    packed, and what the inference op takes between w_hh and h_mask."""

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
        bias = self.bias if self.ln_ih is None else None
        if self.packed_ih is not None:
            gates_x = packed_products(x, self.packed_ih, bias, directions * rows)
        else:
            gates_x = functional.linear(x, self.w_ih, bias)
        gates_x = gates_x.view(x.shape[0], x.shape[1], directions, rows)
        return gates_x if self.ln_ih is None else normalized(gates_x, self.ln_ih, self.bias, eps, backend)


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
        self.last: tuple[int, list[tuple[int, ...]], list[Tensor]] | None = None
        key = id(module)  # no reference to the module, which would keep it
        self.owner = weakref.ref(module, lambda _: _kept.pop(key, None))
        self.layers = [self._layer(module, layer) for layer in range(module.num_layers)]
        self.seen = [_Seen(name, module._parameters[name]) for name in names]

    def _layer(self, module, layer: int) -> _Layer:
        weights = {name: t.detach() for name, t in module._weights(layer).items()}
        bias, rest = module._inference_arguments(weights, self.dtype)
        w_ih, w_hh = weights["weight_ih"].to(self.dtype), weights["weight_hh"].to(self.dtype)
        ln_ih, w_ih = weights.get("weight_ln_ih"), w_ih.reshape(-1, w_ih.shape[-1])
        if ln_ih is None:
            bias = None if bias is None else bias.to(self.dtype).reshape(-1)
        rest = tuple(t if t is None else t.to(self.dtype if name == "weight_hr" else self.wide) for name, t in rest)
        packed = pack(w_hh, module._gates) if self.native else None
        packed_ih = pack(w_ih[None], 1) if self.native and w_ih.shape[1] else None
        return _Layer(w_ih, bias, ln_ih, w_hh, rest, packed, packed_ih)

    def fits(self, module, dtype: torch.dtype) -> bool:
        if dtype is not self.given or self.environment != backends.setting() or self.options != _options(module):
            return False
        parameters = module._parameters
        for seen in self.seen:  # noqa: SIM110
            if not seen.unchanged(parameters):
                return False
        return True

    def for_batch(self, module, batch: int) -> tuple[int, list[tuple[int, ...]], list[Tensor]]:
        """(batch, shapes of the states, zeros of these shapes), kept for the next call: in one attribute, because
        several threads may call the module."""
        found = self.last
        if found is None or found[0] != batch:
            shapes = [module._state_shape(name, batch) for name in module._states]
            found = self.last = (batch, shapes, [torch.zeros(shape, dtype=self.wide) for shape in shapes])
        return found

    def run(self, module, x: Tensor, states: Sequence[Tensor] | None, lengths: Tensor | None):
        """As Options._run, of which this is the short way."""
        given, wide = self.given, self.wide
        dtypes = [given] * len(module._states) if states is None else [s.dtype for s in states]
        if states is None:
            states = self._initial(module, x.shape[1])
        elif any(dtype is not wide for dtype in dtypes):
            states = [s.to(wide) for s in states]
        y = x if self.dtype is given else x.to(self.dtype)
        if len(self.layers) == 1:
            y, *last = self._one(module, self.layers[0], y, states, lengths)
        else:
            directions, parts = 2 if module.bidirectional else 1, []
            for index, layer in enumerate(self.layers):
                now = [s[index * directions : (index + 1) * directions] for s in states]
                y, *after = self._one(module, layer, y, now, lengths)
                parts.append(after)
            last = [torch.cat(part) for part in zip(*parts, strict=True)]
        if any(dtype is not wide for dtype in dtypes):
            last = [s.to(dtype) for s, dtype in zip(last, dtypes, strict=True)]
        return y if self.dtype is given else y.to(given), last

    def _one(self, module, layer: _Layer, x: Tensor, states: Sequence[Tensor], lengths: Tensor | None):
        y, *last = self.call(
            layer.products(x, module.eps, self.backend), *states, layer.w_hh, *layer.rest, None, lengths, None,
            *module._inference_numbers(), layer.packed,
        )  # fmt: skip
        return y.flatten(2), *last

    def _initial(self, module, batch: int) -> list[Tensor]:
        if self.first is not None:
            return [s.expand(-1, batch, -1).to(self.wide) for s in self.first]
        return self.for_batch(module, batch)[2]


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
