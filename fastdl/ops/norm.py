"""RMS norm: contract of the room `norm`.

    y = x / sqrt(mean(x^2) + eps) * weight

| back end | status |
| --- | --- |
| torch | the reference, differentiable twice, any device |
| cpu, cuda, triton | none of their own yet: on the CPU this norm runs inside `decoder_blocks`, where it is fused |

Test: pytest tests/test_norm.py
"""

from __future__ import annotations

from torch import Tensor

from .. import backend as backends
from ..reference import norm as reference

backends.register_room("rms_norm", {})


def rms_norm(x: Tensor, weight: Tensor | None = None, *, eps: float = 1e-6, backend: str | None = None) -> Tensor:
    """Root-mean-square norm over the last dimension: ``y = x / sqrt(mean(x^2) + eps) * weight``.

    Parameters
    ----------
    x: floating point, [..., width].
    weight: floating point [width], or None for no scaling; its dtype may differ from that of x.
    eps: added to the mean square; not negative.
    backend: "torch", or None for the automatic choice.

    Returns
    -------
    Tensor [..., width] in the dtype of x (as torch.nn.functional.rms_norm); float32 inside, float64 for float64.

    Raises
    ------
    TypeError, ValueError: not floating point; weight of another shape or device; eps negative.
    fastdl.BackendError: a back end without this room is asked for.

    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).

    Example
    -------
    >>> import torch
    >>> from fastdl import ops
    >>> ops.rms_norm(torch.tensor([[3.0, 4.0]]), torch.tensor([1.0, 2.0]), eps=0.0)
    tensor([[0.8485, 2.2627]])
    """
    if not x.is_floating_point():
        raise TypeError(f"x: expected a floating point tensor, got {x.dtype}")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., width] with width of at least 1, got shape {tuple(x.shape)}")
    if weight is not None:
        if not weight.is_floating_point():
            raise TypeError(f"weight: expected a floating point tensor, got {weight.dtype}")
        if weight.shape != x.shape[-1:]:
            raise ValueError(f"weight: expected shape ({x.shape[-1]},) for this x, got {tuple(weight.shape)}")
        if weight.device != x.device:
            raise ValueError(f"weight: expected the device of x, {x.device}, got {weight.device}")
    if not eps >= 0:
        raise ValueError(f"eps: expected a number >= 0, got {eps}")
    backends.choose("rms_norm", backend, device=x.device, dtype=x.dtype)
    return reference.rms_norm(x, weight, eps)
