"""Reader of GGUF model files, version 2 and 3, little endian: small, memory mapped, and suspicious of every number.

Method: the file is mapped, the header is walked once with a bounds-checked cursor (gguf_metadata.py), then each
tensor's type, shape and place are checked against the file's size and against each other. Tensor data is never copied:
callers get numpy views and give the pages back with `release`.
Test: pytest tests/test_gguf*.py (gguf-py is the oracle)
"""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import stat
from dataclasses import dataclass

import numpy as np

from .gguf_metadata import MAX_KEY_BYTES, Cursor, Metadata, ModelFileError, StringArray
from .gguf_types import GGML_TYPES, row_bytes, type_name

__all__ = ["GGUFFile", "Metadata", "ModelFileError", "StringArray", "TensorInfo", "open_gguf"]

MAGIC = b"GGUF"
MAX_KEYS = 1 << 16  # real files have some 50
MAX_TENSORS = 1 << 18  # real files have some 2,000
MIN_KEY_BYTES = 8 + 4 + 1  # empty key, type, one byte
MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8  # empty name, dims, one dimension, type, offset
RELEASE_BYTES = max(mmap.PAGESIZE, 1 << 16)  # a page fault maps the 64 KiB around it (fault-around)
DECODE_BYTES = 1 << 22  # float32 bytes decoded at a time
_PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "<i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}

_HINTS = {
    b"ggml": "a file from before GGUF: convert it with llama.cpp's convert_llama_ggml_to_gguf.py",
    b"tjgg": "a file from before GGUF: convert it with llama.cpp's convert_llama_ggml_to_gguf.py",
    b"lmgg": "a file from before GGUF: convert it with llama.cpp's convert_llama_ggml_to_gguf.py",
    b"vers": "probably a Git LFS pointer: fetch the real file with `git lfs pull`",
    b"PK\x03\x04": "a zip archive (a PyTorch checkpoint or a wheel)",
    b"<!DO": "a web page: the download went wrong",
    b"<htm": "a web page: the download went wrong",
}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies. `shape` is (rows.., cols), as in PyTorch; `nbytes` is None when the type is unknown."""

    name: str
    type_id: int
    type_name: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int | None

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        return self.shape[-1]


def open_gguf(path: str | os.PathLike) -> GGUFFile:
    """Map a GGUF file and check its whole header.

    Returns a GGUFFile with `.metadata` (dict), `.tensors` (name -> TensorInfo) and `.tensor_bytes(name)`.
    Raises ModelFileError, which names the file and the part, for anything that is missing, truncated or lies.

    >>> from fastdl.llm.gguf import open_gguf
    >>> with open_gguf("model.gguf") as file:                                     # doctest: +SKIP
    ...     print(file.metadata["general.architecture"], len(file.tensors))
    llama 272
    """
    return GGUFFile(path)


class GGUFFile:
    """An open GGUF file. Views from `tensor_bytes` and of metadata arrays stay valid after `close()`."""

    def __init__(self, path: str | os.PathLike):
        self.path = os.fsdecode(path)
        self._map = _map_file(self.path)
        cursor = Cursor(self._map, self.path)
        self.version, tensor_count, key_count = _read_counts(cursor)
        self.metadata = _read_metadata(cursor, key_count)
        self.alignment = _alignment(self.metadata)
        self.tensors = _read_tensors(cursor, tensor_count, self.alignment)
        _check_overlap(self.path, self.tensors)

    def info(self, name: str) -> TensorInfo:
        """The tensor's TensorInfo; ModelFileError when the file has no such tensor."""
        try:
            return self.tensors[name]
        except KeyError:
            raise ModelFileError(
                f"{self.path}: tensor {name!r} is missing (the file has {len(self.tensors)})"
            ) from None

    def tensor_bytes(self, name: str) -> np.ndarray:
        """uint8 [rows, bytes per row], a read-only view of the mapped file; rows is 1 for a vector."""
        info = self.info(name)
        if info.nbytes is None:
            raise ModelFileError(
                f"{self.path}: tensor {name!r} has the type {info.type_name} (id {info.type_id}), whose size is not "
                f"known; known types: {', '.join(known for known, _, _ in GGML_TYPES.values())}"
            )
        view = np.frombuffer(self._open_map(), np.uint8, info.nbytes, info.offset)
        return view.reshape(info.rows, -1)

    def decode_foreign(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """float32 array of the tensor's shape, for types without a kernel: block formats are decoded by gguf-py.

        start, stop: only these rows, as [stop - start, cols], so that a large tensor can be decoded piece by piece.
        Raises ModelFileError when gguf-py is not installed or has no decoder for the type.
        """
        info = self.info(name)
        whole = start == 0 and stop is None
        raw = self.tensor_bytes(name)[start:stop]
        result = np.empty((len(raw), info.cols), np.float32)
        step = max(1, DECODE_BYTES // (4 * info.cols))
        with np.errstate(all="ignore"):  # damaged scales give infinities, which the caller looks for
            for first in range(0, len(raw), step):
                result[first : first + step] = self._decode_rows(info, raw[first : first + step])
        return result.reshape(info.shape) if whole else result

    def _decode_rows(self, info: TensorInfo, rows: np.ndarray) -> np.ndarray:
        if info.type_name in _PLAIN:
            return rows.view(_PLAIN[info.type_name])
        if info.type_name == "BF16":
            return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)
        try:
            from gguf.constants import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError as error:
            raise ModelFileError(
                f"{self.path}: tensor {info.name!r} has the type {info.type_name}, which needs the gguf package: "
                f"pip install gguf ({error})"
            ) from None
        try:
            return dequantize(rows, GGMLQuantizationType(info.type_id))
        except (NotImplementedError, ValueError):
            raise ModelFileError(
                f"{self.path}: tensor {info.name!r} has the type {info.type_name}, which nothing here decodes; "
                f"convert the file to Q4_1, Q8_0, Q6_K, F16, BF16 or F32"
            ) from None

    def release(self, name: str) -> None:
        """Give the tensor's mapped pages back to the system; a later access reads them from the file again.

        The range is widened to 64 KiB borders: faults on a neighbour map up to that much of this tensor again.
        """
        info = self.info(name)
        if info.nbytes is None or not hasattr(self._open_map(), "madvise"):
            return
        start = info.offset // RELEASE_BYTES * RELEASE_BYTES
        stop = min(-(-(info.offset + info.nbytes) // RELEASE_BYTES) * RELEASE_BYTES, len(self._map))
        self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)

    def release_header(self) -> None:
        """Give the header's mapped pages back, the tokenizer's arrays among them; a later access reads them again."""
        if hasattr(self._open_map(), "madvise"):
            first = min((info.offset for info in self.tensors.values()), default=0)
            self._map.madvise(mmap.MADV_DONTNEED, 0, first // RELEASE_BYTES * RELEASE_BYTES)

    def _open_map(self) -> mmap.mmap:
        if self._map is None:
            raise ValueError(f"{self.path} was closed")
        return self._map

    def close(self) -> None:
        """Unmap the file, or leave that to the last view when there are any."""
        if self._map is None:
            return
        mapped, self._map = self._map, None
        with contextlib.suppress(BufferError):  # numpy views are alive: the mapping ends with them
            mapped.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"GGUFFile({self.path!r}, version {self.version}, {len(self.tensors)} tensors)"


def _map_file(path: str) -> mmap.mmap:
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        raise ModelFileError(f"{path or 'the empty path'}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    try:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            raise ModelFileError(f"{path}: is a directory, expected a GGUF file")
        if not stat.S_ISREG(status.st_mode):
            raise ModelFileError(f"{path}: is not a regular file, expected a GGUF file")
        head = os.read(handle, 4)
        if not head:
            raise ModelFileError(f"{path}: the file is empty, expected a GGUF file")
        if head != MAGIC:
            hint = f"; {_HINTS[head]}" if head in _HINTS else ""
            raise ModelFileError(f"{path}: not a GGUF file: expected the magic {MAGIC!r}, got {head!r}{hint}")
        return mmap.mmap(handle, 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror or error}") from None
    finally:
        os.close(handle)


def _read_counts(cursor: Cursor) -> tuple[int, int, int]:
    """(version, number of tensors, number of keys) from the first 24 bytes."""
    cursor.pos = len(MAGIC)
    version = cursor.scalar("<I", "the version")
    if version & 0xFFFF == 0 and version:
        raise cursor.error(f"version field {version:#x}: this is a big-endian file, expected little endian")
    if version not in (2, 3):
        raise cursor.error(f"GGUF version {version}, expected 2 or 3; convert the model again with a current tool")
    tensors = cursor.scalar("<Q", "the number of tensors")
    keys = cursor.scalar("<Q", "the number of metadata keys")
    left = cursor.end - cursor.pos
    for count, size, limit, thing in (
        (keys, MIN_KEY_BYTES, MAX_KEYS, "metadata keys"),
        (tensors, MIN_TENSOR_BYTES, MAX_TENSORS, "tensors"),
    ):
        if count > limit or count * size > left:
            most = min(limit, left // size)
            raise cursor.error(f"claims {count} {thing}, expected at most {most} in a file of {cursor.end} bytes")
    return version, tensors, keys


def _read_metadata(cursor: Cursor, count: int) -> Metadata:
    metadata = Metadata(cursor.source)
    for index in range(count):
        cursor.what = f"metadata key {index} of {count}"
        key = cursor.text("the key", MAX_KEY_BYTES)
        cursor.what = f"metadata key {key!r}"
        if key in metadata:
            raise cursor.error("appears twice")
        metadata[key] = cursor.value(cursor.scalar("<I", "the value's type"))
    return metadata


def _alignment(metadata: Metadata) -> int:
    alignment = metadata.value("general.alignment", int, 32)
    if alignment <= 0 or alignment & (alignment - 1) or alignment > 1 << 30:
        raise ModelFileError(f"{metadata.source}: general.alignment: expected a power of two, got {alignment}")
    return alignment


def _read_tensors(cursor: Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    entries = []
    for index in range(count):
        cursor.what = f"tensor {index} of {count}"
        name = cursor.text("the name", MAX_KEY_BYTES)
        cursor.what = f"tensor {name!r}"
        dims = cursor.scalar("<I", "the number of dimensions")
        if not 1 <= dims <= 4:
            raise cursor.error(f"{dims} dimensions, expected 1 to 4")
        shape = tuple(cursor.scalar("<Q", "a dimension") for _ in range(dims))[::-1]  # the file has columns first
        entries.append((name, shape, cursor.scalar("<I", "the type"), cursor.scalar("<Q", "the offset")))
    data_start = -(-cursor.pos // alignment) * alignment

    tensors = {}
    for name, shape, type_id, offset in entries:
        cursor.what = f"tensor {name!r}"
        if name in tensors:
            raise cursor.error("appears twice")
        tensors[name] = _checked_tensor(cursor, name, shape, type_id, offset, data_start, alignment)
    return tensors


def _checked_tensor(cursor: Cursor, name, shape, type_id, offset, data_start, alignment) -> TensorInfo:
    if min(shape) < 1 or math.prod(shape) >= 1 << 63:
        raise cursor.error(f"shape {shape}, expected sizes of at least 1 and fewer than 2**63 weights")
    if offset % alignment:
        raise cursor.error(f"offset {offset} is no multiple of the alignment {alignment}")
    nbytes = None
    if type_id in GGML_TYPES:
        per_row = row_bytes(type_id, shape[-1])
        if per_row is None:
            block = GGML_TYPES[type_id][1]
            raise cursor.error(f"{shape[-1]} columns, expected a multiple of {type_name(type_id)}'s block of {block}")
        nbytes = math.prod(shape[:-1]) * per_row
    stop = data_start + offset + (nbytes or 0)
    if stop > cursor.end:
        raise cursor.error(
            f"{type_name(type_id)} {shape} ends at byte {stop}, the file has {cursor.end} (truncated or a lying header)"
        )
    return TensorInfo(name, type_id, type_name(type_id), shape, data_start + offset, nbytes)


def _check_overlap(path: str, tensors: dict[str, TensorInfo]) -> None:
    ordered = sorted(tensors.values(), key=lambda info: info.offset)
    end, previous = 0, None
    for info in ordered:
        if info.offset < end:
            raise ModelFileError(
                f"{path}: tensor {info.name!r} starts at byte {info.offset}, inside tensor {previous.name!r}, "
                f"which ends at {end}"
            )
        end, previous = info.offset + (info.nbytes or 0), info
