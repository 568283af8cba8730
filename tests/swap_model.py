"""What tests of swapping share: a small model with every kind of norm, its input, and how near the two must come."""

from __future__ import annotations

import torch
from torch import nn

X = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
NEAR = {"rtol": 1e-4, "atol": 1e-5}


def small() -> nn.Module:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16), nn.GELU())
    return nn.Sequential(nn.LayerNorm(16), block, nn.RMSNorm(16, eps=1e-6), nn.Linear(16, 16))
