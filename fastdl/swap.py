"""Fused layers swapped into a living model, and back: accelerate, restore, accelerated.

A layer is swapped by assigning its ``__class__`` a subclass of its own class that computes the same with fastdl's ops.
The object stays: parameters, hooks, device, dtype, train or eval state and names are untouched, ``isinstance`` holds,
and an optimizer made before trains on. No class and no module of another package is changed. What was there is
remembered on the layer itself, so copies and pickles of the model can be restored too.

Rules say which layers are known (`RULES`); later rooms add theirs. Test: pytest tests/test_swap.py.
"""

from __future__ import annotations

import contextlib
import importlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import backend as backends
from ._patterns import select
from .nn.batch_norm import BatchNorm1d, BatchNorm2d
from .nn.group_norm import GroupNorm
from .nn.norm import LayerNorm, RMSNorm
from .ops.norm import rms_norm

__all__ = ["SwapReport", "accelerate", "accelerated", "restore"]

_MARK = "_fastdl_before"  # on a changed module: its class and the instance attributes as they were


# ---- The report -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerSwap:
    """One layer: its name, the class it had, and why it was left (None: it was swapped)."""

    name: str
    kind: str
    reason: str | None


@dataclass(frozen=True)
class SwapReport:
    """Returned by `accelerate`; print it. ``others``: leaf layers without a fused version, class name -> how many."""

    layers: list[LayerSwap]
    others: dict[str, int] = field(default_factory=dict)

    @property
    def swapped(self) -> list[LayerSwap]:
        return [layer for layer in self.layers if layer.reason is None]

    @property
    def left(self) -> list[LayerSwap]:
        return [layer for layer in self.layers if layer.reason is not None]

    def __str__(self) -> str:
        rows = [("layer", "kind", "note")]
        rows += [
            (y.name or "(model)", y.kind, "swapped" if y.reason is None else f"left: {y.reason}") for y in self.layers
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows] if self.layers else []
        lines.append(f"{len(self.swapped)} of {len(self.layers)} known layers swapped")
        if self.others:
            lines.append("no fused version: " + ", ".join(f"{n} {kind}" for kind, n in sorted(self.others.items())))
        return "\n".join(lines)


# ---- Rules ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """room: op that the swapped layer calls. known(layer): the rule is about it. plan(layer): its new class and the
    instance attributes to set, or the reason to leave it."""

    room: str
    known: Callable[[nn.Module], bool]
    plan: Callable[[nn.Module], tuple[type, dict] | str]


def _torch_rule(room: str, ours: type, theirs: type) -> Rule:
    def plan(layer: nn.Module) -> tuple[type, dict] | str:
        if type(layer) is not theirs:
            return f"{type(layer).__name__} is a subclass that may compute something else"
        return ours, {}

    return Rule(room, lambda layer: isinstance(layer, theirs), plan)


class _RMSNormByProbe:
    """forward of a Hugging Face RMS norm: weight and eps as the model's class keeps them."""

    backend: str | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, (offset, promotes) = hidden_states, self._fastdl_rms_norm
        y = rms_norm(x, self.weight, eps=_epsilon(self), weight_offset=offset, backend=self.backend)
        return y.to(torch.promote_types(x.dtype, self.weight.dtype)) if promotes else y


def _epsilon(layer: nn.Module) -> float | None:
    for name in ("variance_epsilon", "eps", "epsilon"):
        if isinstance(getattr(layer, name, None), float):
            return getattr(layer, name)
    return None


def _is_rms_norm(layer: nn.Module) -> bool:
    """Looks like LlamaRMSNorm and its kin: by name, with one weight and nothing else."""
    named = type(layer).__name__.endswith("RMSNorm") and not isinstance(layer, (nn.RMSNorm, nn.LayerNorm))
    parameters = dict(layer.named_parameters())
    return named and list(parameters) == ["weight"] and parameters["weight"].dim() == 1 and not any(layer.children())


def _plan_rms_norm(layer: nn.Module) -> tuple[type, dict] | str:
    """Runs the layer on a probe: its output says whether the weight has an offset, and which dtype comes out."""
    if _epsilon(layer) is None:
        return "its eps was not found"
    weight, forward = layer.weight, type(layer).forward
    if weight.is_meta:
        return "is on the meta device: load the weights first"
    x = torch.randn(4, weight.shape[0], generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    narrow = torch.bfloat16 if weight.dtype == torch.float32 else torch.float32
    try:
        with torch.no_grad():
            expected, promotes = forward(layer, x), forward(layer, x.to(narrow)).dtype != narrow
    except Exception as error:  # another signature, or a device that is not there
        return f"the probe failed: {type(error).__name__}: {error}"
    limit = 1e-4 if weight.dtype == torch.float32 else 2e-2
    for offset in (0.0, 1.0):
        y = rms_norm(x, weight.detach(), eps=_epsilon(layer), weight_offset=offset, backend="torch")
        if isinstance(expected, Tensor) and torch.allclose(y.float(), expected.float(), rtol=limit, atol=limit):
            return _subclass(type(layer)), {"_fastdl_rms_norm": (offset, promotes)}
    return "does not compute an RMS norm (checked on a probe)"


RULES = [
    _torch_rule("layer_norm", LayerNorm, nn.LayerNorm),
    _torch_rule("rms_norm", RMSNorm, nn.RMSNorm),
    _torch_rule("group_norm", GroupNorm, nn.GroupNorm),
    _torch_rule("batch_norm", BatchNorm1d, nn.BatchNorm1d),
    _torch_rule("batch_norm", BatchNorm2d, nn.BatchNorm2d),
    Rule("rms_norm", _is_rms_norm, _plan_rms_norm),
]

# Layers that are fused already.
FUSED = (LayerNorm, RMSNorm, GroupNorm, BatchNorm1d, BatchNorm2d)

# What turns off the inference fast paths of torch's modules, which would not call the layers inside them.
_SLOW = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"enable_nested_tensor": False, "use_nested_tensor": False},
}

# Subclasses of other packages' layers are made on demand, once, and found again by name when a model is unpickled.
_made: dict[type, type] = {}


def _subclass(original: type) -> type:
    if original not in _made:
        name = f"Fused:{original.__module__.replace('.', '/')}:{original.__qualname__.replace('.', '/')}"
        _made[original] = type(name, (_RMSNormByProbe, original), {"__module__": __name__, "__qualname__": name})
    return _made[original]


def __getattr__(name: str) -> type:
    if name.startswith("Fused:"):
        _, module, qualname = name.split(":")
        found = importlib.import_module(module.replace("/", "."))
        for part in qualname.split("/"):
            found = getattr(found, part)
        return _subclass(found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


# ---- Swapping -------------------------------------------------------------------------------------------------------


def accelerate(
    model: nn.Module,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    backend: str | None = None,
) -> SwapReport:
    """Swap fused layers into a model, in place; `restore` gives back what was there.

    model    any module: its layers, and itself
    only     names of layers to take, with * and ? (``"encoder.*"``), one or several; None: all
    exclude  names to leave out
    backend  back end for the swapped layers; None: the automatic choice at each call

    Known are torch's LayerNorm, RMSNorm, GroupNorm, BatchNorm1d and BatchNorm2d, and RMS norms of Hugging Face models,
    which are checked on a probe input. torch's TransformerEncoder and its layers lose their inference fast path when a
    layer inside is swapped, because it would not be called; what padded positions hold is then, as in training, not
    zero.

    Returns a report that prints as a table: what was swapped, what was left and why. Raises TypeError, ValueError (a
    pattern that matches nothing), or fastdl.BackendError (``backend`` cannot run there); the model is then unchanged.

    >>> import torch, fastdl
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.LayerNorm(8))
    >>> print(fastdl.accelerate(model))   # doctest: +SKIP
    layer  kind       note
    1      LayerNorm  swapped
    1 of 1 known layers swapped
    no fused version: 1 Linear
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    known, others = {}, Counter()
    for name, module in model.named_modules():
        rule = next((rule for rule in RULES if rule.known(module)), None)
        if rule is not None:
            known[name] = (module, rule)
        elif not any(module.children()):
            others[type(module).__name__] += 1
    selected = select(list(known), only, exclude, "only")
    plans, layers = [], []
    for name, (module, rule) in known.items():
        before = vars(module).get(_MARK)
        kind = type(module) if before is None else before["class"]
        found = _plan(module, rule, name in selected, backend)
        layers.append(LayerSwap(name, kind.__name__, found if isinstance(found, str) else None))
        if not isinstance(found, str):
            plans.append((module, *found))
    swapped = {module for module, _, _ in plans}
    for module in model.modules():
        slow = next((attributes for kind, attributes in _SLOW.items() if isinstance(module, kind)), None)
        if slow and _MARK not in vars(module) and swapped & set(module.modules()):
            plans.append((module, type(module), slow))
    for module, kind, attributes in plans:
        _change(module, kind, attributes)
    return SwapReport(layers, dict(others))


def restore(model: nn.Module) -> None:
    """Give a model back the layers that `accelerate` swapped. Harmless where there are none.

    >>> import torch, fastdl
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    >>> _ = fastdl.accelerate(model)
    >>> fastdl.restore(model)
    >>> type(model[0]) is torch.nn.LayerNorm
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        _give_back(module)


@contextlib.contextmanager
def accelerated(
    model: nn.Module,
    only: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    backend: str | None = None,
) -> Iterator[SwapReport]:
    """`accelerate` inside a ``with`` block; layers that were swapped before it stay swapped after it.

    >>> import torch, fastdl
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    >>> with fastdl.accelerated(model):
    ...     y = model(torch.randn(2, 8))
    >>> type(model[0]) is torch.nn.LayerNorm
    True
    """
    before = {module for module in model.modules() if _MARK in vars(module)}
    report = accelerate(model, only, exclude, backend)
    try:
        yield report
    finally:
        for module in model.modules():
            if module not in before:
                _give_back(module)


def _plan(module: nn.Module, rule: Rule, selected: bool, backend: str | None) -> tuple[type, dict] | str:
    """What to change, or why not."""
    if _MARK in vars(module):
        return "swapped already"
    if isinstance(module, FUSED):
        return "is a fused layer"
    if not selected:
        return "excluded"
    if "forward" in vars(module):
        return "its forward was replaced on the instance"
    tensor = next(module.parameters(), None)
    device, dtype = (torch.device("cpu"), torch.float32) if tensor is None else (tensor.device, tensor.dtype)
    if device.type == "meta":
        return "is on the meta device: load the weights first"
    if backends.choose(rule.room, backend, device=device, dtype=dtype) == "torch" and backend is None:
        return f"no fused back end for {dtype} on {device} (fastdl.explain says why)"
    found = rule.plan(module)
    if isinstance(found, str) or backend is None:
        return found
    return found[0], {**found[1], "backend": backend}


def _change(module: nn.Module, kind: type, attributes: dict) -> None:
    own = vars(module)
    before = {name: own[name] for name in attributes if name in own}
    own[_MARK] = {"class": type(module), "attributes": before, "set": tuple(attributes)}
    own.update(attributes)
    module.__class__ = kind


def _give_back(module: nn.Module) -> None:
    own = vars(module)
    before = own.pop(_MARK, None)
    if before is None:
        return
    for name in before["set"]:
        own.pop(name, None)
    own.update(before["attributes"])
    module.__class__ = before["class"]
