"""Modules of room position: PositionalEncoding (sinusoids) and LearnedPositionalEncoding."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._checks import check_dense, check_finite, check_int, check_number
from ..ops.position import add_positions, sinusoidal_table
from ._tables import GrowingTable, rows_needed
from .attention import check_backend

__all__ = ["LearnedPositionalEncoding", "PositionalEncoding"]


class _Encoding(nn.Module):
    def __init__(self, dim: int, max_len: int, dropout: float, scale: float, backend: str | None) -> None:
        super().__init__()
        check_backend(backend)
        check_int("dim", dim, 1)
        check_int("max_len", max_len, 0)
        check_number("dropout", dropout)
        check_finite("scale", scale)
        if not 0 <= dropout <= 1:
            raise ValueError(f"dropout: expected 0 <= dropout <= 1, got {dropout}")
        self.dim, self.max_len, self.dropout, self.scale, self.backend = dim, max_len, dropout, scale, backend

    def _rows(self, x: Tensor, positions: Tensor | int) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, positions: Tensor | int = 0) -> Tensor:
        check_dense("x", x)
        if x.dim() < 2:
            raise ValueError(f"x: expected [..., n, {self.dim}], got {tuple(x.shape)}")
        p = self.dropout if self.training else 0.0
        table = self._rows(x, positions)
        return add_positions(x, table, scale=self.scale, positions=positions, dropout_p=p, backend=self.backend)

    def extra_repr(self) -> str:
        return f"{self.dim}, max_len={self.max_len}, dropout={self.dropout:g}, scale={self.scale:g}"


class PositionalEncoding(_Encoding):
    """``dropout(scale * x + sinusoids of the positions)`` in one pass; without parameters.

    dim      size of x's last dimension
    max_len  rows that the table has at first; it grows with the positions that are asked for, but not with those of a
             tensor on a GPU, whose values are not looked at, nor inside torch.compile (`reserve`)
    dropout  probability in training
    scale    of x: ``dim ** 0.5`` for the embeddings of Vaswani et al.
    base     of the wavelengths
    backend  None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(x, positions=0)``: x [..., n, dim]; positions int, int64 [n] or [batch, n].

    >>> import torch, fastdl
    >>> encoding = fastdl.nn.PositionalEncoding(8, max_len=100, dropout=0.1).eval()
    >>> y = encoding(torch.zeros(2, 3, 8))
    >>> torch.equal(y[0], fastdl.ops.sinusoidal_table(3, 8))
    True

    Source: Vaswani et al., "Attention Is All You Need" (2017).
    """

    def __init__(
        self,
        dim: int,
        max_len: int = 1000,
        dropout: float = 0.0,
        *,
        scale: float = 1.0,
        base: float = 10000.0,
        backend: str | None = None,
    ) -> None:
        super().__init__(dim, max_len, dropout, scale, backend)
        sinusoidal_table(0, dim, base=base)  # raises what is wrong with them
        self.base = base
        self._table = GrowingTable(self._make, max_len)

    def _make(self, rows: int) -> Tensor:
        return sinusoidal_table(rows, self.dim, base=self.base)

    def reserve(self, rows: int, device: torch.device | str = "cpu") -> PositionalEncoding:
        """Make the table at least that long, on the device; returns self."""
        self._table.on(torch.device(device), rows)
        return self

    def _rows(self, x: Tensor, positions: Tensor | int) -> Tensor:
        return self._table.on(x.device, rows_needed(positions, x.shape[-2], self._table.rows))


class LearnedPositionalEncoding(_Encoding):
    """``dropout(scale * x + weight[position])`` in one pass, with a parameter weight [max_len, dim] (normal, 0.02).

    The gradient of the weight is added up in a fixed order. Arguments and ``forward``: those of `PositionalEncoding`;
    max_len is fixed.

    >>> import torch, fastdl
    >>> encoding = fastdl.nn.LearnedPositionalEncoding(8, max_len=16)
    >>> encoding(torch.randn(2, 3, 8), positions=torch.tensor([0, 0, 5])).sum().backward()
    >>> encoding.weight.grad[:, 0].nonzero().flatten()
    tensor([0, 5])
    """

    def __init__(
        self,
        dim: int,
        max_len: int = 1000,
        dropout: float = 0.0,
        *,
        scale: float = 1.0,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, max_len, dropout, scale, backend)
        self.weight = nn.Parameter(torch.empty(max_len, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)

    def _rows(self, x: Tensor, positions: Tensor | int) -> Tensor:
        return self.weight
