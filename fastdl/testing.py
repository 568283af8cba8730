"""The contract test of an op, for ours and for a stranger's: `check`, and the rule of its tolerances.

The rule (`assert_accurate`): the largest error against float64 may be at most twice that of PyTorch's own op in the
same dtype, plus a small floor (4 units in the last place of the largest number). Which of a few numbers rounds worst is
chance; for those the rule is better held by the norm of the error (``norm=True``). NaN never passes: outputs are
allocated full of NaN (`poisoned`), so an element that no kernel wrote is seen.

Test: ``pytest tests/test_testing.py``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .emulator import emulated

__all__ = ["assert_accurate", "check", "emulated", "error_norm", "largest_error", "poisoned"]


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, every uninitialised tensor is full of NaN (largest value for integers), those of native code included.

    >>> import torch
    >>> from fastdl.testing import poisoned
    >>> with poisoned():
    ...     torch.empty(2)
    tensor([nan, nan])
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    # torch fills what torch.empty gives when it is asked for determinism; warn_only: no op is refused for it.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)
        torch.utils.deterministic.fill_uninitialized_memory = fill


def largest_error(actual: Tensor, exact: Tensor) -> float:
    """max |actual - exact|, computed in float64; infinite if actual has a NaN or an infinity where exact has none.

    >>> import torch
    >>> from fastdl.testing import largest_error
    >>> largest_error(torch.tensor([1.0, 2.5]), torch.tensor([1.0, 2.0]))
    0.5
    """
    if actual.shape != exact.shape:
        raise AssertionError(f"shape {tuple(actual.shape)}, expected {tuple(exact.shape)}")
    if not actual.numel():
        return 0.0
    actual, exact = actual.detach().double(), exact.detach().double()
    same = (actual == exact) | (actual.isnan() & exact.isnan())  # infinities: equal or infinitely wrong
    error = torch.where(same, torch.zeros_like(exact), (actual - exact).abs())
    return float(torch.where(error.isnan(), torch.full_like(error, float("inf")), error).max())


def error_norm(actual: Tensor, exact: Tensor) -> float:
    """The Euclidean norm of actual - exact; infinite where :func:`largest_error` is.

    >>> import torch
    >>> from fastdl.testing import error_norm
    >>> error_norm(torch.tensor([3.0, 4.0]), torch.zeros(2))
    5.0
    """
    if largest_error(actual, exact) == float("inf"):
        return float("inf")
    actual, exact = actual.detach().double(), exact.detach().double()
    return float(torch.where(exact.isfinite(), actual - exact, torch.zeros_like(exact)).norm())


def assert_accurate(
    actual: Tensor,
    exact: Tensor,
    peer: Tensor | None = None,
    *,
    factor: float = 2.0,
    ulps: float = 4.0,
    norm: bool = False,
    name: str = "y",
) -> tuple[float, float]:
    """Raise AssertionError unless the error of ``actual`` is at most ``factor`` times that of ``peer``, plus a floor.

    actual  what is tested
    exact   the float64 answer
    peer    PyTorch's own op in the dtype of ``actual``; None where it has none: then only the floor is allowed
    ulps    the floor: units in the last place (of actual's dtype) of the largest |exact|
    norm    compare Euclidean norms of errors, the floor in units of the norm of exact

    Returns (error, allowed).

    >>> import torch
    >>> from fastdl.testing import assert_accurate
    >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
    >>> error, allowed = assert_accurate(exact.float(), exact)
    >>> assert_accurate(torch.tensor([1.0, 2.1]), exact)
    Traceback (most recent call last):
    AssertionError: y: error 0.1 against float64, allowed 9.54e-07 (0 by torch's own op)
    """
    measure = error_norm if norm else largest_error
    error = measure(actual, exact)
    theirs = 0.0 if peer is None else measure(peer, exact)
    finite = exact.detach().double().abs()
    finite = finite[finite.isfinite()]
    scale = float(finite.norm() if norm else finite.max()) if finite.numel() else 0.0
    allowed = factor * theirs + ulps * torch.finfo(actual.dtype).eps * scale
    if not error <= allowed:
        raise AssertionError(
            f"{name}: error {error:.3g} against float64, allowed {allowed:.3g} ({theirs:.3g} by torch's own op)"
        )
    return error, allowed


def check(
    op: Callable[..., Any],
    args: Sequence[Any],
    *,
    peer: Callable[..., Any] | Sequence[Callable[..., Any]] | None,
    exact: Callable[..., Any] | None = None,
    gradients: bool = True,
    factor: float = 2.0,
    ulps: float = 4.0,
    norm: bool = False,
) -> dict[str, float]:
    """The contract test: outputs and gradients of ``op(*args)`` by the rule, from poisoned memory, the same twice.

    op         what is tested; returns a tensor or several
    args       tensors and whatever else op takes; gradients are compared for tensors that require them
    peer       PyTorch's own op with the same arguments, or None; several ways to compute it: the largest error counts
    exact      the same in float64, given args with floating tensors in float64; None: peer
    gradients  compare gradients too, of the sum of outputs weighted at random
    norm       hold the rule by norms instead of the largest errors

    Returns name -> error against float64. Raises AssertionError, also when an input was written to or an output shares
    its memory.

    >>> import torch
    >>> from fastdl.testing import check
    >>> x = torch.randn(3, 5, requires_grad=True)
    >>> sorted(check(lambda a: a.sigmoid(), (x,), peer=lambda a: 1 / (1 + (-a).exp())))
    ['gradient of argument 0', 'output 0']
    """
    if exact is None and peer is None:
        raise ValueError("exact: expected a function, because there is no peer")
    peers = [] if peer is None else list(peer) if isinstance(peer, Sequence) else [peer]
    before = [arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in args]
    with poisoned():
        results = _run(op, args, gradients)
        again = _run(op, args, gradients)
    double = [arg.detach().double() if _floating(arg) else arg for arg in args]
    for arg, new in zip(args, double, strict=True):
        if _floating(arg):
            new.requires_grad_(arg.requires_grad)
    wanted = _run(exact or peers[0], double, gradients)
    theirs = [_run(one, args, gradients) for one in peers]
    errors = {}
    for name, actual in results.items():
        if not torch.equal(actual.nan_to_num(), again[name].nan_to_num()):
            raise AssertionError(f"{name}: two runs differ")
        found = [one[name] for one in theirs if name in one]
        worst = max(found, key=lambda other, name=name: largest_error(other, wanted[name]), default=None)
        errors[name], _ = assert_accurate(actual, wanted[name], worst, factor=factor, ulps=ulps, norm=norm, name=name)
    for index, (arg, old) in enumerate(zip(args, before, strict=True)):
        if isinstance(arg, Tensor):
            if not torch.equal(arg.detach(), old):
                raise AssertionError(f"argument {index} was written to")
            memory = arg.untyped_storage().data_ptr()
            if arg.numel() and any(result.untyped_storage().data_ptr() == memory for result in results.values()):
                raise AssertionError(f"an output shares memory with argument {index}")
    return errors


def _floating(arg: Any) -> bool:
    return isinstance(arg, Tensor) and arg.dtype.is_floating_point


def _run(op: Callable[..., Any], args: Sequence[Any], gradients: bool) -> dict[str, Tensor]:
    """Outputs and gradients by name. The weights of the outputs depend on their shapes only."""
    outputs = op(*args)
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    results = {f"output {index}": output.detach() for index, output in enumerate(outputs)}
    index_of = [index for index, arg in enumerate(args) if _floating(arg) and arg.requires_grad]
    differentiable = [output for output in outputs if output.requires_grad]
    if gradients and index_of and differentiable:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(y.shape, generator=generator).to(torch.bfloat16).to(y) for y in differentiable]
        found = torch.autograd.grad(differentiable, [args[index] for index in index_of], weights, allow_unused=True)
        for index, gradient in zip(index_of, found, strict=True):
            if gradient is not None:
                results[f"gradient of argument {index}"] = gradient
    return results
