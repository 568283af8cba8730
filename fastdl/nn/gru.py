"""Drop-in modules of room gru: GRU and GRUCell, with torch's signatures and state_dicts."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.gru import INFERENCE, gru
from ._recurrent import Cell, Options, Sequence

__all__ = ["GRU", "GRUCell"]


class _GRU(Options):
    _room, _gates, _states, _inference_op = "gru", 3, ("h",), INFERENCE
    zoneout = 0.0

    def _call_op(self, x, weights, states, lengths, h_mask):
        norm = ("weight_ln_ih", "weight_ln_hh")
        y, h_n = gru(
            x, weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih"), weights.get("bias_hh"),
            states and states[0], lengths=lengths,
            layer_norm=[weights[name] for name in norm] if self.layer_norm else None, h_mask=h_mask,
            zoneout=self.zoneout, training=self.training, eps=self.eps, backend=self.backend,
        )  # fmt: skip
        return y, [h_n]

    def _inference_arguments(self, weights, dtype):
        hidden, bias, bias_n = self.hidden_size, None, None
        if self.bias:  # as in fastdl.ops.gru: b_hn belongs inside r * (...)
            bias_n = weights["bias_hh"][:, 2 * hidden :]
            outside = torch.cat((weights["bias_hh"][:, : 2 * hidden], torch.zeros_like(bias_n)), 1)
            bias = weights["bias_ih"] + outside
        return bias, [("bias_n", bias_n), ("weight_ln_hh", weights.get("weight_ln_hh"))]

    def _inference_numbers(self):
        return float(self.zoneout), float(self.eps)


class GRU(Sequence, _GRU, nn.RNNBase):
    """``torch.nn.GRU`` on fastdl's kernels, with the options that it lacks; any of them together.

    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device, dtype   as torch's
    layer_norm      normalize both products of each step (Ba et al. 2016)
    zoneout         probability of an element of h to keep its last value (Krueger et al. 2017)
    input_dropout, state_dropout, weight_dropout, learn_state, weight_dtype, backend   as in `LSTM`

    ``forward(input, hx=None, *, lengths=None)`` as in `LSTM`; returns (output, h_n). state_dict is that of torch's
    layer, and for options ``weight_ln_ih_l0``, ``weight_ln_hh_l0``, ``h_0``.

    >>> import torch, fastdl
    >>> y, h = fastdl.nn.GRU(3, 4, batch_first=True, zoneout=0.1)(torch.randn(2, 5, 3))
    >>> y.shape, h.shape
    (torch.Size([2, 5, 4]), torch.Size([1, 2, 4]))
    """

    _probabilities = ("zoneout", "input_dropout", "state_dropout", "weight_dropout")
    _option_names = ("layer_norm", *_probabilities, "learn_state", "weight_dtype", "backend")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        learn_state: bool = False,
        weight_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            "GRU", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, device=device,
            dtype=dtype,
        )  # fmt: skip
        self._configure(
            device, dtype, layer_norm=layer_norm, zoneout=zoneout, input_dropout=input_dropout,
            state_dropout=state_dropout, weight_dropout=weight_dropout, learn_state=learn_state,
            weight_dtype=weight_dtype, backend=backend,
        )  # fmt: skip


class GRUCell(Cell, _GRU, nn.GRUCell):
    """``torch.nn.GRUCell`` on fastdl's kernels: one step.

    input_size, hidden_size, bias, device, dtype   as torch's
    layer_norm, zoneout, weight_dtype, backend     as in `GRU`

    ``forward(input, hx=None)``: input [batch, input_size] or [input_size], hx [batch, hidden_size] or [hidden_size] ->
    h. state_dict is that of torch's cell.

    >>> import torch, fastdl
    >>> fastdl.nn.GRUCell(3, 4)(torch.randn(2, 3)).shape
    torch.Size([2, 4])
    """

    _probabilities = ("zoneout",)
    _option_names = ("layer_norm", *_probabilities, "weight_dtype", "backend")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        zoneout: float = 0.0,
        weight_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self._configure(
            device, dtype, layer_norm=layer_norm, zoneout=zoneout, weight_dtype=weight_dtype, backend=backend
        )
