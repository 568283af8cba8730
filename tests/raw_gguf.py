"""GGUF files made of bytes, so that every field can lie: gguf_bytes([key(..)], [tensor(..)], data)."""

from __future__ import annotations

import struct


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return u64(len(raw)) + raw


def key(name: str | bytes, type_id: int, value: bytes) -> bytes:
    return text(name) + u32(type_id) + value


def tensor(name: str, dims: tuple[int, ...] = (8,), type_id: int = 0, offset: int = 0) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type_id) + u64(offset)


def gguf_bytes(keys=(), tensors=(), data: bytes = b"", *, version=3, key_count=None, tensor_count=None) -> bytes:
    counts = (len(tensors) if tensor_count is None else tensor_count, len(keys) if key_count is None else key_count)
    head = b"GGUF" + u32(version) + u64(counts[0]) + u64(counts[1]) + b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % 32) + data


def written(tmp_path, raw: bytes) -> str:
    path = tmp_path / "bad.gguf"
    path.write_bytes(raw)
    return str(path)
