"""SwiGLU: contract of the room `activation`.

    y = silu(gate) * up

| back end | status |
| --- | --- |
| torch | the reference, differentiable twice, any device |
| cpu, cuda, triton | none of their own yet: on the CPU this product runs inside `decoder_blocks`, where it is fused |

Test: pytest tests/test_activation.py
"""

from __future__ import annotations

from torch import Tensor

from .. import backend as backends
from ..reference import activation as reference

backends.register_room("swiglu", {})


def swiglu(gate: Tensor, up: Tensor, *, backend: str | None = None) -> Tensor:
    """The gated product of a SwiGLU layer: ``silu(gate) * up``, with ``silu(t) = t * sigmoid(t)``.

    Parameters
    ----------
    gate, up: floating point, [...], of one shape, dtype and device.
    backend: "torch", or None for the automatic choice.

    Returns
    -------
    Tensor like gate; float32 inside, float64 for float64.

    Raises
    ------
    TypeError, ValueError: not floating point, or gate and up differ in dtype, shape or device.
    fastdl.BackendError: a back end without this room is asked for.

    Source: Shazeer, "GLU Variants Improve Transformer" (2020).

    Example
    -------
    >>> import torch
    >>> from fastdl import ops
    >>> ops.swiglu(torch.tensor([0.0, 1.0]), torch.tensor([5.0, 2.0]))
    tensor([0.0000, 1.4621])
    """
    if not gate.is_floating_point() or gate.dtype != up.dtype:
        raise TypeError(f"gate, up: expected one floating point dtype, got {gate.dtype} and {up.dtype}")
    if gate.shape != up.shape:
        raise ValueError(f"gate, up: expected one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    if gate.device != up.device:
        raise ValueError(f"gate, up: expected one device, got {gate.device} and {up.device}")
    backends.choose("swiglu", backend, device=gate.device, dtype=gate.dtype)
    return reference.swiglu(gate, up)
