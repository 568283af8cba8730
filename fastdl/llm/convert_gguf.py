"""A GGUF file as the source of a conversion: metadata kept key by key with its types, tensors decoded row by row.

Tests: ``pytest tests/test_convert.py -k gguf``.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdl.llm.config import check_tensors, check_whole, read_config
from fastdl.llm.convert_source import Source
from fastdl.llm.gguf import GGUFFile, ModelFileError, StringArray, TensorInfo, open_gguf
from fastdl.llm.gguf_metadata import ARRAY, Cursor
from fastdl.llm.requantize import q4_0_to_q4_1, q4_k_to_q4_1
from fastdl.quant.formats import FORMATS, decode_rows

# 4-bit types whose codes q4_1 can take over as they are
_RECODED = {("q4_0", "q4_1"): q4_0_to_q4_1, ("q4_k", "q4_1"): q4_k_to_q4_1}
_FIRST_KEY = 24  # magic, version, two counts


class GGUFTensor:
    """One tensor of an open GGUF file (convert.SourceTensor)."""

    row_multiple = 1

    def __init__(self, file: GGUFFile, info: TensorInfo):
        self._file = file
        self.name, self.shape, self.type = info.name, info.shape, info.type_name.lower()

    def raw(self, start: int, stop: int, kind: str) -> memoryview | None:
        recode = _RECODED.get((self.type, kind))
        if kind != self.type and recode is None:
            return None
        data = self._file.tensor_bytes(self.name)[start:stop]
        return memoryview(recode(data) if recode else data).cast("B") if len(data) else memoryview(b"")

    def rows(self, start: int, stop: int) -> Tensor:
        if self.type in FORMATS:
            data = self._file.tensor_bytes(self.name)[start:stop].copy()
            return decode_rows(torch.from_numpy(data), FORMATS[self.type], torch.float32)
        return torch.from_numpy(self._file.decode_foreign(self.name, start, stop))

    def release(self) -> None:
        self._file.release(self.name)


def open_file(path: Path) -> Source:
    """Opens ``path`` as a source; ModelFileError for what is not a whole GGUF file of a supported architecture."""
    file = open_gguf(path)
    try:
        _check(file)
        notes: list[str] = []
        return Source(
            path=path,
            architecture=file.metadata.value("general.architecture", str),
            files=[path],
            nbytes=path.stat().st_size,
            metadata=_typed_metadata(path, len(file.metadata), notes),
            tensors=[GGUFTensor(file, info) for info in file.tensors.values()],
            close=file.close,
            notes=notes,
        )
    except BaseException:
        file.close()
        raise


def _check(file: GGUFFile) -> None:
    check_whole(file)
    if not file.tensors:
        raise ModelFileError(f"{file.path}: holds no tensors (a vocabulary-only file?)")
    check_tensors(file, read_config(file))


def _typed_metadata(path: Path, count: int, notes: list[str]) -> list[tuple[str, Any, Any, Any]]:
    """Walks the header (which `open_gguf` has checked) again: Python values do not tell a uint32 from an int64."""
    from gguf import GGUFValueType

    result = []
    with open(path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        cursor = Cursor(mapped, str(path))
        cursor.pos = _FIRST_KEY
        for _ in range(count):
            key = cursor.text("the key")
            kind = cursor.scalar("<I")
            element = struct.unpack_from("<I", mapped, cursor.pos)[0] if kind == ARRAY else None
            value = cursor.value(kind)
            if isinstance(value, StringArray):
                value = [value.raw(index) for index in range(len(value))]
            elif isinstance(value, np.ndarray):
                value = value.tolist()  # a copy: nothing may point into the map when it is closed
            if kind == ARRAY and (element == ARRAY or not value):
                what = "an array of arrays" if element == ARRAY else "an empty array"
                notes.append(f"metadata key {key!r} is {what}, which the gguf library does not write; left out")
                continue
            result.append((key, value, GGUFValueType(kind), None if element is None else GGUFValueType(element)))
            del value
    return result
