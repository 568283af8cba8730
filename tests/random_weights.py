"""Random quantized weights for tests."""

from __future__ import annotations

import torch

from fastdl import ops
from fastdl.quant import FORMATS, QuantTensor


def random_gguf(name: str, rows: int, cols: int) -> torch.Tensor:
    """GGUF bytes uint8 [rows, bytes per row] with every code possible and finite scales."""
    if name != "q6_k":
        return ops.quantize(torch.randn(rows, cols), name).to_gguf()
    data = torch.randint(0, 256, (rows, FORMATS[name].row_bytes(cols)), dtype=torch.uint8)
    scales = (torch.randn(rows, cols // 256, 1) / 500).half()
    data.view(rows, cols // 256, 210)[..., 208:] = scales.view(torch.uint8)
    return data


def random_weight(name: str, rows: int = 33, cols: int = 256, seed: int = 0) -> QuantTensor:
    """The same for the same arguments; layout "gguf"."""
    torch.manual_seed(seed)
    return QuantTensor.from_gguf(random_gguf(name, rows, cols), name)
