"""The emulated lane: CUDA kernels compiled by g++ and run on CPU tensors, for tests on machines without a GPU.

``libfastdl_emulated.so`` holds the very same ``csrc/cuda`` sources as the GPU build, over the execution model in
``csrc/emulator``. Inside ``with emulated():`` the back end "cuda" takes CPU tensors, and every op runs three times, its
threads in forward, reverse and shuffled order; results that differ in one bit raise `EmulatorError`, for they show a
race. `make build` builds the library in the source tree; it is no part of a wheel.

Test: tests/test_emulator.py
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import _library, backend

__all__ = ["ORDERS", "EmulatorError", "emulated", "emulator_error"]

ORDERS = ("forward", "reverse", "shuffled")


class EmulatorError(RuntimeError):
    """The emulator found a mistake in a kernel, or is not there."""


class _State:
    library: ctypes.CDLL | None = None
    error: str | None = None


def library_path() -> Path:
    """Where the emulated library is expected: FASTDL_EMULATED_LIBRARY, or beside this package."""
    return Path(os.environ.get("FASTDL_EMULATED_LIBRARY") or Path(__file__).with_name("libfastdl_emulated.so"))


def emulator_error() -> str | None:
    """Why the emulated lane cannot run; None when it can. Loads the library at the first call."""
    if _State.library is None and _State.error is None:
        path = library_path()
        try:
            if not path.is_file():
                _State.error = f"{path} does not exist: build it with `make build` in the source tree"
            elif reason := backend.unfit(path):
                _State.error = reason
            else:
                _library.add_emulated_twins(_in_every_order)
                torch.ops.load_library(str(path))
                _State.library = ctypes.CDLL(str(path))
        except (OSError, RuntimeError) as error:
            _State.error = f"{path} could not be loaded: {error}"
    return _State.error


@contextlib.contextmanager
def emulated() -> Iterator[None]:
    """Inside, ``backend="cuda"`` runs CUDA kernels on CPU tensors, under the emulator.

    >>> import torch, fastdl
    >>> from fastdl.testing import emulated
    >>> with emulated():   # doctest: +SKIP
    ...     y = fastdl.ops.layer_norm(torch.randn(2, 8), backend="cuda")
    """
    if (error := emulator_error()) is not None:
        raise EmulatorError(error)
    before, _library.emulating = _library.emulating, True
    try:
        yield
    finally:
        _library.emulating = before


def _in_every_order(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The op, run once for each order of threads; the results must be equal to the bit."""

    def run(*arguments: Any) -> Any:
        results = []
        for number, _ in enumerate(ORDERS):
            _State.library.fastdl_emulator_set_order(number)
            results.append(call(*arguments))
        _State.library.fastdl_emulator_set_order(0)
        for order, other in zip(ORDERS[1:], results[1:], strict=True):
            for index, (a, b) in enumerate(zip(_tensors(results[0]), _tensors(other), strict=True)):
                if not torch.equal(_bits(a), _bits(b)):
                    raise EmulatorError(
                        f"{name}: output {index} depends on the order of threads (forward and {order} differ): a "
                        "race, or shared memory that was read before it was written"
                    )
        return results[0]

    return run


def _tensors(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _bits(t: Tensor) -> Tensor:
    return t.detach().contiguous().reshape(-1).view(torch.uint8)
