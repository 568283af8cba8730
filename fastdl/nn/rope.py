"""Module of room rope: RotaryEmbedding, which keeps the table of angles."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..ops._checks import check_dense, check_int
from ..ops._masks import values_are_known
from ..ops.rope import PAIRS, rope, rope_qk, rope_table
from ._tables import GrowingTable, rows_needed
from .attention import check_backend

__all__ = ["RotaryEmbedding"]


class RotaryEmbedding(nn.Module):
    """Rotary position embedding of queries and keys; its table grows with the positions that are asked for.

    head_dim   size of q's and k's last dimension
    base       > 1
    rope_dim   how many elements of each head are turned (even), the first ones; None: all
    pairs      "interleaved" (2i, 2i+1: GGUF's llama) or "half" (i, i + rope_dim/2: GPT-NeoX, Hugging Face)
    max_len    rows that the table has at first; with positions as a tensor on a GPU, whose values are not looked at,
               and inside torch.compile it must be enough (`reserve`)
    scaling, factor, original_context, ...   of `fastdl.ops.rope_table`. "dynamic" makes the table for the last position
               of each call, which must be known here; keys that were turned for another length should be turned again
    backend    None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(q, k=None, positions=0)`` -> q turned, or (q, k) turned. q [..., n, head_dim], k [..., n, head_dim] with
    any number of heads; positions int, int64 [n] or [batch, n].

    >>> import torch, fastdl
    >>> rotary = fastdl.nn.RotaryEmbedding(64, 10000.0, pairs="half")
    >>> q, k = torch.randn(2, 5, 9, 64).transpose(1, 2), torch.randn(2, 5, 3, 64).transpose(1, 2)
    >>> q, k = rotary(q, k, positions=7)
    >>> q.shape, k.shape
    (torch.Size([2, 9, 5, 64]), torch.Size([2, 3, 5, 64]))

    Source: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
    """

    def __init__(
        self,
        head_dim: int,
        base: float = 10000.0,
        *,
        rope_dim: int | None = None,
        pairs: str = "interleaved",
        max_len: int = 2048,
        backend: str | None = None,
        **scaling,
    ) -> None:
        super().__init__()
        if pairs not in PAIRS:
            raise ValueError(f"pairs: expected one of {', '.join(PAIRS)}, got {pairs!r}")
        check_backend(backend)
        check_int("head_dim", head_dim, 2)
        check_int("max_len", max_len, 0)
        rope_dim = head_dim if rope_dim is None else rope_dim
        check_int("rope_dim", rope_dim, 2)
        if rope_dim > head_dim:
            raise ValueError(f"rope_dim: expected at most head_dim, {head_dim}, got {rope_dim}")
        rope_table(rope_dim, base, 0, **scaling)  # raises what is wrong with them
        self.head_dim = head_dim
        self.rope_dim, self.base, self.pairs, self.backend, self.scaling = rope_dim, base, pairs, backend, scaling
        self._length = scaling.get("original_context", 0) if self._by_length else 0  # that the table is made for
        self._table = GrowingTable(self._make, max_len)

    @property
    def _by_length(self) -> bool:
        return self.scaling.get("scaling") == "dynamic" and "length" not in self.scaling

    def _make(self, rows: int) -> Tensor:
        length = {"length": self._length} if self._by_length else {}
        return rope_table(self.rope_dim, self.base, rows, **self.scaling, **length)

    def reserve(self, rows: int, device: torch.device | str = "cpu") -> RotaryEmbedding:
        """Make the table at least that long, on the device; returns self."""
        self._table.on(torch.device(device), rows)
        return self

    def forward(self, q: Tensor, k: Tensor | None = None, positions: Tensor | int = 0):
        check_dense("q", q)
        if q.dim() < 2 or q.shape[-1] != self.head_dim:
            raise ValueError(f"q: expected [..., n, {self.head_dim}], got {tuple(q.shape)}")
        rows = rows_needed(positions, q.shape[-2], self._table.rows)
        if self._by_length:
            if isinstance(positions, Tensor) and not values_are_known(positions):
                raise ValueError("positions: dynamic scaling needs an int or a tensor on the CPU, to know the length")
            length = max(rows, self.scaling["original_context"])
            if length != self._length:
                self._length, self._table.table = length, None
        table = self._table.on(q.device, rows)
        options = {"pairs": self.pairs, "positions": positions, "backend": self.backend}
        return rope(q, table, **options) if k is None else rope_qk(q, k, table, **options)

    def extra_repr(self) -> str:
        more = "".join(f", {name}={value!r}" for name, value in self.scaling.items())
        return f"{self.head_dim}, rope_dim={self.rope_dim}, base={self.base:g}, pairs={self.pairs!r}{more}"
