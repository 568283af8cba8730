"""Weight formats of GGUF: one table, and for each entry how one block of bytes is read and written.

A row of a weight matrix is cut into blocks of ``block`` weights; each block is ``block_bytes`` bytes in the file, and
the blocks of a row follow each other. The functions here are the meaning of the formats (plain torch, any device); the
bytes equal those of ggml's reference quantizers and of the Python package ``gguf``.

To add a format: write its ``decode`` (and ``encode``, if files are to be written in it) and add one entry to FORMATS.

Source: ggml's ``ggml-quants.c`` and ``ggml-common.h``. Test: ``pytest tests/test_quant_formats.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import backend

__all__ = ["FORMATS", "Format", "by_id", "decode_rows", "encode_rows", "encode_rows_torch", "find"]

CHUNK_BYTES = 256 * 1024  # rows are coded in chunks of about this many float bytes: temporaries stay in the cache


@dataclass(frozen=True)
class Format:
    """One weight format.

    name         lower-case name, as users type it
    ggml_id      type id in GGUF files and in the native ops
    block        weights per block
    block_bytes  bytes per block
    largest      every finite |w| up to this can be encoded; above it a scale (or the value itself) may leave its range
    decode       (uint8 [n, block_bytes], float dtype) -> [n, block]
    encode       float32 [n, block] -> uint8 [n, block_bytes]; None: the format can be read only
    """

    name: str
    ggml_id: int
    block: int
    block_bytes: int
    largest: float
    decode: Callable[[Tensor, torch.dtype], Tensor]
    encode: Callable[[Tensor], Tensor] | None

    def row_bytes(self, cols: int) -> int:
        """Bytes of a row of ``cols`` weights; ``cols`` must divide into blocks (see `check_cols`)."""
        return cols // self.block * self.block_bytes

    def check_cols(self, cols: int, name: str = "w") -> None:
        """Raise ValueError unless rows of ``cols`` weights can be cut into blocks of this format."""
        if cols == 0:
            raise ValueError(f"{name}: expected at least one column (in_features), got 0")
        if cols % self.block:
            fits = [f.name for f in FORMATS.values() if cols % f.block == 0]
            raise ValueError(
                f"{name}: {self.name} needs rows of a multiple of {self.block} weights (in_features), got {cols}; "
                f"formats for this width: {', '.join(fits)}"
            )


def _half(bytes_: Tensor, dtype: torch.dtype) -> Tensor:
    """uint8 [n, 2 k] -> the k fp16 values in them, as dtype."""
    return bytes_.contiguous().view(torch.float16).to(dtype)


def _half_bytes(values: Tensor) -> Tensor:
    return values.to(torch.float16).contiguous().view(torch.uint8)


def _divide(values: Tensor, divisor: float) -> Tensor:
    # A divisor on the device: on CUDA torch turns division by a Python number into a product, which rounds differently.
    return values / torch.full((), divisor, dtype=values.dtype, device=values.device)


def _inverse(d: Tensor) -> Tensor:
    """1 / d, and 0 where d is 0 or so small that 1 / d overflows (such a d is 0 in fp16: the codes do not matter)."""
    inverse = d.reciprocal()
    return torch.where(inverse.isfinite(), inverse, torch.zeros_like(inverse))


# Q4_1: fp16 d, fp16 m, 16 bytes; low nibbles are codes 0..15, high nibbles codes 16..31. value = q * d + m.
def _q4_1_decode(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    d, m = _half(blocks[:, 0:2], dtype), _half(blocks[:, 2:4], dtype)
    codes = torch.cat([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], dim=1)
    return codes.to(dtype).mul_(d).add_(m)


def _first_minimum(blocks: Tensor) -> Tensor:
    """[n, 32] -> [n, 1]. Of -0.0 and 0.0 ggml keeps whichever comes first; torch's amin and argmin take either."""
    places = torch.arange(blocks.shape[1], device=blocks.device)
    equal = blocks == blocks.amin(dim=1, keepdim=True)
    return blocks.gather(1, places.where(equal, places[-1]).amin(dim=1, keepdim=True))


def _q4_1_encode(blocks: Tensor) -> Tensor:
    low = _first_minimum(blocks)
    d = _divide(blocks.amax(dim=1, keepdim=True) - low + 0.0, 15.0)  # + 0.0: -0.0 - 0.0 is -0.0, ggml's d is 0.0
    codes = ((blocks - low) * _inverse(d) + 0.5).to(torch.uint8).clamp_(max=15)
    return torch.cat([_half_bytes(d), _half_bytes(low), codes[:, :16] | (codes[:, 16:] << 4)], dim=1)


# Q8_0: fp16 d, 32 int8 codes. value = q * d.
def _q8_0_decode(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).to(dtype).mul_(_half(blocks[:, 0:2], dtype))


def _q8_0_encode(blocks: Tensor) -> Tensor:
    d = _divide(blocks.abs().amax(dim=1, keepdim=True), 127.0)
    scaled = blocks * _inverse(d)
    size, sign = scaled.abs(), scaled.sign()  # C's roundf: half away from zero, without the error of floor(x + 0.5)
    floor = size.floor()
    codes = (sign * (floor + (2 * (size - floor)).floor())).to(torch.int8)
    return torch.cat([_half_bytes(d), codes.view(torch.uint8)], dim=1)


def q6_k_codes(blocks: Tensor) -> Tensor:
    """uint8 [n, 210] -> the codes 0..63 of the 256 weights in order, uint8 [n, 256]."""
    n = blocks.shape[0]
    low = blocks[:, :128].reshape(n, 2, 64)
    low = torch.stack([low & 15, low >> 4], dim=2).reshape(n, 8, 32)
    high = blocks[:, 128:192].reshape(n, 2, 32)
    high = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=2).reshape(n, 8, 32)
    return (low | (high << 4)).reshape(n, 256)


# Q6_K: 128 bytes of low nibbles, 64 bytes of high bit pairs, 16 int8 scales (one for 16 weights), fp16 d.
# value = (d * scale) * (code - 32).
def _q6_k_decode(blocks: Tensor, dtype: torch.dtype) -> Tensor:
    scales = blocks[:, 192:208].contiguous().view(torch.int8).to(dtype).mul_(_half(blocks[:, 208:210], dtype))
    codes = q6_k_codes(blocks).reshape(-1, 16, 16).to(dtype).sub_(32)
    return codes.mul_(scales[:, :, None]).reshape(-1, 256)


def _plain(weights: torch.dtype) -> tuple[Callable[[Tensor, torch.dtype], Tensor], Callable[[Tensor], Tensor]]:
    """Coding of a format that is a torch dtype: a block is one weight."""
    return (
        lambda blocks, dtype: blocks.contiguous().view(weights).to(dtype),
        lambda blocks: blocks.to(weights).contiguous().view(torch.uint8),
    )


_FP16_MAX = 65504.0

FORMATS: dict[str, Format] = {
    entry.name: entry
    for entry in (
        # name, ggml id, block, block bytes, largest |w|, decode, encode
        Format("q4_1", 3, 32, 20, _FP16_MAX, _q4_1_decode, _q4_1_encode),
        Format("q8_0", 8, 32, 34, _FP16_MAX * 127, _q8_0_decode, _q8_0_encode),
        Format("q6_k", 14, 256, 210, 0.0, _q6_k_decode, None),
        Format("f16", 1, 1, 2, _FP16_MAX, *_plain(torch.float16)),
        Format("bf16", 30, 1, 2, torch.finfo(torch.bfloat16).max, *_plain(torch.bfloat16)),
        Format("f32", 0, 1, 4, torch.finfo(torch.float32).max, *_plain(torch.float32)),
    )
}
_BY_ID = {entry.ggml_id: entry for entry in FORMATS.values()}


def find(name: str, argument: str = "format") -> Format:
    """The format called ``name``; ValueError that lists the known ones otherwise."""
    if not isinstance(name, str):
        raise TypeError(f"{argument}: expected a format name (str), got {type(name).__name__}")
    if name not in FORMATS:
        raise ValueError(f"{argument}: unknown format {name!r}; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def by_id(ggml_id: int) -> Format:
    """The format with this ggml type id; ValueError that lists the known ones otherwise."""
    if ggml_id not in _BY_ID:
        known = ", ".join(f"{f.ggml_id} ({f.name})" for f in FORMATS.values())
        raise ValueError(f"format: no format with ggml id {ggml_id}; known: {known}")
    return _BY_ID[ggml_id]


def chunk_rows(cols: int, itemsize: int = 4) -> int:
    """How many rows of ``cols`` floats are coded at once."""
    return max(1, CHUNK_BYTES // max(1, cols * itemsize))


def decode_rows(data: Tensor, fmt: Format, dtype: torch.dtype) -> Tensor:
    """uint8 [n, row_bytes] -> weights [n, cols] in dtype, computed in float32 (float64 for float64) and rounded."""
    rows, width = data.shape
    cols = width // fmt.block_bytes * fmt.block
    work = torch.float64 if dtype == torch.float64 else torch.float32
    if not data.numel():
        return torch.empty(rows, cols, dtype=dtype, device=data.device)
    return fmt.decode(data.reshape(-1, fmt.block_bytes), work).reshape(rows, cols).to(dtype)


def encode_rows(w: Tensor, fmt: Format, argument: str = "w") -> Tensor:
    """Weights [n, cols], any float dtype -> uint8 [n, row_bytes]; native code on a CPU where it is built.

    ValueError that names ``argument``: a format that cannot be written, NaN or infinity, out of the format's range.
    """
    largest = check_weights(w, fmt, argument)
    if w.device.type == "cpu" and backend.native_loaded():
        coded = torch.ops.fastdl.quant_quantize(w.to(torch.float32), fmt.ggml_id)
    else:
        coded = encode_rows_torch(w, fmt)
    check_range(coded, fmt, largest, argument)
    return coded


def encode_rows_torch(w: Tensor, fmt: Format) -> Tensor:
    """`encode_rows` in plain torch and unchecked: what the native code has to equal."""
    rows, cols = w.shape
    out = torch.empty(rows, fmt.row_bytes(cols), dtype=torch.uint8, device=w.device)
    step = chunk_rows(cols)
    for start in range(0, rows, step):
        part = w[start : start + step].to(torch.float32)
        out[start : start + step] = fmt.encode(part.reshape(-1, fmt.block)).reshape(part.shape[0], -1)
    return out


def check_weights(w: Tensor, fmt: Format, argument: str = "w") -> float:
    """The largest |w|. ValueError: a format that cannot be written, a width that does not divide, NaN, infinity."""
    if fmt.encode is None:
        writable = ", ".join(f.name for f in FORMATS.values() if f.encode)
        raise ValueError(f"format: {fmt.name} can be read but not written; formats that can be written: {writable}")
    fmt.check_cols(w.shape[1], argument)
    if not w.numel():
        return 0.0
    low, high = torch.aminmax(w)
    largest = max(abs(float(low)), abs(float(high)))
    if not largest < float("inf"):  # NaN compares false
        count = int((~torch.isfinite(w)).sum())
        raise ValueError(f"{argument}: expected finite weights, got {count} NaN or infinite of {w.numel()}")
    return largest


def check_range(coded: Tensor, fmt: Format, largest: float, argument: str = "w") -> None:
    """ValueError if these rows do not decode to finite numbers: a scale or a value left its floating-point range."""
    if largest <= fmt.largest:
        return
    step = chunk_rows(coded.shape[1])
    for start in range(0, coded.shape[0], step):
        if not torch.isfinite(decode_rows(coded[start : start + step], fmt, torch.float32)).all():
            raise ValueError(
                f"{argument}: weights up to {largest:.6g} are out of the range of {fmt.name} "
                f"(|w| up to {fmt.largest:.6g} always fits); rescale them or choose bf16 or f32"
            )
