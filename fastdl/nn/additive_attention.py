"""Layers on additive attention: AdditiveAttention and PointerAttention (contract: fastdl/ops/additive_attention.py).

Test: tests/test_additive_attention_modules.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import additive_attention
from ..ops._checks import check_dense
from ..ops._masks import autocast_dtype
from ._padding import without_hidden
from .attention import check_backend

__all__ = ["AdditiveAttention", "PointerAttention"]


class _Projections(nn.Module):
    """W_q, W_k and w_v, and what both layers do with queries and keys."""

    def __init__(self, query_size, key_size, num_hiddens, bias, backend, device, dtype) -> None:
        super().__init__()
        for name, value in (("query_size", query_size), ("key_size", key_size), ("num_hiddens", num_hiddens)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected an int of at least 1, got {value!r}")
        self.query_size, self.key_size, self.num_hiddens = query_size, key_size, num_hiddens
        check_backend(backend)
        self.backend = backend
        self.W_q = nn.Linear(query_size, num_hiddens, bias=bias, device=device, dtype=dtype)
        self.W_k = nn.Linear(key_size, num_hiddens, bias=False, device=device, dtype=dtype)
        self.w_v = nn.Linear(num_hiddens, 1, bias=False, device=device, dtype=dtype)

    def extra_repr(self) -> str:
        return f"{self.query_size}, {self.key_size}, {self.num_hiddens}, bias={self.W_q.bias is not None}"

    def project_keys(self, keys: Tensor) -> Tensor:
        """keys [batch, keys, key_size] -> [batch, keys, num_hiddens], for ``projected_keys`` of many calls."""
        self._check_rows("keys", keys, self.key_size, (3,))
        return self.W_k(keys)

    def _check_rows(self, name: str, x: Tensor, size: int, dims: tuple[int, ...]) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
        if x.dim() not in dims or x.shape[-1] != size:
            shapes = " or ".join(f"[batch, {'rows, ' if n == 3 else ''}{size}]" for n in dims)
            raise ValueError(f"{name}: expected shape {shapes}, got {tuple(x.shape)}")

    def _prepare(self, queries: Tensor, keys: Tensor | None, projected: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q [batch, queries, num_hiddens], k [batch, keys, num_hiddens], w [num_hiddens]."""
        self._check_rows("queries", queries, self.query_size, (2, 3))
        if (keys is None) == (projected is None):
            given = "neither" if keys is None else "both"
            raise ValueError(f"keys: expected either keys or projected_keys, got {given}")
        if projected is None:
            k = self.project_keys(keys)
        else:
            self._check_rows("projected_keys", projected, self.num_hiddens, (3,))
            k = projected
        q = self.W_q(queries)
        return q.unsqueeze(1) if q.dim() == 2 else q, k, self.w_v.weight[0]


class AdditiveAttention(_Projections):
    """The attention of Bahdanau et al., ``softmax(w_v . tanh(W_q query + W_k key)) values``, fused.

    query_size, key_size   features of queries and keys
    num_hiddens            hidden units of the score
    bias                   a bias of W_q (one of W_k would add nothing)
    dropout                0 <= p < 1, on the attention weights in training: [batch, queries, keys], which then are kept
    backend                of the op: None, "cpu", "cuda", "triton", "torch"

    ``forward(queries, keys, values, valid_lens=None, *, mask=None, projected_keys=None, return_weights=False)``
    queries         [batch, queries, query_size], or [batch, query_size]: one query, a step of a decoder
    keys            [batch, keys, key_size]; None where projected_keys are given
    values          [batch, keys, value_size]
    valid_lens      int [batch] or [batch, queries]: a query attends to the keys before its length; or None
    mask            bool, broadcastable to [batch, queries, keys], True where a query attends; or None
    projected_keys  what `project_keys` returned: a decoder projects its keys once
    return_weights  return (output, weights [batch, queries, keys]) too, float32 or float64; without the queries'
                    dimension for one query

    Returns [batch, queries, value_size], or [batch, value_size] for one query. A query that attends to nothing gives
    zeros. Parameters W_q.weight, W_k.weight, w_v.weight (and W_q.bias), as in "Dive into deep learning".

    >>> import torch, fastdl
    >>> layer = fastdl.nn.AdditiveAttention(20, 2, 8)
    >>> keys, values = torch.ones(2, 10, 2), torch.arange(40.0).view(1, 10, 4).repeat(2, 1, 1)
    >>> layer(torch.randn(2, 1, 20), keys, values, torch.tensor([2, 6])).detach().round()
    tensor([[[ 2.,  3.,  4.,  5.]],
    <BLANKLINE>
            [[10., 11., 12., 13.]]])

    Source: Bahdanau, Cho and Bengio, "Neural machine translation by jointly learning to align and translate" (2014).
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        num_hiddens: int,
        bias: bool = False,
        *,
        dropout: float = 0.0,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(query_size, key_size, num_hiddens, bias, backend, device, dtype)
        if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected 0 <= p < 1, got {dropout!r}")
        self.dropout = float(dropout)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None,
        values: Tensor,
        valid_lens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        projected_keys: Tensor | None = None,
        return_weights: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        q, k, w = self._prepare(queries, keys, projected_keys)
        options = {"mask": mask, "valid_lens": valid_lens, "backend": self.backend}
        weights = None
        if return_weights or (self.training and self.dropout > 0):
            weights = torch.exp(additive_attention(q, k, None, w, return_pointer=True, **options))
            kept = F.dropout(weights, self.dropout, self.training)
            self._check_values(values, k, q.dtype)
            out = kept.to(values.dtype) @ without_hidden(values, weights)
        else:
            out = additive_attention(q, k, values, w, **options)
        if queries.dim() == 2:
            out, weights = out[:, 0], None if weights is None else weights[:, 0]
        return (out, weights) if return_weights else out

    @staticmethod
    def _check_values(values: Tensor, keys: Tensor, dtype: torch.dtype) -> None:
        check_dense("values", values)
        if values.dim() != 3 or values.shape[:2] != keys.shape[:2]:
            raise ValueError(
                f"values: expected shape ({keys.shape[0]}, {keys.shape[1]}, value_size), got {tuple(values.shape)}"
            )
        if values.dtype != dtype and autocast_dtype(values) is None:
            raise TypeError(f"values: expected the dtype of the queries, {dtype}, got {values.dtype}; convert it")


class PointerAttention(_Projections):
    """The pointer of Vinyals et al., ``log_softmax(w_v . tanh(W_q query + W_k key))`` over the inputs, fused.

    query_size, key_size   features of queries (states of a decoder) and keys (states of an encoder)
    num_hiddens            hidden units of the score
    bias                   a bias of W_q
    backend                of the op: None, "cpu", "cuda", "triton", "torch"

    ``forward(queries, keys, valid_lens=None, *, mask=None, chosen=None, projected_keys=None)``
    queries         [batch, queries, query_size], or [batch, query_size]: one query, a step of a decoder
    keys            [batch, keys, key_size]; None where projected_keys are given
    valid_lens      int [batch] or [batch, queries]: inputs of a sequence; or None
    mask            bool, broadcastable to [batch, queries, keys], True where a query may point; or None
    chosen          bool [batch, keys] or [batch, queries, keys], True where an input was chosen before: it is not again
    projected_keys  what `project_keys` returned: a decoder projects its keys once

    Returns [batch, queries, keys], or [batch, keys] for one query, float32 (float64 for float64): what `F.nll_loss` and
    `argmax` take; -inf where a query may not point.

    >>> import torch, fastdl
    >>> layer = fastdl.nn.PointerAttention(4, 4, 16)
    >>> inputs, state, chosen = torch.randn(1, 3, 4), torch.randn(1, 4), torch.zeros(1, 3, dtype=torch.bool)
    >>> keys, order = layer.project_keys(inputs), []
    >>> for _ in range(3):
    ...     found = layer(state, None, projected_keys=keys, chosen=chosen).argmax(-1)
    ...     chosen = chosen.scatter(1, found[:, None], True)
    ...     order.append(int(found))
    >>> sorted(order)
    [0, 1, 2]

    Source: Vinyals, Fortunato and Jaitly, "Pointer networks" (2015).
    """

    def __init__(
        self,
        query_size: int,
        key_size: int,
        num_hiddens: int,
        bias: bool = False,
        *,
        backend: str | None = None,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(query_size, key_size, num_hiddens, bias, backend, device, dtype)

    def forward(
        self,
        queries: Tensor,
        keys: Tensor | None,
        valid_lens: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        chosen: Tensor | None = None,
        projected_keys: Tensor | None = None,
    ) -> Tensor:
        q, k, w = self._prepare(queries, keys, projected_keys)
        logp = additive_attention(
            q, k, None, w, mask=mask, valid_lens=valid_lens, return_pointer=True, chosen=chosen, backend=self.backend
        )
        return logp[:, 0] if queries.dim() == 2 else logp
