"""Large intermediate tensors in pieces: what a reference computes of one piece is not kept for its gradient.

A reference that walks over chunks of queries keeps every chunk's scores as soon as it is itself differentiated (the
double backward of an op), and together they are the tensor that the op avoids. `recomputed` keeps a chunk's inputs
alone. Test: tests/test_additive_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._library import transformed

ELEMENTS = 1 << 22  # of a chunk's largest tensor: 16 MB of float32


def recomputed(function: Callable[..., Any], *arguments: Any) -> Any:
    """function(*arguments); where it will be differentiated, it runs again then and keeps its arguments only."""
    kept = torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in arguments)
    if not kept or transformed():  # torch.func has no rules for what keeps it from being kept
        return function(*arguments)
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def chunks(length: int, elements: int) -> list[slice]:
    """Pieces of a dimension of ``length``, of which one index has ``elements`` elements; at least one piece."""
    step = max(1, ELEMENTS // max(1, elements))
    return [slice(i, min(i + step, length)) for i in range(0, max(length, 1), step)]
