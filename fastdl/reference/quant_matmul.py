"""What quant_matmul means, in plain torch; also its torch back end (every dtype, float64 included, every device).

    y[n, r] = sum_k a(x)[n, k] * b(W)[r, k] + bias[r]          W[r, k]: the weight that the bytes stand for
    dL/dx[n, k] = sum_r dL/dy[n, r] * W[r, k]                   the gradient ignores the rounding a (straight through)

a, b by activation (for a float64 x the sums are float64, else float32):

    "fp32"  a(x) = x, b(W) = W
    "bf16"  both rounded to bfloat16
    "int8"  x in blocks of 32 along k: amax = max |x|; q = rint(x * (127 / amax)), halves to even;
            a(x) = q * (amax / 127); all in float32; blocks with amax <= 1e-30 count as zeros; b(W) = W.
            Formats without blocks (f16, bf16, f32): as "fp32".

The weights are decoded a few rows at a time: never more than 256 KiB of them at once (one row, if a row is longer).
Where x is rounded or its dtype is not that of the sums, one copy of x is made.
Test: ``pytest tests/test_quant_matmul.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..quant import panel16
from ..quant.formats import Format, chunk_rows, decode_rows

__all__ = ["as_matrix", "quant_matmul", "quant_matmul_backward", "quant_rows", "round_activation", "weight_chunks"]

INT8_BLOCK = 32
INT8_SMALLEST = 1e-30


def round_activation(x: Tensor, activation: str, fmt: Format) -> Tensor:
    """a(x), in x's dtype (float32 or float64)."""
    if activation == "bf16":
        return x.to(torch.bfloat16).to(x.dtype)
    if activation == "int8" and fmt.block > 1 and x.numel():
        blocks = x.to(torch.float32).reshape(-1, INT8_BLOCK)
        amax = blocks.abs().amax(dim=1, keepdim=True)
        amax = torch.where(amax <= INT8_SMALLEST, torch.zeros_like(amax), amax)  # else 127 / amax overflows; NaN stays
        full = torch.full_like(amax, 127.0)  # a tensor: 127.0 / amax would round twice, amax / 127.0 too on CUDA
        inverse = torch.where(amax == 0, torch.zeros_like(amax), full / amax)
        codes = (blocks * inverse).round()
        return (codes.to(x.dtype) * (amax / full).to(x.dtype)).reshape(x.shape)
    return x


def _rounded(x: Tensor, activation: str, fmt: Format, dtype: torch.dtype) -> Tensor:
    """a(x) of x [n, cols] in dtype, x itself where that changes nothing; a few rows at a time."""
    if x.dtype == dtype and (activation == "fp32" or (activation == "int8" and fmt.block == 1)):
        return x
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    step = chunk_rows(x.shape[1])
    for start in range(0, x.shape[0], step):
        out[start : start + step] = round_activation(x[start : start + step].to(dtype), activation, fmt)
    return out


def weight_chunks(data: Tensor, fmt: Format, rows: int, cols: int, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """Yield (first row, W[first row : first row + n] in dtype) through all rows; data in either layout."""
    step = chunk_rows(cols, 8 if dtype == torch.float64 else 4)
    if data.dim() == 2:
        for start in range(0, rows, step):
            yield start, decode_rows(data[start : start + step], fmt, dtype)
        return
    size = panel16.panel_bytes(fmt, cols)
    count = max(1, step // panel16.PANEL)
    for panel in range(0, panel16.panels(rows), count):
        first = panel * panel16.PANEL
        n = min(count * panel16.PANEL, rows - first)
        gguf = panel16.unpack(data[panel * size : (panel + panel16.panels(n)) * size], fmt, n, cols)
        for start in range(0, n, step):
            yield first + start, decode_rows(gguf[start : start + step], fmt, dtype)


def as_matrix(x: Tensor) -> Tensor:
    """x [..., n] -> [product of the rest, n], also where a size is 0."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _work_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def quant_matmul(x: Tensor, data: Tensor, bias: Tensor | None, fmt: Format, rows: int, activation: str) -> Tensor:
    """x [..., cols] -> y [..., rows] in x's dtype."""
    cols = x.shape[-1]
    dtype = _work_dtype(x)
    flat = _rounded(as_matrix(x), activation, fmt, dtype)
    y = torch.empty(flat.shape[0], rows, dtype=x.dtype, device=x.device)
    with torch.autocast(x.device.type, enabled=False):
        for start, w in weight_chunks(data, fmt, rows, cols, dtype):
            part = slice(start, start + w.shape[0])
            if activation == "bf16":
                w = w.to(torch.bfloat16).to(dtype)
            out = flat @ w.T
            y[:, part] = out if bias is None else out.add_(bias[part].to(dtype))
    return y.reshape(*x.shape[:-1], rows)


def quant_matmul_backward(grad: Tensor, data: Tensor, fmt: Format, cols: int) -> Tensor:
    """dL/dy [..., rows] -> dL/dx [..., cols] in grad's dtype, summed in float32 (float64)."""
    rows = grad.shape[-1]
    dtype = _work_dtype(grad)
    flat = as_matrix(grad).to(dtype)
    gx = torch.zeros(flat.shape[0], cols, dtype=dtype, device=grad.device)
    with torch.autocast(grad.device.type, enabled=False):
        for start, w in weight_chunks(data, fmt, rows, cols, dtype):
            gx.addmm_(flat[:, start : start + w.shape[0]], w)
    return gx.to(grad.dtype).reshape(*grad.shape[:-1], cols)


def quant_rows(data: Tensor, ids: Tensor | None, fmt: Format, rows: int, cols: int, dtype: torch.dtype) -> Tensor:
    """Rows ``ids`` [n] (None: all) of W in dtype, [n, cols]."""
    if ids is None:
        out = torch.empty(rows, cols, dtype=dtype, device=data.device)
        for start, w in weight_chunks(data, fmt, rows, cols, dtype):
            out[start : start + w.shape[0]] = w
        return out
    out = torch.empty(ids.shape[0], cols, dtype=dtype, device=data.device)
    step = chunk_rows(cols, 8 if dtype == torch.float64 else 4)
    for start in range(0, ids.shape[0], step):
        part = ids[start : start + step]
        out[start : start + step] = decode_rows(_gguf_rows(data, part, fmt, cols), fmt, dtype)
    return out


def _gguf_rows(data: Tensor, ids: Tensor, fmt: Format, cols: int) -> Tensor:
    """GGUF bytes of rows ids [n], from either layout."""
    if data.dim() == 2:
        return data[ids]
    panels = data.reshape(-1, panel16.panel_bytes(fmt, cols))[ids // panel16.PANEL]
    n = ids.shape[0]
    gguf = panel16.unpack(panels.reshape(-1), fmt, n * panel16.PANEL, cols)
    return gguf.reshape(n, panel16.PANEL, -1)[torch.arange(n, device=ids.device), ids % panel16.PANEL]
