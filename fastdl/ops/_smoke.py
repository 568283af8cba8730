"""``fastdl::cuda_smoke``: proves that the CUDA part of the library was built, loads and runs. Not public."""

from __future__ import annotations

import torch

from fastdl import _library

_library.define("cuda_smoke(Tensor x, float scale, float shift) -> Tensor")


@torch.library.register_fake("fastdl::cuda_smoke", lib=_library.LIB)
def _(x: torch.Tensor, scale: float, shift: float) -> torch.Tensor:
    return torch.empty_like(x)
