"""A model's weights from a mapped GGUF file: tensor by tensor into the kernels' layout, one copy, pages given back at
once.

The largest tensors come first: while the embedding is packed there is little else in memory, so the peak stays close to
the size of the packed weights. Files with half-split RoPE pairs (qwen2) get the rows of q and k put into interleaved
order here, before packing, so that the kernels know one order only.
Test: pytest tests/test_llm_load.py
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..ops import DecoderLayer, DecoderStack
from ..quant.formats import FORMATS
from ..quant.tensor import QuantTensor
from .config import ModelConfig, layer_tensors
from .gguf import GGUFFile, ModelFileError
from .requantize import requantize

PROGRESS_BYTES = 1 << 28  # a progress bar from this file size on; less loads within a second
_KERNELS = {entry.ggml_id: entry for entry in FORMATS.values()}


@dataclass
class LoadReport:
    """What loading did: bytes of the file's tensors and in memory, formats in use, tensors that had to be
    requantized."""

    file_bytes: int = 0
    memory_bytes: int = 0
    formats: dict[str, int] = field(default_factory=dict)
    requantized: dict[str, str] = field(default_factory=dict)  # tensor -> "Q5_K -> q8_0"
    seconds: float = 0.0
    fingerprint: str = ""  # of the file's tensors: names, types, shapes and the first bytes of each

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {name}" for name, count in sorted(self.formats.items()))
        sizes = f"{self.file_bytes / 1e6:,.1f} MB of tensors, {self.memory_bytes / 1e6:,.1f} MB in memory"
        lines = [f"{sizes} ({kinds}), {self.seconds:.2f} s"]
        changes: dict[str, int] = {}
        for change in self.requantized.values():
            changes[change] = changes.get(change, 0) + 1
        lines += [
            f"no kernel for this type, requantized: {count} tensors {change}" for change, count in changes.items()
        ]
        return "\n".join(lines)


@dataclass
class Weights:
    """embedding and head [vocab, width] (one object when tied), the stack of layers, llama 3's RoPE factors or None."""

    embedding: QuantTensor
    head: QuantTensor
    stack: DecoderStack
    rope_factors: Tensor | None
    report: LoadReport


def load_weights(file: GGUFFile, config: ModelConfig, *, pack: bool, progress: bool | None = None) -> Weights:
    """Read all tensors (`check_tensors` has passed). pack: into the CPU kernels' layout. progress: None shows a bar for
    large files."""
    report = LoadReport(file_bytes=sum(info.nbytes or 0 for info in file.tensors.values()))
    with _bar(report.file_bytes, progress) as advance:
        reader = _Reader(file, pack, report, advance)
        embedding = reader.matrix("token_embd.weight")
        head = reader.matrix("output.weight") if "output.weight" in file.tensors else embedding
        order = None
        if config.rope.pairs == "half":
            order = half_to_interleaved(config.head_dim, config.rope.dim)
        table = layer_tensors(config)
        layers = []
        for i in range(config.layers):
            fields = {}
            for suffix, (name, _, cols) in table.items():
                tensor = f"blk.{i}.{suffix}"
                if tensor in file.tensors:
                    turned = order if name in ("q", "k", "bias_q", "bias_k") else None
                    fields[name] = reader.vector(tensor, turned) if cols is None else reader.matrix(tensor, turned)
            layers.append(DecoderLayer(**fields))
        output_norm = reader.vector("output_norm.weight")
        factors = reader.vector("rope_freqs.weight") if "rope_freqs.weight" in file.tensors else None
    stack = DecoderStack(
        layers,
        n_heads=config.heads,
        n_kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        eps=config.eps,
        output_norm=output_norm,
    )
    report.fingerprint = reader.hash.hexdigest()[:32]
    report.memory_bytes = stack.nbytes + embedding.nbytes + (head.nbytes if head is not embedding else 0)
    return Weights(embedding, head, stack, factors, report)


def half_to_interleaved(head_dim: int, rope_dim: int) -> Tensor:
    """int64 [head_dim]: which element of a head comes next, so that pairs (i, i + rope_dim/2) become (2i, 2i + 1)."""
    pairs = torch.arange(rope_dim).view(2, rope_dim // 2).T.reshape(-1)
    return torch.cat((pairs, torch.arange(rope_dim, head_dim)))


class _Reader:
    def __init__(self, file: GGUFFile, pack: bool, report: LoadReport, advance: Callable[[int], None]):
        self.file, self.pack, self.report, self.advance = file, pack, report, advance
        self.hash = hashlib.sha256()

    def matrix(self, name: str, order: Tensor | None = None) -> QuantTensor:
        """One weight matrix; order: within each head of len(order) rows."""
        info = self.file.info(name)
        if info.type_id in _KERNELS:
            fmt = _KERNELS[info.type_id]
            data: Tensor | np.ndarray = self.file.tensor_bytes(name)
            if fmt.block > 1 and info.cols % 32:
                raise ModelFileError(
                    f"{self.file.path}: tensor {name!r}: {info.cols} columns, expected a multiple of 32"
                )
        else:
            data, target = requantize(self.file, name)
            fmt = FORMATS[target]
            self.report.requantized[name] = f"{info.type_name} -> {target}"
        weight = QuantTensor.from_gguf(data, fmt.name, info.cols)
        if order is not None:
            weight = QuantTensor.from_gguf(weight.data[_rows_in(order, info.rows)], fmt.name, info.cols)
        if self.pack:
            weight.pack_()
        if isinstance(data, np.ndarray) and weight.layout == "gguf" and order is None:
            weight = QuantTensor.from_gguf(
                weight.data.clone(), fmt.name, info.cols
            )  # own memory: the file may change or go
        del data
        self.report.formats[fmt.name] = self.report.formats.get(fmt.name, 0) + 1
        self._done(name)
        return weight

    def vector(self, name: str, order: Tensor | None = None) -> Tensor:
        """One float32 vector."""
        info = self.file.info(name)
        if info.type_name == "F32":
            values = self.file.tensor_bytes(name).view("<f4").reshape(-1).copy()
        else:
            values = self.file.decode_foreign(name).reshape(-1).copy()
        if not np.isfinite(values).all():
            raise ModelFileError(f"{self.file.path}: tensor {name!r} holds NaN or infinite values")
        self._done(name)
        vector = torch.from_numpy(values)
        return vector if order is None else vector[_rows_in(order, vector.shape[0])]

    def _done(self, name: str) -> None:
        info = self.file.info(name)
        self.hash.update(f"{name} {info.type_id} {info.shape}".encode())
        self.hash.update(self.file.tensor_bytes(name).reshape(-1)[:256].tobytes())
        self.file.release(name)
        self.advance(self.file.info(name).nbytes or 0)


def _rows_in(order: Tensor, rows: int) -> Tensor:
    """`order` repeated for every head: int64 [rows]."""
    heads = torch.arange(0, rows, order.shape[0])
    return (heads[:, None] + order).reshape(-1)


class _bar:
    """Context manager: a tqdm bar on stderr, or nothing; yields a function that takes bytes done."""

    def __init__(self, total: int, progress: bool | None):
        self.total, self.bar = total, None
        self.show = progress if progress is not None else total >= PROGRESS_BYTES

    def __enter__(self) -> Callable[[int], None]:
        if not self.show:
            return lambda done: None
        from tqdm import tqdm

        self.bar = tqdm(total=self.total, unit="B", unit_scale=True, desc="load", file=sys.stderr, leave=False)
        return self.bar.update

    def __exit__(self, *exception) -> None:
        if self.bar is not None:
            self.bar.close()


def matrices(weights: Weights) -> Iterator[QuantTensor]:
    """Every weight matrix once."""
    yield weights.embedding
    if weights.head is not weights.embedding:
        yield weights.head
    for layer in weights.stack.layers:
        yield from (layer.q, layer.k, layer.v, layer.o, layer.gate, layer.up, layer.down)
