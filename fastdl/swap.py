"""Fused layers swapped into a living model, and back: accelerate, restore, accelerated.

A layer is swapped by assigning its ``__class__`` a subclass of its own class that computes the same with fastdl's ops.
The object stays: parameters, hooks, device, dtype, train or eval state and names are untouched, ``isinstance`` holds,
and an optimizer made before trains on. No class and no module of another package is changed. What was there is
remembered on the layer itself, so copies and pickles of the model can be restored too.

Which layers are known stands in _swap_rules.py. Test: pytest tests/test_swap.py.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from . import backend as backends
from ._patterns import select
from ._swap_rules import FUSED, RULES, Rule
from .nn._recurrent_inference import forget

__all__ = ["SwapReport", "accelerate", "accelerated", "restore"]

_MARK = "_fastdl_before"  # on a changed module: its class and attributes as they were, and the class that it was given


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


# What turns off the inference fast paths of torch's modules, which would not call the layers inside them.
_SLOW = {
    nn.TransformerEncoderLayer: {"activation_relu_or_gelu": 0},
    nn.TransformerEncoder: {"enable_nested_tensor": False, "use_nested_tensor": False},
}

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

    Known are torch's LayerNorm, RMSNorm, GroupNorm, BatchNorm1d and BatchNorm2d, LSTM, GRU, RNN and their cells,
    MultiheadAttention, TransformerEncoderLayer and TransformerDecoderLayer, and RMS norms and gated MLPs (SwiGLU,
    GEGLU) of Hugging Face models, which are checked on a probe input; of an MLP the product between its linear layers
    is fused. The attention of Hugging Face models is chosen by them: see `fastdl.hf`.
    A layer that stands at several places has all their names: it is taken where one matches ``only`` and none matches
    ``exclude``. torch's TransformerEncoder and its layers lose their inference fast path when a layer inside is
    swapped, because it would not be called; what padded positions hold is then, as in training, not zero.

    Swapped layers go through torch.compile (recurrent ones with a break of its graph, as before the swap),
    torch.export, torch.jit.trace, autocast, copies, pickles, DDP and fully_shard. torch.jit.script and
    torch.fx.symbolic_trace read Python source and cannot take them; nor can a layer be swapped whose input is a DTensor
    (tensor parallelism): exclude it.

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
    backend = None if backend == "auto" else backend
    known, others = {}, Counter()
    for name, module in model.named_modules():
        rule = next((rule for rule in RULES if rule.known(module)), None)
        if rule is not None:
            known[name] = (module, rule)
        elif not any(module.children()):
            others[type(module).__name__] += 1
    names: dict[nn.Module, list[str]] = {module: [] for module, _ in known.values()}
    for name, module in model.named_modules(remove_duplicate=False):
        if module in names:
            names[module].append(name)
    every = [name for found in names.values() for name in found]
    taken, kept = select(every, only, (), "only"), select(every, None, exclude)
    plans, layers = [], []
    for name, (module, rule) in known.items():
        before = vars(module).get(_MARK)
        kind = type(module) if before is None else before["class"]
        selected = not taken.isdisjoint(names[module]) and kept.issuperset(names[module])
        found = _plan(module, rule, selected, backend)
        layers.append(LayerSwap(name, kind.__name__, found if isinstance(found, str) else None))
        if not isinstance(found, str):
            plans.append((module, *found))
    swapped = {module for module, _, _ in plans}
    for module in model.modules():
        slow = next((attributes for kind, attributes in _SLOW.items() if isinstance(module, kind)), None)
        if slow and _MARK not in vars(module) and module not in swapped and swapped & set(module.modules()):
            plans.append((module, type(module), slow))
    for module, kind, attributes in plans:
        _change(module, kind, attributes)
    return SwapReport(layers, dict(others))


def restore(model: nn.Module) -> None:
    """Give a model back the layers that `accelerate` swapped. Harmless where there are none. What was done to a layer
    after the swap (parametrizations, torch's fully_shard) stays. RuntimeError, and nothing is changed, where a layer's
    forward was replaced after the swap: the new one may hold the swapped one.

    >>> import torch, fastdl
    >>> model = torch.nn.Sequential(torch.nn.LayerNorm(8))
    >>> _ = fastdl.accelerate(model)
    >>> fastdl.restore(model)
    >>> type(model[0]) is torch.nn.LayerNorm
    True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    _check_forwards(model)
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
        _check_forwards(model)
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
    own[_MARK] = {"class": type(module), "now": kind, "attributes": before, "set": tuple(attributes)}
    own.update(attributes)
    module.__class__ = kind


def _check_forwards(model: nn.Module) -> None:
    for name, module in model.named_modules():
        before = vars(module).get(_MARK)
        if before is not None and before["now"] is not before["class"] and "forward" in vars(module):
            raise RuntimeError(
                f"{name or 'the model'}: its forward was replaced after the swap (by device_map's hooks, say), and may "
                "hold the swapped one: take that back first, then restore"
            )


def _give_back(module: nn.Module) -> None:
    own = vars(module)
    before = own.pop(_MARK, None)
    if before is None:
        return
    for name in before["set"]:
        own.pop(name, None)
    own.update(before["attributes"])
    forget(module)
    module.__class__ = _rebased(type(module), before["now"], before["class"])


def _rebased(kind: type, now: type, original: type) -> type:
    """The class that a module goes back to: its original one, or, where its class was extended after the swap, as
    torch's parametrize and fully_shard do, the same extension of the original one."""
    if kind is now:
        return original
    if now not in kind.__mro__[1:]:
        return kind  # somebody else gave it another class, which is theirs to keep
    bases = tuple(_rebased(base, now, original) if issubclass(base, now) else base for base in kind.__bases__)
    members = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    return type(kind)(kind.__name__, bases, members)
