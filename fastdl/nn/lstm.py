"""Drop-in modules of room lstm: LSTM and LSTMCell, with torch's signatures and state_dicts."""

from __future__ import annotations

import torch
from torch import nn

from ..ops.lstm import INFERENCE, lstm
from ._recurrent import Cell, Options, Sequence

__all__ = ["LSTM", "LSTMCell"]


class _LSTM(Options):
    _room, _gates, _states, _inference_op = "lstm", 4, ("h", "c"), INFERENCE
    peephole = False
    zoneout_h = zoneout_c = 0.0

    def _extra_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes, hidden = super()._extra_shapes(), self.hidden_size
        if self.layer_norm:
            shapes |= {"weight_ln_c": (hidden,), "bias_ln_c": (hidden,)}
        if self.peephole:
            shapes["weight_peephole"] = (3, hidden)
        return shapes

    def _call_op(self, x, weights, states, lengths, h_mask):
        norm = ("weight_ln_ih", "weight_ln_hh", "weight_ln_c", "bias_ln_c")
        y, last = lstm(
            x, weights["weight_ih"], weights["weight_hh"], weights.get("bias_ih"), weights.get("bias_hh"), states,
            lengths=lengths, w_hr=weights.get("weight_hr"), peephole=weights.get("weight_peephole"),
            layer_norm=[weights[name] for name in norm] if self.layer_norm else None, h_mask=h_mask,
            zoneout_h=self.zoneout_h, zoneout_c=self.zoneout_c, training=self.training, eps=self.eps,
            backend=self.backend,
        )  # fmt: skip
        return y, list(last)

    def _inference_arguments(self, weights, dtype):
        bias = weights["bias_ih"] + weights["bias_hh"] if self.bias else None
        names = ("weight_ln_hh", "weight_peephole", "weight_ln_c", "bias_ln_c", "weight_hr")
        return bias, [(name, weights.get(name)) for name in names]

    def _inference_numbers(self):
        return float(self.zoneout_h), float(self.zoneout_c), float(self.eps)


class LSTM(Sequence, _LSTM, nn.RNNBase):
    """``torch.nn.LSTM`` on fastdl's kernels, with the options that it lacks; any of them together.

    input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device, dtype: as torch's
    layer_norm      normalize both products of each step, and the cell (Ba et al. 2016)
    peephole        gates see the cell (Gers and Schmidhuber 2000)
    zoneout_h, zoneout_c   probability of an element of h, c to keep its last value (Krueger et al. 2017)
    input_dropout   of elements of each layer's input, the same ones at every step (Gal and Ghahramani 2016)
    state_dropout   of elements of h where it meets its weights, the same ones at every step (the same)
    weight_dropout  of elements of the recurrent weights, drawn once a forward (DropConnect: Merity et al. 2018)
    forget_bias     what the biases of the forget gate add up to at the start, e.g. 1.0 (Gers et al. 2000)
    learn_state     make the initial states parameters, h_0 and c_0 [num_layers * directions, 1, size]; used where no hx
                    is given
    weight_dtype    input and weights are cast to it for the products, e.g. torch.bfloat16; states and sums stay float32
    backend         None or "auto", "cpu", "cuda", "triton", "torch"

    ``forward(input, hx=None, *, lengths=None)``: input and hx as torch's layer takes them (no batch, batch first,
    PackedSequence); lengths: integers [batch] from 0 to time, on any device, in any order: outputs past them are zero,
    the final states those of each sequence's last step. Returns (output, (h_n, c_n)). All dropouts scale what they
    keep, and act in training only. state_dict is that of torch's layer, and for options ``weight_ln_ih_l0``,
    ``weight_ln_hh_l0``, ``weight_ln_c_l0``, ``bias_ln_c_l0``, ``weight_peephole_l0`` [3, hidden_size: i f o], ...

    >>> import torch, fastdl
    >>> layer = fastdl.nn.LSTM(3, 4, num_layers=2, bidirectional=True, layer_norm=True, zoneout_h=0.1)
    >>> y, (h, c) = layer(torch.randn(5, 2, 3), lengths=torch.tensor([5, 2]))
    >>> y.shape, h.shape, y[2:, 1].any().item()
    (torch.Size([5, 2, 8]), torch.Size([4, 2, 4]), False)
    """

    _probabilities = ("zoneout_h", "zoneout_c", "input_dropout", "state_dropout", "weight_dropout")
    _option_names = (
        "layer_norm", "peephole", *_probabilities, "forget_bias", "learn_state", "weight_dtype", "backend",
    )  # fmt: skip

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        peephole: bool = False,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        input_dropout: float = 0.0,
        state_dropout: float = 0.0,
        weight_dropout: float = 0.0,
        forget_bias: float | None = None,
        learn_state: bool = False,
        weight_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(
            "LSTM", input_size, hidden_size, num_layers, bias, batch_first, dropout, bidirectional, proj_size, device,
            dtype,
        )  # fmt: skip
        self._configure(
            device, dtype, layer_norm=layer_norm, peephole=peephole, zoneout_h=zoneout_h, zoneout_c=zoneout_c,
            input_dropout=input_dropout, state_dropout=state_dropout, weight_dropout=weight_dropout,
            forget_bias=forget_bias, learn_state=learn_state, weight_dtype=weight_dtype, backend=backend,
        )  # fmt: skip


class LSTMCell(Cell, _LSTM, nn.LSTMCell):
    """``torch.nn.LSTMCell`` on fastdl's kernels: one step.

    input_size, hidden_size, bias, device, dtype   as torch's
    layer_norm, peephole, zoneout_h, zoneout_c, forget_bias, weight_dtype, backend   as in `LSTM`

    ``forward(input, hx=None)``: input [batch, input_size] or [input_size], hx a pair [batch, hidden_size] or
    [hidden_size] -> (h, c). Zoneout draws its elements anew at every call. state_dict is that of torch's cell.

    >>> import torch, fastdl
    >>> cell = fastdl.nn.LSTMCell(3, 4)
    >>> h, c = cell(torch.randn(2, 3))
    >>> h, c = cell(torch.randn(2, 3), (h, c))
    >>> h.shape
    torch.Size([2, 4])
    """

    _probabilities = ("zoneout_h", "zoneout_c")
    _option_names = ("layer_norm", "peephole", *_probabilities, "forget_bias", "weight_dtype", "backend")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device=None,
        dtype=None,
        *,
        layer_norm: bool = False,
        peephole: bool = False,
        zoneout_h: float = 0.0,
        zoneout_c: float = 0.0,
        forget_bias: float | None = None,
        weight_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, device, dtype)
        self._configure(
            device, dtype, layer_norm=layer_norm, peephole=peephole, zoneout_h=zoneout_h, zoneout_c=zoneout_c,
            forget_bias=forget_bias, weight_dtype=weight_dtype, backend=backend,
        )  # fmt: skip
