"""The "panel16" layout: packed weights as the CPU kernels read them. All that Python knows about it is in this file.

Rows are padded with zero bytes to a multiple of 16 and grouped in panels of 16; a panel holds all its columns, and
panels follow each other in one 1-D uint8 buffer. Inside, byte [r * 4 + i] of each 64-byte vector belongs to row r and
to column i of a group of 4 columns: one load feeds 16 rows of a dot product over 4 columns.

    q4_1   per 32 columns: d fp16[16], m fp16[16], then 4 vectors v; byte [r, i] is GGUF's qs[4 v + i] of row r
    q8_0   d fp16[blocks][16], padded with zeros to 64 bytes; then per block 8 vectors j, byte [r, i] = q[4 j + i] + 128
    q6_k   per 256 columns: d fp16[16], 32 zero bytes, scales int8[16 sub-blocks][16]; then per 32 columns
           4 vectors v (low nibble: low 4 bits of code 4 v + i, high nibble: of code 16 + 4 v + i) and
           2 vectors h (bits 2 p, 2 p + 1: the high 2 bits of code 4 (4 h + p) + i)
    f16, bf16   [ceil(cols / 2)][16 rows][2 columns]
    f32         [cols][16 rows]

Here in plain torch, as the reference for the native ops ``quant_pack`` and ``quant_unpack`` and for use without them.
Test: ``pytest tests/test_quant_formats.py -k panel16``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .formats import Format, q6_k_codes

__all__ = ["PANEL", "pack", "panel_bytes", "panels", "unpack"]

PANEL = 16  # rows of a panel


def panels(rows: int) -> int:
    return (rows + PANEL - 1) // PANEL


def panel_bytes(fmt: Format, cols: int) -> int:
    """Bytes of one panel of 16 rows."""
    blocks = cols // fmt.block
    if fmt.name == "q4_1":
        return blocks * 320
    if fmt.name == "q8_0":
        return _header(blocks) + blocks * 512
    if fmt.name == "q6_k":
        return blocks * 3392
    if fmt.block_bytes == 2:
        return (cols + 1) // 2 * 64
    return cols * 64


def pack(gguf: Tensor, fmt: Format, cols: int) -> Tensor:
    """GGUF bytes, uint8 [rows, row_bytes] -> uint8 [packed_bytes]."""
    rows = gguf.shape[0]
    if rows == 0:
        return gguf.new_empty(0)
    count = panels(rows)
    padded = gguf.new_zeros(count * PANEL, fmt.row_bytes(cols))
    padded[:rows] = _flip_q8_0(gguf) if fmt.name == "q8_0" else gguf
    rows_of_panel = padded.reshape(count, PANEL, cols // fmt.block, fmt.block_bytes)
    return _PACK[fmt.name](rows_of_panel).reshape(-1)


def unpack(packed: Tensor, fmt: Format, rows: int, cols: int) -> Tensor:
    """uint8 [packed_bytes] -> GGUF bytes, uint8 [rows, row_bytes]: the exact inverse of `pack`."""
    if rows == 0:
        return packed.new_empty(0, fmt.row_bytes(cols))
    count = panels(rows)
    body = packed.reshape(count, panel_bytes(fmt, cols))
    rows_of_panel = _UNPACK[fmt.name](body, cols // fmt.block)  # [panels, 16, blocks, block_bytes]
    gguf = rows_of_panel.reshape(count * PANEL, fmt.row_bytes(cols))[:rows]
    return _flip_q8_0(gguf) if fmt.name == "q8_0" else gguf.contiguous()


def _flip_q8_0(gguf: Tensor) -> Tensor:
    """int8 codes q <-> q + 128. Outside the panels, because the bytes of padding rows are 0, not 128."""
    flipped = gguf.reshape(gguf.shape[0], -1, 34).clone()
    flipped[..., 2:] ^= 0x80
    return flipped.reshape(gguf.shape)


def _header(blocks: int) -> int:
    return (blocks * 32 + 63) // 64 * 64


# Below: x is uint8 [P panels, 16 rows, B blocks, block_bytes], body is uint8 [P, panel_bytes].


def _pack_q4_1(x: Tensor) -> Tensor:
    p, _, b, _ = x.shape
    scales = [x[..., at : at + 2].transpose(1, 2).reshape(p, b, 32) for at in (0, 2)]
    codes = x[..., 4:].reshape(p, PANEL, b, 4, 4).permute(0, 2, 3, 1, 4).reshape(p, b, 256)
    return torch.cat([*scales, codes], dim=2)


def _unpack_q4_1(body: Tensor, b: int) -> Tensor:
    p = body.shape[0]
    body = body.reshape(p, b, 320)
    scales = [body[..., at : at + 32].reshape(p, b, PANEL, 2).transpose(1, 2) for at in (0, 32)]
    codes = body[..., 64:].reshape(p, b, 4, PANEL, 4).permute(0, 3, 1, 2, 4).reshape(p, PANEL, b, 16)
    return torch.cat([*scales, codes], dim=3)


def _pack_q8_0(x: Tensor) -> Tensor:
    p, _, b, _ = x.shape
    header = x.new_zeros(p, _header(b))
    header[:, : b * 32] = x[..., :2].transpose(1, 2).reshape(p, b * 32)
    codes = x[..., 2:].reshape(p, PANEL, b, 8, 4).permute(0, 2, 3, 1, 4).reshape(p, b * 512)
    return torch.cat([header, codes], dim=1)


def _unpack_q8_0(body: Tensor, b: int) -> Tensor:
    p = body.shape[0]
    d = body[:, : b * 32].reshape(p, b, PANEL, 2).transpose(1, 2)
    codes = body[:, _header(b) :].reshape(p, b, 8, PANEL, 4).permute(0, 3, 1, 2, 4).reshape(p, PANEL, b, 32)
    return torch.cat([d, codes], dim=3)


def _pack_q6_k(x: Tensor) -> Tensor:
    p, _, b, _ = x.shape
    head = x.new_zeros(p, b, 64)
    head[..., :32] = x[..., 208:].transpose(1, 2).reshape(p, b, 32)
    scales = x[..., 192:208].permute(0, 2, 3, 1).reshape(p, b, 256)
    codes = q6_k_codes(x.reshape(-1, 210)).reshape(p, PANEL, b, 8, 2, 4, 4)  # half of 32, v, i
    low = (codes[..., 0, :, :] & 15) | ((codes[..., 1, :, :] & 15) << 4)  # [p, r, b, 8, v, i]
    low = low.permute(0, 2, 3, 4, 1, 5).reshape(p, b, 8, 256)
    pairs = codes.reshape(p, PANEL, b, 8, 2, 4, 4) >> 4  # h, p, i
    high = pairs[..., 0, :] | (pairs[..., 1, :] << 2) | (pairs[..., 2, :] << 4) | (pairs[..., 3, :] << 6)
    high = high.permute(0, 2, 3, 4, 1, 5).reshape(p, b, 8, 128)
    return torch.cat([head, scales, torch.cat([low, high], dim=3).reshape(p, b, 3072)], dim=2)


def _unpack_q6_k(body: Tensor, b: int) -> Tensor:
    p = body.shape[0]
    body = body.reshape(p, b, 3392)
    d = body[..., :32].reshape(p, b, PANEL, 2).transpose(1, 2)
    scales = body[..., 64:320].reshape(p, b, 16, PANEL).permute(0, 3, 1, 2)
    vectors = body[..., 320:].reshape(p, b, 8, 6, PANEL, 4).permute(0, 4, 1, 2, 3, 5)  # [p, r, b, 8, vector, i]
    low, high = vectors[..., :4, :], vectors[..., 4:, :]
    low = torch.stack([low & 15, low >> 4], dim=4).reshape(p, PANEL, b, 256)
    high = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], dim=5).reshape(p, PANEL, b, 256)
    # Back into GGUF's order: codes [half, nibble, 64] and [half, bit pair, 32].
    low = low.reshape(p, PANEL, b, 2, 2, 64)
    ql = (low[..., 0, :] | (low[..., 1, :] << 4)).reshape(p, PANEL, b, 128)
    high = high.reshape(p, PANEL, b, 2, 4, 32)
    qh = high[..., 0, :] | (high[..., 1, :] << 2) | (high[..., 2, :] << 4) | (high[..., 3, :] << 6)
    return torch.cat([ql, qh.reshape(p, PANEL, b, 64), scales, d], dim=3)


def _pack_2(x: Tensor) -> Tensor:
    p, _, cols, _ = x.shape
    if cols % 2:
        x = torch.cat([x, x.new_zeros(p, PANEL, 1, 2)], dim=2)
    return x.reshape(p, PANEL, -1, 4).transpose(1, 2).reshape(p, -1)


def _unpack_2(body: Tensor, cols: int) -> Tensor:
    p = body.shape[0]
    return body.reshape(p, -1, PANEL, 4).transpose(1, 2).reshape(p, PANEL, -1, 2)[:, :, :cols]


def _pack_4(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _unpack_4(body: Tensor, cols: int) -> Tensor:
    return body.reshape(body.shape[0], cols, PANEL, 4).transpose(1, 2)


_PACK = {"q4_1": _pack_q4_1, "q8_0": _pack_q8_0, "q6_k": _pack_q6_k, "f16": _pack_2, "bf16": _pack_2, "f32": _pack_4}
_UNPACK = {
    "q4_1": _unpack_q4_1,
    "q8_0": _unpack_q8_0,
    "q6_k": _unpack_q6_k,
    "f16": _unpack_2,
    "bf16": _unpack_2,
    "f32": _unpack_4,
}
