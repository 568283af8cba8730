"""QuantTensor: a weight matrix in one of GGUF's formats, frozen, in GGUF's byte order or packed for the CPU kernels."""

from __future__ import annotations

import warnings
import weakref

import numpy as np
import torch
from torch import Tensor

from .. import backend
from . import panel16
from .formats import Format, encode_rows, find

__all__ = ["QuantTensor"]


class QuantTensor:
    """A quantized weight matrix [rows, cols]; what `fastdl.ops.quantize` returns.

    A plain class, no tensor subclass: the bytes are frozen, take no gradient, and are kept once. ``.layout`` says in
    which order they lie:

    - ``"gguf"``: ``.data`` is uint8 [rows, bytes per row], as in a GGUF file;
    - ``"panel16"``: ``.data`` is uint8 [packed bytes], the order of the CPU kernels (`fastdl/quant/panel16.py`).

    `pack_` goes from the first to the second in place; the ops do it at the first use on a CPU. ``to_gguf``, pickling
    and the modules' ``state_dict`` give GGUF bytes from either.

    Attributes: ``format`` ("q4_1", "q8_0", "q6_k", "f16", "bf16", "f32"), ``shape`` (rows, cols), ``data``, ``layout``,
    ``nbytes``, ``device``.

    >>> import torch, fastdl
    >>> w = fastdl.ops.quantize(torch.randn(8, 64), "q4_1")
    >>> w
    QuantTensor(q4_1, 8 x 64, 320 bytes as GGUF)
    >>> fastdl.quant.QuantTensor.from_gguf(w.to_gguf(), "q4_1").shape
    (8, 64)
    """

    def __init__(self, data: Tensor, fmt: Format, rows: int, cols: int):
        # For this package; users call from_gguf, quantize or zeros. One attribute holds bytes and layout together
        # (2-D: GGUF, 1-D: panel16), so that packing is one assignment and threads never see a mixture.
        self.data = _normal(data)
        self.fmt = fmt
        self.shape = (rows, cols)
        self._gguf: weakref.ref | None = None

    @classmethod
    def from_gguf(cls, data: Tensor | np.ndarray, format: str, cols: int | None = None) -> QuantTensor:
        """From the bytes of a GGUF tensor.

        data    uint8 [rows, bytes per row], a tensor or a numpy array (kept as it is, not copied: do not write to it)
        format  name of the format
        cols    weights in a row, to be checked against the bytes per row; None: computed from them
        """
        fmt = find(format)
        if isinstance(data, np.ndarray):
            with warnings.catch_warnings():  # a read-only map is what we want: these bytes are never written
                warnings.simplefilter("ignore", UserWarning)
                data = torch.from_numpy(data)
        if not isinstance(data, Tensor) or data.dtype != torch.uint8:
            got = str(data.dtype) if isinstance(data, Tensor) else type(data).__name__
            raise TypeError(f"data: expected a uint8 tensor [rows, bytes per row], got {got}")
        if data.dim() != 2:
            raise ValueError(f"data: expected 2 dimensions [rows, bytes per row], got shape {tuple(data.shape)}")
        rows, width = data.shape
        if width == 0 or width % fmt.block_bytes:
            raise ValueError(f"data: a row of {fmt.name} is a multiple of {fmt.block_bytes} bytes, got {width}")
        fits = width // fmt.block_bytes * fmt.block
        if cols is not None and cols != fits:
            raise ValueError(f"cols: {width} bytes a row of {fmt.name} hold {fits} weights, got cols={cols}")
        return cls(data, fmt, rows, fits)

    @classmethod
    def quantize(cls, w: Tensor, format: str, argument: str = "w") -> QuantTensor:
        """Encode a float matrix (`fastdl.ops.quantize` is the public name). ``argument``: its name in messages."""
        fmt = find(format)
        if not isinstance(w, Tensor):
            raise TypeError(f"{argument}: expected a tensor, got {type(w).__name__}")
        if not w.dtype.is_floating_point:
            raise TypeError(f"{argument}: expected a floating-point tensor, got {w.dtype}")
        if w.dim() != 2:
            raise ValueError(f"{argument}: expected a matrix [rows, cols], got shape {tuple(w.shape)}")
        if w.is_meta:
            raise ValueError(f"{argument}: is on the meta device, it has no values to quantize; load the weights first")
        with torch.inference_mode(False), torch.no_grad():
            return cls(encode_rows(w.detach(), fmt, argument), fmt, *w.shape)

    @classmethod
    def zeros(cls, rows: int, cols: int, format: str, device: torch.device | str | None = None) -> QuantTensor:
        """All weights 0 (zero bytes are zero weights in every format): a place to load a state_dict into."""
        fmt = find(format)
        fmt.check_cols(cols, "cols")
        return cls(torch.zeros(rows, fmt.row_bytes(cols), dtype=torch.uint8, device=device), fmt, rows, cols)

    @property
    def format(self) -> str:
        return self.fmt.name

    @property
    def layout(self) -> str:
        return "gguf" if self.data.dim() == 2 else "panel16"

    @property
    def nbytes(self) -> int:
        return self.data.numel()

    @property
    def device(self) -> torch.device:
        return self.data.device

    def to_gguf(self) -> Tensor:
        """GGUF bytes, uint8 [rows, bytes per row]. Do not write to them: in layout "gguf" they are the weights."""
        data = self.data
        if data.dim() == 2:
            return data
        known = self._gguf() if self._gguf is not None else None
        if known is not None:  # so that modules that share this weight also share its bytes in a state_dict
            return known
        with torch.inference_mode(False):
            if backend.native_loaded():
                gguf = torch.ops.fastdl.quant_unpack(data, self.fmt.ggml_id, *self.shape)
            else:
                gguf = panel16.unpack(data, self.fmt, *self.shape)
        self._gguf = weakref.ref(gguf)
        return gguf

    def pack_(self) -> QuantTensor:
        """Change the layout in place to the CPU kernels' own; off the CPU or without the native library do nothing."""
        data = self.data
        if data.dim() == 2 and data.device.type == "cpu" and backend.native_loaded():
            with torch.inference_mode(False):
                self.data = torch.ops.fastdl.quant_pack(data.contiguous(), self.fmt.ggml_id, self.shape[1])
        return self

    def unpack_(self) -> QuantTensor:
        """Change the layout in place to GGUF's."""
        self.data = self.to_gguf()
        return self

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weights [rows, cols] in a floating dtype (computed in float32, float64 for float64, and rounded)."""
        return self._rows(None, dtype)

    def rows_at(self, ids: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Rows ``ids`` (int64 [n], 0 <= id < rows, unchecked here) as [n, cols]; see `fastdl.ops.quant_embedding`."""
        return self._rows(ids, dtype)

    def _rows(self, ids: Tensor | None, dtype: torch.dtype) -> Tensor:
        data = self.data
        native = data.dim() == 1 and dtype != torch.float64 and data.device.type == "cpu" and backend.native_loaded()
        op = torch.ops.fastdl.quant_rows if native else torch.ops.fastdl.quant_rows_torch
        return op(data, ids, self.fmt.ggml_id, *self.shape, dtype)

    def apply_(self, fn) -> QuantTensor:
        """What nn.Module._apply does to a parameter: fn maps a tensor, e.g. to another device. The layout follows;
        bytes stay bytes, also where fn casts every dtype (``module.type(torch.float32)``)."""
        data = self.data
        if data.dim() == 1 and fn(data.new_empty(0)).device != data.device:
            data = self.to_gguf()  # panel16 is for the CPU only
        moved = fn(data)
        self.data = _normal(moved if moved.dtype == torch.uint8 else data.to(moved.device))
        self._gguf = None
        return self

    def load_(self, gguf: Tensor, argument: str = "gguf") -> QuantTensor:
        """Replace the weights by these GGUF bytes of the same format and shape; the layout stays."""
        expected = (self.shape[0], self.fmt.row_bytes(self.shape[1]))
        if not isinstance(gguf, Tensor) or gguf.dtype != torch.uint8:
            got = gguf.dtype if isinstance(gguf, Tensor) else type(gguf).__name__
            raise TypeError(f"{argument}: expected uint8 bytes of {self.format}, got {got}")
        if gguf.is_meta and not self.data.is_meta:
            raise ValueError(f"{argument}: is on the meta device, it has no values to load")
        if tuple(gguf.shape) != expected:
            raise ValueError(f"{argument}: expected {expected} bytes of {self.format}, got {tuple(gguf.shape)}")
        packed = self.layout == "panel16"
        self.data = _normal(gguf.detach().to(gguf.device if self.data.is_meta else self.device, copy=True))
        self._gguf = None
        return self.pack_() if packed else self

    def __deepcopy__(self, memo: dict) -> QuantTensor:
        copy = QuantTensor(self.data.clone(), self.fmt, *self.shape)
        memo[id(self)] = copy
        return copy

    def __reduce__(self):
        return _rebuild, (self.to_gguf(), self.format, self.shape[1], self.layout == "panel16")

    def __repr__(self) -> str:
        rows, cols = self.shape
        layout = "as GGUF" if self.layout == "gguf" else "packed for the CPU"
        where = "" if self.device.type == "cpu" else f" on {self.device}"
        return f"QuantTensor({self.format}, {rows} x {cols}, {self.nbytes} bytes {layout}{where})"


def _normal(data: Tensor) -> Tensor:
    """A tensor made in inference_mode could not be saved for a backward pass: copy it outside."""
    if not data.is_inference():
        return data
    with torch.inference_mode(False):
        return data.clone()


def _rebuild(gguf: Tensor, format: str, cols: int, packed: bool) -> QuantTensor:
    w = QuantTensor.from_gguf(gguf, format, cols)
    return w.pack_() if packed else w
