"""Philox4x32-10 in plain PyTorch: the random numbers of dropout, the same in every back end.

    bits(i) = first word of Philox4x32-10 with the key (seed low, seed high) and the counter (i low, i high, 0, 0)
    u(i)    = bits, read as int32, folded to 0 .. 2^31 - 1 (x < 0: -x - 1), times 4.6566127342e-10, in float32: [0, 1)
    keep(i) = u(i) >= p

i is an element's index in the contiguous tensor. Triton: kernels/_common.py (``tl.rand`` of int64 differs by version).
Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3" (SC 2011).  Test: tests/test_philox.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
SCALE = 4.6566127342e-10  # the largest float32 s for which (2^31 - 1) * s rounds below 1


def philox(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """seed int64 [1], counter int64 [...] -> four words int64 [...] in 0 .. 2^32 - 1."""
    c0, c1 = counter & MASK, (counter >> 32) & MASK
    c2, c3 = torch.zeros_like(c0), torch.zeros_like(c0)
    k0, k1 = seed & MASK, (seed >> 32) & MASK
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 wraps; the 64 bits are those of the unsigned product
        c0, c1, c2, c3 = (b >> 32) & MASK ^ c1 ^ k0, b & MASK, (a >> 32) & MASK ^ c3 ^ k1, a & MASK
        k0, k1 = (k0 + 0x9E3779B9) & MASK, (k1 + 0xBB67AE85) & MASK
    return c0, c1, c2, c3


def uniform(seed: Tensor, counter: Tensor) -> Tensor:
    """seed int64 [1], counter int64 [...] -> float32 [...] in [0, 1)."""
    bits = philox(seed, counter)[0]
    return torch.where(bits > 0x7FFFFFFF, MASK - bits, bits).to(torch.float32) * SCALE


def keep_mask(seed: Tensor, shape: torch.Size | tuple[int, ...], p: float) -> Tensor:
    """bool [*shape]: True where dropout with probability p keeps the element."""
    count = 1
    for size in shape:
        count *= size
    return (uniform(seed, torch.arange(count, device=seed.device)) >= p).reshape(shape)


def dropout(x: Tensor, seed: Tensor, p: float, shape: torch.Size | tuple[int, ...] | None = None) -> Tensor:
    """x / (1 - p) where kept, else 0. x in the dtype it is computed in; shape: of the mask, which is broadcast to x."""
    scale = 0.0 if p >= 1 else 1.0 / (1.0 - p)
    return torch.where(keep_mask(seed, x.shape if shape is None else shape, p), x * scale, torch.zeros_like(x))
