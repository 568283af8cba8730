"""Conversion of a model to a quantized GGUF file: ``fastdl quantize SRC DST --type q4_1``.

SRC is a GGUF file (convert_gguf.py) or a Hugging Face folder (convert_hf.py); both are read as a `Source`: metadata
and a list of tensors that give their rows as float32. This file holds the rule (which tensor gets which type) and the
writer.

Method: header and metadata by ``gguf.GGUFWriter``; then the tensor data in chunks of rows, read, encoded, written, so
that the memory needed does not grow with the model. Rows that have the wanted type already are copied byte for byte.
The file takes its final name when it is complete (atomic.py).

Rule, rows and columns as in PyTorch (docs/quantization.md explains it):

    vectors (norms, biases, rope factors)                    f32
    matrices, type f32, f16, bf16                            the type
    matrices whose width does not divide by 32               f16 (named in the report)
    output matrix under q4_1                                 q8_0; q8_0 or q6_k in the source stays as it is
    all other matrices                                       the type

The output matrix is output.weight, or token_embd.weight where the two are tied.

Tests: ``pytest tests/test_convert.py``.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fastdl.llm.atomic import atomic_file, check_destination
from fastdl.llm.config import check_tensors, read_config
from fastdl.llm.convert_source import Source, SourceTensor
from fastdl.llm.gguf import ModelFileError, open_gguf
from fastdl.quant.formats import FORMATS, encode_rows

__all__ = ["FILE_TYPES", "ConvertReport", "TensorReport", "quantize_file"]

FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7, "q4_1": 3}  # type -> GGUF's general.file_type
FLOATS = ("f32", "f16", "bf16")
CHUNK_WEIGHTS = 1 << 22  # weights in one chunk: 16 MB as float32
QUANTIZATION_VERSION = 2  # ggml's, the value of general.quantization_version


@dataclass(frozen=True)
class TensorReport:
    """What became of one tensor. ``note``: why it has another type than asked for, or was quantized twice."""

    name: str
    shape: tuple[int, ...]
    source_type: str
    type: str
    nbytes: int
    copied: bool
    note: str = ""


@dataclass
class ConvertReport:
    """Result of `quantize_file`; ``str(report)`` is a summary for people."""

    src: Path
    dst: Path
    type: str
    architecture: str
    tensors: list[TensorReport]
    notes: list[str]
    bytes_before: int
    bytes_after: int
    seconds: float

    def __str__(self) -> str:
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.type] = counts.get(tensor.type, 0) + 1
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        weights = sum(torch.Size(tensor.shape).numel() for tensor in self.tensors)
        lines = [
            f"{self.dst}: {self.architecture}, {weights / 1e6:,.1f} M weights in {len(self.tensors)} tensors ({kinds})",
            f"{self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB, "
            f"{8 * self.bytes_after / max(1, weights):.2f} bits a weight, {self.seconds:.1f} s",
        ]
        by_note: dict[str, list[str]] = {}
        for tensor in self.tensors:
            if tensor.note:
                by_note.setdefault(tensor.note, []).append(tensor.name)
        for note, names in by_note.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"note: {note}: {', '.join(names[:3])}{more}")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def quantize_file(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    type: str = "q4_1",
    *,
    progress: bool = True,
    overwrite: bool = False,
) -> ConvertReport:
    """Converts a model to a GGUF file whose matrices have the given type, for `fastdl.llm.load` and llama.cpp.

    Parameters
    ----------
    src: a GGUF file, or a Hugging Face folder (config.json, *.safetensors, tokenizer.json or tokenizer.model) of a
        llama, mistral or qwen2 model.
    dst: the file to write. It appears under this name when it is complete, or not at all.
    type: "q4_1" (5 bits a weight), "q8_0" (8.5), "f16", "bf16" or "f32".
    progress: a bar on stderr, when that is a terminal.
    overwrite: whether ``dst`` may exist; it is then replaced at the end.

    Returns
    -------
    ConvertReport: every tensor with its types, notes, bytes before and after.

    Raises
    ------
    ModelFileError (a ValueError)
        ``src`` is missing, damaged, not supported, or holds NaN or infinite weights; the message names file and tensor.
    ValueError
        ``type`` is not known, or ``dst`` is one of the source's files.
    FileExistsError, IsADirectoryError, NotADirectoryError
        ``dst`` cannot be written under these conditions.
    OSError
        writing failed, for example because the disk is full. ``dst`` is then as it was before.

    Example
    -------
    >>> from fastdl.llm.convert import quantize_file
    >>> report = quantize_file("SmolLM2-135M-Instruct", "smollm2.q4_1.gguf", "q4_1")  # doctest: +SKIP
    >>> print(report)  # doctest: +SKIP
    """
    started = time.monotonic()
    if not isinstance(type, str) or type.lower() not in FILE_TYPES:
        raise ValueError(f"type: expected one of {', '.join(FILE_TYPES)}, got {type!r}")
    type = type.lower()
    target = check_destination(dst, overwrite)
    source = open_source(Path(src))
    try:
        for file in source.files:
            if target.exists() and os.path.samefile(file, target):
                raise ValueError(f"dst: {dst} is a file of the source; choose another name")
        plan = _plan(source, type)
        with atomic_file(dst, overwrite=overwrite) as part:
            _write(source, plan, part, dst, FILE_TYPES[type], progress)
        return ConvertReport(
            src=source.path,
            dst=Path(dst),
            type=type,
            architecture=source.architecture,
            tensors=plan,
            notes=source.notes,
            bytes_before=source.nbytes,
            bytes_after=target.stat().st_size,
            seconds=time.monotonic() - started,
        )
    finally:
        source.close()


def open_source(path: Path) -> Source:
    """Opens a GGUF file or a Hugging Face folder; ModelFileError for anything else."""
    if path.is_dir():
        from fastdl.llm.convert_hf import open_folder

        return open_folder(path)
    from fastdl.llm.convert_gguf import open_file

    return open_file(path)


def _plan(source: Source, type: str) -> list[TensorReport]:
    names = {tensor.name for tensor in source.tensors}
    output = "output.weight" if "output.weight" in names else "token_embd.weight"
    plan = []
    for tensor in source.tensors:
        kind, note = _target(tensor, type, tensor.name == output)
        direct = tensor.raw(0, 0, kind) is not None
        if direct and kind != tensor.type:
            note = f"was {tensor.type}: its codes are kept"
        elif not direct and not note and tensor.type not in (*FLOATS, "f64"):
            note = f"was {tensor.type}, already quantized: decoded and encoded again"
        size = torch.Size(tensor.shape).numel()
        nbytes = size // FORMATS[kind].block * FORMATS[kind].block_bytes
        plan.append(
            TensorReport(tensor.name, tensor.shape, tensor.type, kind, nbytes, direct and kind == tensor.type, note)
        )
    return plan


def _target(tensor: SourceTensor, type: str, is_output: bool) -> tuple[str, str]:
    """The type that the rule in the head of this file gives a tensor, and the note if it is not the one asked for."""
    if len(tensor.shape) == 1:
        return "f32", ""
    cols = tensor.shape[-1]
    if cols % FORMATS[type].block:
        return "f16", f"width {cols} is not divisible by {FORMATS[type].block}: kept at f16"
    if is_output and type == "q4_1":
        if tensor.type == "q6_k":
            return "q6_k", "output matrix: kept at q6_k"
        return "q8_0", "output matrix: q8_0"
    return type, ""


def _write(source: Source, plan: list[TensorReport], part: Path, dst: Any, file_type: int, progress: bool) -> None:
    from tqdm import tqdm

    try:
        alignment = _write_header(source, plan, part, file_type)
        total = sum(torch.Size(item.shape).numel() for item in plan)
        with (
            one_thread(),
            open(part, "ab") as out,
            tqdm(
                total=total, unit=" weights", unit_scale=True, desc="quantize", disable=None if progress else True
            ) as bar,
        ):
            _pad(out, alignment)
            for tensor, item in zip(source.tensors, plan, strict=True):
                for data, weights in _encoded(source.path, tensor, item):
                    out.write(data)
                    bar.update(weights)
                    tensor.release()  # mapped pages; so peak memory does not depend on the size of the largest tensor
                _pad(out, alignment)
    except OSError as error:
        raise OSError(
            error.errno, f"writing {dst} failed: {error.strerror or error}; no file was left behind"
        ) from error
    with open_gguf(part) as written:  # what cannot be read again must not get the final name
        for item in plan:
            info = written.info(item.name)
            if (info.shape, info.type_name.lower(), info.nbytes) != (item.shape, item.type, item.nbytes):
                raise RuntimeError(f"{dst}: tensor {item.name!r} was written as {info}, expected {item}")
        check_tensors(written, read_config(written))
        if source.compare is not None:
            source.notes += source.compare(written.metadata)


def _write_header(source: Source, plan: list[TensorReport], part: Path, file_type: int) -> int:
    """Writes everything before the tensor data with gguf's writer; returns the alignment."""
    import gguf

    values = {
        "general.file_type": (file_type, gguf.GGUFValueType.UINT32, None),
        "general.quantization_version": (QUANTIZATION_VERSION, gguf.GGUFValueType.UINT32, None),
    }
    metadata = {key: (value, kind, element) for key, value, kind, element in source.metadata}
    metadata.update(values)
    writer = gguf.GGUFWriter(part, source.architecture)
    try:
        for key, (value, kind, element) in metadata.items():
            if key == "general.alignment":
                writer.add_custom_alignment(value)
            elif key != "general.architecture":  # the writer's constructor has added it
                writer.add_key_value(key, value, kind, element)
        for item in plan:
            kind = gguf.GGMLQuantizationType(FORMATS[item.type].ggml_id)
            writer.add_tensor_info(item.name, item.shape, None, item.nbytes, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()
    return writer.data_alignment


def _encoded(path: Path, tensor: SourceTensor, item: TensorReport) -> Iterator[tuple[memoryview, int]]:
    """The tensor's bytes in chunks of rows, each with its number of weights."""
    rows, cols = (1, *tensor.shape)[-2:]
    step = max(1, CHUNK_WEIGHTS // cols // tensor.row_multiple) * tensor.row_multiple
    for start in range(0, rows, step):
        stop = min(rows, start + step)
        try:
            data = None if tensor.type in FLOATS else tensor.raw(start, stop, item.type)
            if data is None:  # float types pass through the encoder even when nothing changes: it looks for NaN
                data = _encode(tensor.rows(start, stop), item.type)
        except ValueError as error:
            raise ModelFileError(f"{path}: tensor {tensor.name!r}: {error}") from error
        yield data, (stop - start) * cols


def _encode(w: Tensor, kind: str) -> memoryview:
    if kind in ("q4_1", "q8_0"):
        from fastdl import ops

        coded = ops.quantize(w, kind).to_gguf()
    else:
        coded = encode_rows(w, FORMATS[kind], "weights")
    return memoryview(coded.contiguous().numpy()).cast("B")


@contextmanager
def one_thread() -> Iterator[None]:
    """Limits torch to one thread: the encoder's steps are small; two threads on a busy machine were 100 x slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _pad(out: BinaryIO, alignment: int) -> None:
    out.write(b"\0" * (-out.tell() % alignment))
