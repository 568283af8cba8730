"""What the Triton kernels of several rooms use: sigmoid and tanh, dropout, rows of a tensor, facts of the device, cases
to compile."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import Config


@triton.jit
def dropout(x, seed, index, p, scale):
    """x * scale where kept, else 0, as in fastdl/reference/philox.py. index: int64, in the contiguous tensor.

    tl.philox gets the counter in words of 32 bits: some versions of tl.rand make of an int64 index a counter of 64-bit
    words, which is another sequence.
    """
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    zero = low * 0
    word, _, _, _ = tl.philox(seed, low, high, zero, zero)
    bits = word.to(tl.int32, bitcast=True)
    u = tl.where(bits < 0, ~bits, bits).to(tl.float32) * 4.6566127342e-10
    return tl.where(u >= p, x * scale, 0.0)


@triton.jit
def sigmoid(t):
    e = tl.exp(-tl.abs(t))
    return tl.where(t < 0, e, 1.0) / (1.0 + e)


@triton.jit
def tanh(t):
    """Around 0 an odd polynomial, beyond by exp: the coefficients of csrc/common/simd_math.h."""
    a, s = tl.abs(t), t * t
    p = -0.333333275 + s * (0.13332619 + s * (-0.0538279153 + s * (0.0208891463 + s * -0.00594224347)))
    far = 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0)
    return tl.where(a <= 0.65, t + t * s * p, tl.where(t < 0, -far, far))


def dropout_scale(p: float) -> float:
    return 0.0 if p >= 1 else 1.0 / (1.0 - p)


@functools.lru_cache
def _facts(device: torch.device) -> tuple[int | None, int]:
    if device.type != "cuda":
        return None, 2
    properties = torch.cuda.get_device_properties(device)
    return properties.major * 10 + properties.minor, properties.multi_processor_count


def capability(device: torch.device) -> int | None:
    """Compute capability as 90; None on the CPU."""
    return _facts(device)[0]


def processors(device: torch.device) -> int:
    """Multiprocessors of the GPU; 2 when interpreted, so that tests see partial sums."""
    return _facts(device)[1]


def on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device: makes that the tensors' own."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def as_rows(x: Tensor) -> tuple[Tensor, int]:
    """x [..., cols] as rows a fixed distance apart, elements side by side: (x, distance). Else a copy of that kind."""
    step, expected = None, None
    regular = x.shape[-1] == 1 or x.stride(-1) == 1
    for size, stride in zip(reversed(x.shape[:-1]), reversed(x.stride()[:-1]), strict=True):
        if size != 1:
            regular = regular and expected in (None, stride)
            step = stride if step is None else step
            expected = stride * size
    if regular:
        return x, x.shape[-1] if step is None else step
    return x.contiguous(), x.shape[-1]


class Case(NamedTuple):
    """One kernel as it is launched, for tools/triton_compile.py: the arguments of triton.compiler.ASTSource."""

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, int | bool]


def case(
    name: str,
    kernel: Any,
    types: Mapping[str, str],
    block: int,
    config: Config,
    constants: Mapping[str, Any] | None = None,
    note: str = "",
) -> Case:
    """types: Triton's type of every argument but BLOCK and ROWS; constants: arguments that Triton makes constants of,
    None and 1. More than the kernel has do not matter. note: what tells the case from others of the kernel."""
    constexprs = {"BLOCK": block, "ROWS": config.rows, **(constants or {})}
    constexprs = {key: value for key, value in constexprs.items() if key in kernel.arg_names}
    signature = {key: "constexpr" if key in constexprs else types[key] for key in kernel.arg_names}
    return Case(f"{name}[{block}] {note}".rstrip(), kernel, signature, constexprs, config.options)
