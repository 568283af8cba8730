"""What a conversion reads: a model as metadata and tensors under their GGUF names, wherever it comes from.

convert_gguf.py and convert_hf.py make one each, convert.py writes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from fastdl.llm.gguf import Metadata


class SourceTensor(Protocol):
    """One tensor of a source, under its GGUF name."""

    name: str
    shape: tuple[int, ...]  # (rows, cols) or (n,)
    type: str  # "q4_1", "bf16", ...
    row_multiple: int  # chunks must start at a multiple of this many rows

    def rows(self, start: int, stop: int) -> Tensor:
        """float32 [stop - start, cols]; a vector is one row."""

    def raw(self, start: int, stop: int, kind: str) -> memoryview | None:
        """The same rows' bytes in the type ``kind`` if that takes no encoding, else None."""

    def release(self) -> None:
        """Gives back the memory that the rows read so far take; more rows may be read."""


@dataclass
class Source:
    """A model to convert. ``metadata``: arguments of ``GGUFWriter.add_key_value`` (key, value, type, element type)."""

    path: Path
    architecture: str
    files: list[Path]
    nbytes: int  # of the tensors, as they are
    metadata: list[tuple[str, Any, Any, Any]]
    tensors: Sequence[SourceTensor]
    close: Callable[[], None]
    compare: Callable[[Metadata], list[str]] | None = None  # looks at the metadata that was written, returns notes
    notes: list[str] = field(default_factory=list)
