"""What fastdl.quantize did: one line a layer, and the bytes before and after."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from .tensor import QuantTensor

__all__ = ["LayerReport", "QuantReport", "model_bytes"]


@dataclass(frozen=True)
class LayerReport:
    """One layer: reason is None when it was quantized; before and after are the bytes of its weight."""

    name: str
    kind: str
    shape: tuple[int, ...]
    format: str | None
    reason: str | None
    before: int
    after: int
    already: bool = False  # was quantized by an earlier call

    @property
    def quantized(self) -> bool:
        return self.reason is None

    def _cells(self) -> tuple[str, ...]:
        size = str(self.before) if self.before == self.after else f"{self.before} -> {self.after}"
        note = "" if self.reason is None else f"skipped: {self.reason}"
        return self.name, self.kind, " x ".join(map(str, self.shape)), self.format or "", size, note


@dataclass(frozen=True)
class QuantReport:
    """Returned by `fastdl.quantize`; print it. ``before`` and ``after`` count the whole model, shared tensors once."""

    layers: list[LayerReport]
    before: int
    after: int

    @property
    def quantized(self) -> list[LayerReport]:
        return [layer for layer in self.layers if layer.quantized]

    @property
    def skipped(self) -> list[LayerReport]:
        return [layer for layer in self.layers if not layer.quantized]

    def __str__(self) -> str:
        table = [("layer", "kind", "shape", "format", "bytes", "note"), *(layer._cells() for layer in self.layers)]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        count = len(self.quantized)
        lines.append(
            f"{count} layer{'' if count == 1 else 's'} quantized, {len(self.skipped)} skipped; "
            f"the model has {self.after} bytes, before {self.before}"
        )
        return "\n".join(lines)


def model_bytes(model: nn.Module) -> int:
    """Bytes of all parameters, buffers and quantized weights, each counted once."""
    sizes: dict[int, int] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        sizes[id(tensor)] = 0 if is_lazy(tensor) else tensor.numel() * tensor.element_size()
    for module in model.modules():
        weight = vars(module).get("weight")
        if isinstance(weight, QuantTensor):
            sizes[id(weight)] = weight.nbytes
    return sum(sizes.values())
