"""Weights in a GGUF type that has no kernel here, brought into one that has.

    Q4_0                        -> q4_1, exact: the same codes, m = -8 d
    Q4_K                        -> q4_1, the same codes; the product of a scale's two factors is rounded to fp16
    IQ4_NL IQ4_XS MXFP4 NVFP4   -> q4_1: decoded, encoded again
    everything else             -> q8_0: decoded, encoded again (Q5_*, Q2_K, Q3_K, ... lose nothing that shows)
    width no multiple of 32     -> f16

What llama.cpp's own kernels do with these types natively costs fewer bytes for 2 and 3 bits; the answers are the same
to 8 bits.
Layouts: ggml-common.h.  Test: pytest tests/test_llm_load.py
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..quant.formats import FORMATS, encode_rows
from .gguf import GGUFFile, ModelFileError, TensorInfo

CHUNK_WEIGHTS = 1 << 22  # decoded at once: 16 MB as float32
FOUR_BITS = ("IQ4_NL", "IQ4_XS", "MXFP4", "NVFP4")


def target_format(info: TensorInfo) -> str:
    """Name of the format a tensor without a kernel is brought into."""
    if info.cols % 32:
        return "f16"
    return "q4_1" if info.type_name in ("Q4_0", "Q4_K", *FOUR_BITS) else "q8_0"


def requantize(file: GGUFFile, name: str) -> tuple[Tensor, str]:
    """(uint8 [rows, bytes per row], format) of a tensor whose own type has no kernel."""
    info = file.info(name)
    target = target_format(info)
    raw = file.tensor_bytes(name)
    try:
        if info.type_name == "Q4_0":
            return _by_rows(raw, q4_0_to_q4_1, info.cols // 32 * 20), target
        if info.type_name == "Q4_K":
            return _by_rows(raw, q4_k_to_q4_1, info.cols // 32 * 20), target
        fmt = FORMATS[target]
        out = torch.empty(info.rows, fmt.row_bytes(info.cols), dtype=torch.uint8)
        step = max(1, CHUNK_WEIGHTS // info.cols)
        for start in range(0, info.rows, step):
            values = torch.from_numpy(file.decode_foreign(name, start, start + step))
            out[start : start + step] = encode_rows(values, fmt, "weights")
    except ModelFileError:
        raise
    except ValueError as error:
        raise ModelFileError(f"{file.path}: tensor {name!r}: {error}") from None
    return out, target


def _by_rows(raw: np.ndarray, convert, row_bytes: int) -> Tensor:
    out = np.empty((len(raw), row_bytes), np.uint8)
    step = max(1, CHUNK_WEIGHTS // row_bytes)
    for start in range(0, len(raw), step):
        part = raw[start : start + step]
        out[start : start + step] = convert(part).reshape(len(part), row_bytes)
    return torch.from_numpy(out)


def q4_0_to_q4_1(rows: np.ndarray) -> np.ndarray:
    """Blocks of 18 bytes (fp16 d, 16 bytes of codes; w = d (q - 8)) -> blocks of 20 (fp16 d, fp16 m = -8 d, the same
    codes). ValueError: infinite, NaN or too large for fp16."""
    blocks = rows.reshape(-1, 18)
    d = np.ascontiguousarray(blocks[:, :2]).view("<f2")
    with np.errstate(all="ignore"):  # _check_scales looks at what comes out
        m = (d.astype(np.float32) * -8).astype("<f2")
    _check_scales(m)
    return np.concatenate((blocks[:, :2], m.view(np.uint8), blocks[:, 2:]), axis=1)


def q4_k_to_q4_1(rows: np.ndarray) -> np.ndarray:
    """Blocks of 144 bytes for 256 weights -> 8 blocks of 20 bytes.

    In: fp16 d, fp16 dmin, 12 bytes with eight 6-bit scales and eight 6-bit minima, 128 bytes of codes (byte i of a
    group of 32: low nibble is weight i of one sub-block, high nibble weight i of the next). w = d scale q - dmin min.
    ValueError: infinite, NaN or too large for fp16.
    """
    blocks = rows.reshape(-1, 144)
    n = len(blocks)
    packed = blocks[:, 4:16].reshape(n, 3, 4)
    low, mid, high = packed[:, 0], packed[:, 1], packed[:, 2]
    scale = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=1)
    minimum = np.concatenate((mid & 63, (high >> 4) | (mid >> 6 << 4)), axis=1)
    out = np.empty((n, 8, 20), np.uint8)
    with np.errstate(all="ignore"):  # _check_scales looks at what comes out
        d = np.ascontiguousarray(blocks[:, 0:2]).view("<f2").astype(np.float32)
        d_min = np.ascontiguousarray(blocks[:, 2:4]).view("<f2").astype(np.float32)
        d, m = (d * scale).astype("<f2"), (-d_min * minimum).astype("<f2")
    _check_scales(d, m)
    out[:, :, 0:2] = d[:, :, None].view(np.uint8)
    out[:, :, 2:4] = m[:, :, None].view(np.uint8)
    pairs = blocks[:, 16:].reshape(n, 4, 32)
    codes = np.stack((pairs & 15, pairs >> 4), axis=2).reshape(n, 8, 32)
    out[:, :, 4:] = codes[:, :, :16] | (codes[:, :, 16:] << 4)
    return out


def _check_scales(*scales: np.ndarray) -> None:
    """A scale that is infinite or too large gives infinite weights; the file's own type may hold what fp16 does not."""
    bad = sum(int((~np.isfinite(values)).sum()) for values in scales)
    if bad:
        raise ValueError(f"weights: {bad} scales are infinite, NaN, or leave float16 (65504) as scales of q4_1")
