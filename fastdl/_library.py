"""The op library: schemas, the twins of an op, and the hash that ties the compiled implementations to the schemas.

Schemas are Python's: each ``fastdl/ops/<op>.py`` passes a string literal to :func:`define` or :class:`Op`; C++
registers implementations only. ``tools/schema_hash.py`` reads the same literals at build time.

An :class:`Op` is one contract with several implementations, its twins:

    | twin       | torch.ops name          | implementation                                                      |
    | native     | fastdl::<name>          | C++: CPU key (back end cpu), CUDA key (back end cuda)               |
    | torch      | fastdl::<name>_torch    | fastdl/reference/<room>.py                                          |
    | triton     | fastdl::<name>_triton   | kernels/<room>.py                                                   |
    | emulated   | fastdl_emulated::<name> | the CUDA sources under csrc/emulator, on CPU tensors; tests only    |

Inside torch.func's transforms (vmap, grad, jacrev, ...) and forward-mode AD, for which kernels have no rules, the
reference itself runs in place of any twin: it is made of torch's operations, which have them.

Fake kernel and gradient are registered once for all of them, and a twin's gradient calls the same twin of the backward
op, so that forward and backward run on one back end.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

LIB = torch.library.Library("fastdl", "DEF")
_schemas: list[str] = []


def define(schema: str) -> None:
    """Define ``fastdl::<schema>``, e.g. ``define("double(Tensor x) -> Tensor")``. Takes one string literal."""
    LIB.define(schema)
    _schemas.append(" ".join(schema.split()))


def schemas() -> list[str]:
    """All schemas defined so far, sorted."""
    return sorted(_schemas)


def schema_hash() -> str:
    """SHA-256 of all schemas; the same rule as tools/schema_hash.py."""
    return hashlib.sha256("\n".join(schemas()).encode()).hexdigest()


# Looked up once: these run at every call of every op.
BelowAutograd = torch._C._AutoDispatchBelowAutograd
Parameter = torch.nn.Parameter
functorch_active = torch._C._are_functorch_transforms_active
is_compiling = torch.compiler.is_compiling
is_grad_enabled = torch.is_grad_enabled
tracing = torch._C._get_tracing_state
Wrap = Callable[[Callable[..., Any], str], Callable[..., Any]]
_ops: list[Op] = []
_emulated: torch.library.Library | None = None
emulating = False  # the emulated lane is on: back end "cuda" takes CPU tensors (fastdl/emulator.py)


class Op:
    """One op and its twins (see the head of this file).

    schema     a string literal, ``"name(Tensor x, ...) -> ..."``
    fake       shapes and dtypes of the outputs: takes the op's arguments
    reference  the torch twin: takes the op's arguments, runs on any device, made of torch's differentiable operations
    triton     the same from Triton kernels; None where the room has none

    ``OP["native"](...)`` calls a twin; :func:`twin_of` names the one for a back end. An Op without :meth:`autograd` is
    for calls that need no gradient.
    """

    def __init__(
        self,
        schema: str,
        *,
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        triton: Callable[..., Any] | None = None,
    ) -> None:
        self.name, self.arguments = schema.split("(", 1)
        self._fake, self._reference = fake, reference
        self._gradient: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self._calls: dict[str, Callable[..., Any]] = {}
        self._names: dict[str, str] = {}
        define(schema)
        self._add("native", LIB, self.name)
        for twin, function in (("torch", reference), ("triton", triton)):
            if function is not None:
                LIB.define(f"{self.name}_{twin}({self.arguments}")
                LIB.impl(f"{self.name}_{twin}", function, "CompositeExplicitAutograd")
                self._add(twin, LIB, f"{self.name}_{twin}")
        _ops.append(self)

    def __getitem__(self, twin: str) -> Callable[..., Any]:
        return self._calls[twin]

    def twins(self) -> dict[str, str]:
        """Twin -> name under torch.ops, e.g. {"native": "fastdl::norm_forward", ...}."""
        return dict(self._names)

    def autograd(self, setup: Callable[..., None], backward: Callable[..., Any]) -> None:
        """Give every twin its gradient.

        setup(ctx, inputs, output)       saves what backward needs, as torch.library.register_autograd's setup_context
        backward(twin, ctx, *grads)      returns a gradient per input; calls ``OTHER_OP[twin]``
        """
        self._gradient = (setup, backward)
        for twin, name in self._names.items():
            self._register_gradient(twin, name)

    def _add(self, twin: str, library: torch.library.Library, name: str, wrap: Wrap | None = None) -> None:
        qualified = f"{library.ns}::{name}"
        torch.library.register_fake(qualified, self._fake, lib=library)
        self._calls[twin] = self._fast(twin, getattr(getattr(torch.ops, library.ns), name).default, wrap)
        self._names[twin] = qualified
        if self._gradient is not None:
            self._register_gradient(twin, qualified)

    def _fast(self, twin: str, op: Callable[..., Any], wrap: Wrap | None) -> Callable[..., Any]:
        """The op, called below autograd where nothing asks for a gradient, and through an autograd.Function of its own
        where something does: what torch.library registers does the same more slowly."""
        plain = op if wrap is None else wrap(op, self.name)

        class Differentiable(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                with BelowAutograd():
                    output = plain(*arguments)
                self._gradient[0](ctx, arguments, output)
                return output

            @staticmethod
            def backward(ctx, *grads):
                return self._gradient[1](twin, ctx, *grads)

        def call(*arguments: Any) -> Any:
            if is_compiling():
                return op(*arguments)
            if functorch_active() or forward_ad._current_level >= 0:
                return self._reference(*arguments)
            wanted = self._gradient is not None and is_grad_enabled()
            if not wanted and wrap is None:  # whatever kind of tensor: the dispatcher sorts it out
                with BelowAutograd():
                    return plain(*arguments)
            differentiable = False
            for a in arguments:
                kind = type(a)
                if kind is Tensor or kind is Parameter:
                    differentiable = differentiable or a.requires_grad
                elif isinstance(a, Tensor):
                    return op(*arguments)  # subclasses and compilers' tensors go through the dispatcher
            if differentiable and wanted:
                # torch.jit.trace could not save a Python function
                return Differentiable.apply(*arguments) if tracing() is None else op(*arguments)
            with BelowAutograd():
                return plain(*arguments)

        return call

    def _register_gradient(self, twin: str, name: str) -> None:
        setup, backward = self._gradient
        library = _emulated if twin == "emulated" else LIB
        torch.library.register_autograd(name, functools.partial(backward, twin), setup_context=setup, lib=library)


def plain_call() -> bool:
    """No gradient, no compiler, no trace, no transform: the compiled op checks a call well enough for memory safety."""
    return not (is_grad_enabled() or is_compiling() or transformed()) and tracing() is None


def transformed() -> bool:
    """True inside a transform for which kernels have no rules (see the head of this file)."""
    return not is_compiling() and (functorch_active() or forward_ad._current_level >= 0)


def twin_of(backend: str, device: torch.device) -> str:
    """The twin that a back end means for tensors on a device."""
    if backend == "cuda" and device.type == "cpu":
        return "emulated"
    return backend if backend in ("torch", "triton") else "native"


def triton_twin(room: str, function: str) -> Callable[..., Any]:
    """``function`` of kernels/<room>.py for :class:`Op`; the module, and Triton with it, is imported at the call."""

    def call(*arguments: Any) -> Any:
        return getattr(importlib.import_module(f"fastdl.kernels.{room}"), function)(*arguments)

    return call


def add_emulated_twins(wrap: Wrap) -> None:
    """Define every Op again as ``fastdl_emulated::<name>``, for a library that implements them; its calls go through
    ``wrap(call, name)``. Once per process."""
    global _emulated
    if _emulated is None:
        _emulated = torch.library.Library("fastdl_emulated", "DEF")
        for op in _ops:
            _emulated.define(f"{op.name}({op.arguments}")
            op._add("emulated", _emulated, op.name, wrap)


def gradient_of(function: Callable[..., Sequence[Tensor]]) -> tuple[Callable[..., None], Callable[..., Any]]:
    """Gradient of an op by differentiating its reference: ``(setup, backward)`` for :meth:`Op.autograd`.

    For backward ops, whose gradient only double backward asks for. ``function`` takes the op's arguments and is made of
    differentiable torch operations.
    """

    def setup(ctx, inputs, output):
        ctx.tensors = [index for index, value in enumerate(inputs) if isinstance(value, Tensor)]
        ctx.rest = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.save_for_backward(*(inputs[index] for index in ctx.tensors))
        ctx.set_materialize_grads(False)

    def backward(twin, ctx, *grads):
        arguments = list(ctx.rest)
        wanted = []
        with torch.enable_grad():
            for index, value in zip(ctx.tensors, ctx.saved_tensors, strict=True):
                if ctx.needs_input_grad[index]:
                    value = value.view_as(value) if value.requires_grad else value.detach().requires_grad_()
                    wanted.append((index, value))
                arguments[index] = value
            outputs = function(*arguments)
        pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if g is not None and y.requires_grad]
        result: list[Tensor | None] = [None] * len(arguments)
        if pairs and wanted:
            found = torch.autograd.grad(
                [y for y, _ in pairs],
                [value for _, value in wanted],
                [g for _, g in pairs],
                create_graph=torch.is_grad_enabled(),
                allow_unused=True,
            )
            for (index, _), gradient in zip(wanted, found, strict=True):
                result[index] = gradient
        return tuple(result)

    return setup, backward
