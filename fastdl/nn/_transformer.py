"""TransformerEncoderLayer and TransformerDecoderLayer: torch's, with attention, norms and activations in fused kernels.

What is fused: attention (fastdl/nn/attention.py); dropout, the add of the residual and the next layer norm, in one pass
over the rows, in both orders of norms; activation and dropout of the feed-forward layer. The products are torch's.
A part that is not what torch's constructor made there (another norm, an activation of one's own, a part with hooks) is
called as it is. Test: ``pytest tests/test_attention_transformer.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..ops.activation import activation
from .attention import MultiheadAttention, check_backend
from .norm import LayerNorm

__all__ = ["TransformerDecoderLayer", "TransformerEncoderLayer"]

F = nn.functional
_KINDS = {F.relu: "relu", torch.relu: "relu", F.gelu: "gelu", F.silu: "silu"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _check_tensor(name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def _bare(module: nn.Module) -> bool:
    """Nobody would notice that the module is not called."""
    return not any(vars(module).get(name) for name in _HOOKS) and "forward" not in vars(module)


def _probability(dropout: nn.Module) -> float | None:
    """Of a torch.nn.Dropout, now; None: it must be called."""
    if type(dropout) is not nn.Dropout or not _bare(dropout):
        return None
    return float(dropout.p) if dropout.training else 0.0


def _kind(function: Callable | nn.Module) -> str | None:
    """The name that `ops.activation` has for a layer's activation; None: it must be called."""
    if not isinstance(function, nn.Module):
        return _KINDS.get(function)
    if not _bare(function):
        return None
    if type(function) is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(function))


class _Layer:
    """What both layers are made of."""

    # A class attribute, so that a torch layer that was turned into one of these has it too.
    backend: str | None = None

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str | Callable[[Tensor], Tensor] = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        super().__init__(
            d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device,
            dtype,
        )  # fmt: skip
        self.backend = backend
        for part in self.children():  # same parameters, same random numbers
            for theirs, ours in ((nn.MultiheadAttention, MultiheadAttention), (nn.LayerNorm, LayerNorm)):
                if type(part) is theirs:
                    part.__class__, part.backend = ours, backend

    def _add_norm(self, x: Tensor, y: Tensor, dropout: nn.Module, norm: nn.Module) -> tuple[Tensor, Tensor]:
        """s = x + dropout(y) -> norm(s), s"""
        p = _probability(dropout)
        if isinstance(norm, LayerNorm) and p is not None:
            return norm(y, x, True, dropout_p=p)
        s = x + dropout(y)
        return norm(s), s

    def _norm_of_sum(self, x: Tensor, y: Tensor, dropout: nn.Module, norm: nn.Module) -> Tensor:
        """norm(x + dropout(y))"""
        p = _probability(dropout)
        if isinstance(norm, LayerNorm) and p is not None:
            return norm(y, x, dropout_p=p)
        return norm(x + dropout(y))

    def _add(self, x: Tensor, y: Tensor, dropout: nn.Module) -> Tensor:
        """x + dropout(y)"""
        p = _probability(dropout)
        if not p:
            return x + (y if p == 0 else dropout(y))
        return activation(y, "identity", residual=x, dropout_p=p, backend=self.backend)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """linear2(dropout(f(linear1(x))))"""
        x, kind, p = self.linear1(x), _kind(self.activation), _probability(self.dropout)
        if kind is None or p is None:
            return self.linear2(self.dropout(self.activation(x)))
        return self.linear2(activation(x, kind, dropout_p=p, backend=self.backend))

    def extra_repr(self) -> str:
        return f"backend={self.backend!r}" if self.backend else ""


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """``torch.nn.TransformerEncoderLayer`` on fastdl's kernels: attention, dropout with add and layer norm, activation.

    d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype
              as torch's; fused activations are relu, gelu and silu, another one is called
    backend   of all parts: None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(src, src_mask=None, src_key_padding_mask=None, is_causal=False)`` as torch's layer; masks are those of
    `MultiheadAttention`. In ``nn.TransformerEncoder`` it takes the nested tensors that this makes of padded batches in
    inference, and computes them packed, without the padding. Seeds give the weights that torch's layer gets from
    them; dropout draws other elements. state_dict is that of torch's layer.

    >>> import torch, fastdl
    >>> layer = fastdl.nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    >>> model = torch.nn.TransformerEncoder(layer, 2)
    >>> padding = torch.arange(5) >= torch.tensor([[5], [3]])
    >>> model(torch.randn(2, 5, 16), src_key_padding_mask=padding).shape
    torch.Size([2, 5, 16])

    Source: Vaswani et al. (2017); norm_first: Xiong et al., "On Layer Normalization in the Transformer
    Architecture" (2020).
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        _check_tensor("src", src)
        if src.is_nested:
            return self._nested(src, src_mask, src_key_padding_mask)

        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, src_key_padding_mask, need_weights=False, attn_mask=src_mask, is_causal=is_causal
            )[0]

        return self._run(src, attend)

    def _run(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            y, x = self._add_norm(x, attend(self.norm1(x)), self.dropout1, self.norm2)
            return self._add(x, self._feed_forward(y), self.dropout2)
        x = self._norm_of_sum(x, attend(x), self.dropout1, self.norm1)
        return self._norm_of_sum(x, self._feed_forward(x), self.dropout2, self.norm2)

    def _nested(self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None) -> Tensor:
        """src nested [batch, (lengths), d_model] -> the same, computed as rows of all sequences one after the other."""
        if src_mask is not None or src_key_padding_mask is not None:
            raise ValueError("src_mask, src_key_padding_mask: expected None beside a nested src")
        if not isinstance(self.self_attn, MultiheadAttention):
            return super().forward(src)
        parts = src.unbind()
        lengths = [part.shape[0] for part in parts]
        ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        y = self._run(torch.cat(parts), lambda x: self.self_attn.packed(x, ends))
        return torch.nested.as_nested_tensor(list(y.split(lengths)), layout=src.layout)


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """``torch.nn.TransformerDecoderLayer`` on fastdl's kernels, as `TransformerEncoderLayer` is the encoder's.

    d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first, norm_first, bias, device, dtype
              as torch's
    backend   of all parts: None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(tgt, memory, tgt_mask=None, memory_mask=None, tgt_key_padding_mask=None, memory_key_padding_mask=None,
    tgt_is_causal=False, memory_is_causal=False)`` as torch's layer. tgt_is_causal alone, without a tgt_mask, hides what
    follows a position. state_dict is that of torch's layer.

    >>> import torch, fastdl
    >>> layer = fastdl.nn.TransformerDecoderLayer(16, 4, 32, batch_first=True)
    >>> layer(torch.randn(2, 5, 16), torch.randn(2, 7, 16), tgt_is_causal=True).shape
    torch.Size([2, 5, 16])

    Source: Vaswani et al., "Attention Is All You Need" (2017).
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool = False,
        memory_is_causal: bool = False,
    ) -> Tensor:
        def attend(x: Tensor) -> Tensor:
            return self.self_attn(
                x, x, x, tgt_key_padding_mask, need_weights=False, attn_mask=tgt_mask, is_causal=tgt_is_causal
            )[0]

        def look_up(x: Tensor) -> Tensor:
            return self.multihead_attn(
                x, memory, memory, memory_key_padding_mask, need_weights=False, attn_mask=memory_mask,
                is_causal=memory_is_causal,
            )[0]  # fmt: skip

        for name, given in (("tgt", tgt), ("memory", memory)):
            _check_tensor(name, given)
        x = tgt
        if self.norm_first:
            y, x = self._add_norm(x, attend(self.norm1(x)), self.dropout1, self.norm2)
            y, x = self._add_norm(x, look_up(y), self.dropout2, self.norm3)
            return self._add(x, self._feed_forward(y), self.dropout3)
        x = self._norm_of_sum(x, attend(x), self.dropout1, self.norm1)
        x = self._norm_of_sum(x, look_up(x), self.dropout2, self.norm2)
        return self._norm_of_sum(x, self._feed_forward(x), self.dropout3, self.norm3)
