"""QuantLinear and QuantEmbedding: nn.Linear and nn.Embedding over a quantized, frozen weight.

The weight is a `fastdl.quant.QuantTensor` in ``.weight``; it is no parameter and takes no gradient (the input does, and
so does the bias). A state_dict holds it as GGUF bytes, uint8 [rows, bytes per row], under ``weight_<format>``, for
example ``weight_q4_1``; the CPU kernels' own layout is built again after loading.

Test: ``pytest tests/test_quantize_model.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .. import ops
from ..quant.tensor import QuantTensor

__all__ = ["QuantEmbedding", "QuantLinear"]


class _QuantModule(nn.Module):
    """A module with one QuantTensor in ``.weight``: moving it, and its state_dict."""

    weight: QuantTensor

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.weight.apply_(fn)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + self._key()] = self.weight.to_gguf()

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        key = prefix + self._key()
        if key in unexpected:
            unexpected.remove(key)
        if key in state_dict:
            try:
                self.weight.load_(state_dict[key], key)
            except (TypeError, ValueError) as error:
                errors.append(str(error))
        elif strict:
            missing.append(key)

    def _key(self) -> str:
        return f"weight_{self.weight.format}"


class QuantLinear(_QuantModule):
    """``nn.Linear`` with a quantized weight: y = x @ W.T + bias (see `fastdl.ops.quant_matmul`).

    in_features, out_features   as nn.Linear; in_features a multiple of the format's block (32 for q4_1)
    bias        add a trainable bias [out_features]
    format      "q4_1", "q8_0", "q6_k", "f16", "bf16", "f32"
    activation, backend         see `fastdl.ops.quant_matmul`

    A new module has weight and bias 0, to be loaded from a state_dict; `from_linear` quantizes a trained one.

    >>> import torch, fastdl
    >>> layer = fastdl.nn.QuantLinear.from_linear(torch.nn.Linear(64, 48), "q4_1")
    >>> layer
    QuantLinear(in_features=64, out_features=48, bias=True, format=q4_1)
    >>> layer(torch.randn(2, 64)).shape
    torch.Size([2, 48])
    >>> sorted(layer.state_dict())
    ['bias', 'weight_q4_1']
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        format: str = "q4_1",
        *,
        activation: str = "auto",
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        weight = QuantTensor.zeros(out_features, in_features, format, device)
        self._set(weight, torch.zeros(out_features, device=device, dtype=dtype) if bias else None, activation, backend)

    def _set(self, weight: QuantTensor, bias: Tensor | None, activation: str, backend: str | None) -> None:
        self.weight = weight.pack_()
        self.bias = None if bias is None else nn.Parameter(bias)
        self.activation, self.backend = activation, backend

    @classmethod
    def from_weight(
        cls, weight: QuantTensor, bias: Tensor | None = None, *, activation: str = "auto", backend: str | None = None
    ) -> QuantLinear:
        """Over a weight that is quantized already (shared, not copied) and a bias tensor or parameter."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        module._set(weight, None, activation, backend)
        module.bias = bias
        return module

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, format: str = "q4_1", *, activation: str = "auto", backend: str | None = None
    ) -> QuantLinear:
        """Quantize the weight of an nn.Linear; its bias parameter is taken over as it is."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear: expected nn.Linear, got {type(linear).__name__}")
        weight = QuantTensor.quantize(linear.weight, format, "linear.weight")
        module = cls.from_weight(weight, linear.bias, activation=activation, backend=backend)
        return module.train(linear.training)

    def to_linear(self, dtype: torch.dtype = torch.float32) -> nn.Linear:
        """An nn.Linear with the dequantized weight and a copy of the bias."""
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        linear.weight = nn.Parameter(self.weight.dequantize(dtype))
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().to(dtype, copy=True))
        return linear.train(self.training)

    @property
    def in_features(self) -> int:
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        return ops.quant_matmul(x, self.weight, self.bias, activation=self.activation, backend=self.backend)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"format={self.weight.format}"
        )


class QuantEmbedding(_QuantModule):
    """``nn.Embedding`` over a quantized table (see `fastdl.ops.quant_embedding`).

    num_embeddings, embedding_dim, padding_idx   as nn.Embedding (padding_idx has no effect on the result)
    format   as QuantLinear
    dtype    of the result; None: torch's default dtype when the module is made. ``module.to(dtype)`` changes it

    >>> import torch, fastdl
    >>> table = fastdl.nn.QuantEmbedding.from_embedding(torch.nn.Embedding(100, 64), "q8_0")
    >>> table(torch.tensor([1, 2])).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        format: str = "q4_1",
        *,
        backend: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self._set(QuantTensor.zeros(num_embeddings, embedding_dim, format, device), padding_idx, backend, dtype)

    def _set(self, weight: QuantTensor, padding_idx: int | None, backend: str | None, dtype: torch.dtype | None):
        self.weight = weight.pack_()
        self.padding_idx, self.backend = padding_idx, backend
        self.dtype = dtype or torch.get_default_dtype()

    @classmethod
    def from_weight(
        cls,
        weight: QuantTensor,
        padding_idx: int | None = None,
        *,
        backend: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> QuantEmbedding:
        """Over a table that is quantized already (shared, not copied)."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._set(weight, padding_idx, backend, dtype)
        return module

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, format: str = "q4_1", *, backend: str | None = None
    ) -> QuantEmbedding:
        """Quantize the table of an nn.Embedding; results keep its dtype. ``max_norm`` is refused."""
        if not isinstance(embedding, nn.Embedding):
            raise TypeError(f"embedding: expected nn.Embedding, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError("embedding: max_norm rewrites the table at each use, a quantized table is frozen")
        weight = QuantTensor.quantize(embedding.weight, format, "embedding.weight")
        module = cls.from_weight(weight, embedding.padding_idx, backend=backend, dtype=embedding.weight.dtype)
        return module.train(embedding.training)

    def to_embedding(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """An nn.Embedding with the dequantized table, in this module's dtype unless another is given."""
        table = self.weight.dequantize(dtype or self.dtype)
        return nn.Embedding.from_pretrained(table, freeze=False, padding_idx=self.padding_idx).train(self.training)

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    @property
    def num_embeddings(self) -> int:
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        return self.weight.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        return ops.quant_embedding(ids, self.weight, self.dtype, backend=self.backend)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, format={self.weight.format}"
